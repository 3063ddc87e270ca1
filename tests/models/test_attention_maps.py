"""output_attentions, and masks that say themselves what a token sees."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.agreement import assert_agrees
from helpers.models import VARIANTS, packed, random_ids, tiny_model

FULL = [name for name in VARIANTS if "window" not in name]


def with_maps(model, **inputs):
    """Outputs with maps, whose other parts are those of the same call without."""
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    assert len(out.attentions) == model.config.num_hidden_layers
    return out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_are_distributions_over_what_a_token_sees(variant, attention):
    model, ids = tiny_model(variant, attn_implementation=attention), random_ids(2, 11)
    out = with_maps(model, input_ids=ids)
    with torch.no_grad():
        assert_agrees(out.logits, model(input_ids=ids).logits)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    window = model.config.sliding_window if model.config.use_sliding_window else 11
    seen = (distance >= 0) & (distance < window)
    for maps in out.attentions:
        assert maps.shape == (2, model.config.num_attention_heads, 11, 11)
        assert ((maps > 0) == seen).all()
        assert_agrees(maps.sum(-1), torch.ones(maps.shape[:-1]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_after_a_cache_are_the_last_rows(variant):
    model, ids = tiny_model(variant), random_ids(2, 11)
    whole = with_maps(model, input_ids=ids)
    cache = DynamicCache(config=model.config)
    with_maps(model, input_ids=ids[:, :7], past_key_values=cache)
    part = with_maps(model, input_ids=ids[:, 7:], past_key_values=cache)
    assert_agrees(part.logits, whole.logits[:, 7:])
    for new, all_rows in zip(part.attentions, whole.attentions, strict=True):
        assert_agrees(new, all_rows[:, :, 7:, -new.shape[-1] :])


@pytest.mark.parametrize("variant", FULL)
def test_maps_over_a_static_cache_have_its_places(variant):
    model, ids = tiny_model(variant), random_ids(2, 11)
    whole, cache = with_maps(model, input_ids=ids), StaticCache(model.config, max_cache_len=16)
    for chunk in ids.split([7, 4], dim=1):
        part = with_maps(model, input_ids=chunk, past_key_values=cache)
    for new, all_rows in zip(part.attentions, whole.attentions, strict=True):
        assert_agrees(new[..., :11], all_rows[:, :, 7:])
        assert (new[..., 11:] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_is_in_no_map(variant, side):
    model, rows = tiny_model(variant), [random_ids(1, n, seed=n)[0] for n in (4, 9)]
    spans = [slice(0, len(r)) if side == "right" else slice(9 - len(r), 9) for r in rows]
    batch = torch.zeros(2, 9, dtype=torch.long)
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span] = row
    together = with_maps(model, input_ids=batch, attention_mask=(batch != 0).long())
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        alone = with_maps(model, input_ids=row[None])
        assert_agrees(together.logits[i, span], alone.logits[0])
        for maps, own in zip(together.attentions, alone.attentions, strict=True):
            assert_agrees(maps[i, :, span, span], own[0])
            assert_agrees(maps[i].sum(), own.sum())


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_have_blocks(variant):
    model, documents = tiny_model(variant), [random_ids(1, n, seed=n)[0] for n in (3, 8, 1)]
    together = with_maps(model, **packed(documents))
    first = 0
    for document in documents:
        span = slice(first, first := first + len(document))
        alone = with_maps(model, input_ids=document[None])
        for maps, own in zip(together.attentions, alone.attentions, strict=True):
            assert_agrees(maps[0, :, span, span], own[0])
            assert (maps[0, :, span, : span.start] == 0).all()


def test_packed_rows_have_their_own_blocks():
    model, documents = tiny_model(), [random_ids(1, n, seed=n)[0] for n in (3, 5, 6, 2)]
    ids = torch.stack([torch.cat(documents[:2]), torch.cat(documents[2:])])
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((3, 5), (6, 2))])
    maps = with_maps(model, input_ids=ids, position_ids=positions, use_cache=False).attentions[0]
    assert_agrees(maps[1, :, :6, :6], with_maps(model, input_ids=documents[2][None]).attentions[0][0])
    assert (maps[1, :, 6:, :6] == 0).all()


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
@pytest.mark.parametrize("variant", FULL)
def test_a_mask_of_its_own_is_what_a_token_sees(variant, kind):
    """Two endings after one beginning, in one row."""
    model, ids = tiny_model(variant), random_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]])
    seen = torch.ones(9, 9).tril().bool()
    seen[6:, 3:6] = False
    mask = seen[None, None]
    if kind == "int":
        mask = mask.long()
    elif kind == "float":
        mask = torch.zeros(1, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        second = model(input_ids=torch.cat((ids[:, :3], ids[:, 6:]), dim=1)).logits
    assert_agrees(both[:, 6:], second[:, 3:])


@pytest.mark.parametrize("variant", FULL)
def test_a_mask_for_each_head_is_in_its_map(variant):
    model, ids = tiny_model(variant), random_ids(2, 5)
    generator = torch.Generator().manual_seed(0)
    heads = model.config.num_attention_heads
    mask = torch.rand(2, heads, 5, 5, generator=generator).tril() + torch.eye(5) > 0.4
    for maps in with_maps(model, input_ids=ids, attention_mask=mask).attentions:
        assert torch.equal(maps > 0, mask)
    added = torch.zeros(2, heads, 5, 5, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    for maps in with_maps(model, input_ids=ids, attention_mask=added).attentions:
        assert torch.equal(maps > 0, mask)
        assert maps.dtype == torch.float32


def test_gradients_of_maps_and_through_a_mask():
    model, ids = tiny_model().train(), random_ids(1, 6)
    out = model(input_ids=ids, labels=ids, output_attentions=True)
    out.attentions[0].retain_grad()
    out.loss.backward()
    assert out.attentions[0].grad.abs().sum() > 0
    plain, masked = (tiny_model(dtype=torch.float64).train() for _ in range(2))
    own_mask = torch.ones(1, 1, 6, 6).tril().bool()
    (1000 * plain(input_ids=ids, labels=ids).loss).backward()
    (1000 * masked(input_ids=ids, labels=ids, attention_mask=own_mask).loss).backward()
    for (name, p), q in zip(plain.named_parameters(), masked.parameters(), strict=True):
        assert_agrees(q.grad, p.grad, name=name)


def test_masks_that_do_not_fit_are_refused():
    model, ids = tiny_model(), random_ids(2, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 5, 4\).*\(2 rows, 6 heads, 5 tokens, 5 keys\)"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 5, 4))
