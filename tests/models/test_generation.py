"""Caches and padding change nothing that a prompt's reader sees."""

import pytest
import torch

from helpers.agreement import assert_agrees
from helpers.models import VARIANTS, random_ids, tiny_model

# Equal tokens are asked for in float64, where rounding cannot decide between two words.
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("variant", ["gda", "diff_v2 window"])
def test_beam_search(variant):
    model = tiny_model(variant, dtype=torch.float64)
    ids = random_ids(2, 9)
    options = GREEDY | {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "num_beams": 3}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))

    def likelihood(tokens):
        logits = model(input_ids=tokens).logits.log_softmax(-1)[:, 8:-1]
        return logits.gather(2, tokens[:, 9:, None]).sum()

    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, **GREEDY)
    assert likelihood(cached) > likelihood(greedy)


def test_generation_stops_at_the_end_token():
    model = tiny_model(dtype=torch.float64)
    ids = random_ids(1, 5)
    free = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **GREEDY)[0, 5:]
    stopped = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=int(free[4]), **GREEDY
    )[0, 5:]
    assert stopped.tolist() == free[: free.tolist().index(int(free[4])) + 1].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_rows_score_as_they_do_alone(variant, side, attention):
    model = tiny_model(variant, attn_implementation=attention)
    rows = [random_ids(1, n, seed=n)[0] for n in (1, 12, 7)]
    batch, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    spans = [slice(0, len(r)) if side == "right" else slice(12 - len(r), 12) for r in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], mask[i, span] = row, 1
    labels = batch.masked_fill(mask == 0, -100)
    with torch.no_grad():
        together = model(input_ids=batch, attention_mask=mask, labels=labels)
        other_padding = model(input_ids=batch.masked_fill(mask == 0, 42), attention_mask=mask)
        alone = [model(input_ids=r[None], labels=r[None]) for r in rows]
    for i, span in enumerate(spans):
        assert_agrees(together.logits[i, span], alone[i].logits[0])
        assert torch.equal(together.logits[i, span], other_padding.logits[i, span])
    weighted = sum(a.loss * (len(r) - 1) for a, r in zip(alone, rows, strict=True)) / sum(len(r) - 1 for r in rows)
    assert_agrees(together.loss, weighted)


def test_a_row_of_nothing_but_padding_gives_no_nan():
    model = tiny_model().train()
    ids, mask = random_ids(2, 6), torch.tensor([[1] * 6, [0] * 6])
    out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), return_logits=True)
    out.loss.backward()
    assert torch.isfinite(out.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_cache_holds_keys_and_values_of_one_shape():
    """k1 and k2 side by side and values of width 2D, once a pair."""
    model = tiny_model("gda 4:1")
    cache = model(input_ids=random_ids(2, 9), use_cache=True).past_key_values
    assert [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers] == [
        ((2, 1, 9, 16), (2, 1, 9, 16))
    ] * 2


def test_window_cache_keeps_the_window_only():
    cache = tiny_model("gda window")(input_ids=random_ids(2, 30), use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [6, 6]
