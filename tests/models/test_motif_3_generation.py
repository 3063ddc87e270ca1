"""Motif-3 generates what it computes without a cache: latents of all tokens in its full layers, a
ring of keys and values in the others.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from helpers.agreement import assert_agrees
from helpers.models import packed, random_ids
from helpers.motif_3 import TINY, tiny_motif_3
from motifarch.models.motif import MotifForCausalLM

WORDS, WINDOW = TINY["vocab_size"], TINY["sliding_window"] + 1
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
CACHES = {
    "generate's own": lambda model: None,
    "of the config": lambda model: DynamicCache(config=model.config),
    "without a config": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(model.config, max_cache_len=256),
}


def prompts(rows: int, length: int = 9, seed: int = 1) -> Tensor:
    return random_ids(rows, length, seed=seed, vocab_size=WORDS)


def left_padded(*lengths: int) -> tuple[Tensor, Tensor]:
    """Prompts (B, longest), and their mask."""
    places, padding = torch.arange(max(lengths)), max(lengths) - torch.tensor(lengths)
    mask = (places >= padding[:, None]).long()
    return prompts(len(lengths), max(lengths)) * mask, mask


def uncached(model: MotifForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize(
    ("batch", "kind", "count"),
    [
        ("left-padded", "generate's own", 12),
        *(
            pytest.param(batch, kind, 200, marks=pytest.mark.slow)
            for batch in ("single", "batched", "left-padded")
            for kind in CACHES
        ),
    ],
)
def test_cached_tokens_and_logits_are_those_without_a_cache(batch: str, kind: str, count: int) -> None:
    """In float32; the prompt itself is longer than the window."""
    model = tiny_motif_3(dtype=torch.float32)
    ids, mask = {
        "single": (prompts(1), torch.ones(1, 9, dtype=torch.long)),
        "batched": (prompts(3), torch.ones(3, 9, dtype=torch.long)),
        "left-padded": left_padded(9, 2, 13),
    }[batch]
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=CACHES[kind](model),
        max_new_tokens=count,
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )
    whole = uncached(model, out.sequences, torch.cat((mask, mask.new_ones(len(ids), count)), dim=1))
    expected = whole[:, ids.shape[1] - 1 : -1]
    assert_agrees(torch.stack(out.logits, dim=1), expected, 1e-4)
    assert torch.equal(out.sequences[:, ids.shape[1] :], 1 + expected[..., 1:].argmax(dim=-1))
    assert len(set(out.sequences[0].tolist())) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CACHES if kind != "generate's own"])
@pytest.mark.parametrize("chunks", [[30], [11, 19], [1] * 30, [5, 1, 3, 16, 5]], ids=str)
def test_a_prompt_in_chunks_is_one_pass(chunks: list[int], kind: str) -> None:
    model, ids = tiny_motif_3(dtype=torch.float32), prompts(2, 30)
    cache = CACHES[kind](model)
    with torch.no_grad():
        parts = [model(input_ids=chunk, past_key_values=cache).logits for chunk in ids.split(chunks, dim=1)]
    assert_agrees(torch.cat(parts, dim=1), uncached(model, ids, torch.ones_like(ids)))


@pytest.mark.parametrize(("new", "width"), [(3, "latent"), (16, "head")])
def test_absorbed_and_expanded_attention_agree(new: int, width: str) -> None:
    """Few new tokens attend to the latents themselves, many to keys that are made of them."""
    model, ids = tiny_motif_3(dtype=torch.float32), prompts(2, 30)
    cache, widths = DynamicCache(config=model.config), set[int]()
    with torch.no_grad():
        model(input_ids=ids[:, :-new], past_key_values=cache)
        model.model.layers[0].self_attn.attention_hook = lambda inputs, batch: widths.add(inputs.k1.shape[-1])
        found = model(input_ids=ids[:, -new:], past_key_values=cache).logits
    latent = TINY["kv_lora_rank"] + TINY["qk_rope_head_dim"]
    assert widths == {latent if width == "latent" else TINY["head_dim"]}
    assert_agrees(found, uncached(model, ids, torch.ones_like(ids))[:, -new:])


def held(cache: Cache) -> list[tuple[int, int]]:
    """Each layer's tokens, and numbers of one token."""
    layers: list[Any] = cache.layers
    return [
        (k.shape[2], k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3]) for k, v in ((c.keys, c.values) for c in layers)
    ]


def test_full_layers_hold_latents_and_the_others_a_window() -> None:
    """One token of the window less than a query sees, for it brings its own."""
    model = tiny_motif_3(dtype=torch.float32)
    full = TINY["kv_lora_rank"] + TINY["qk_rope_head_dim"]
    heads = TINY["num_key_value_heads"] * (TINY["head_dim"] + TINY["v_head_dim"])
    ids = prompts(1, 30)
    for cache in (None, DynamicCache(config=model.config)):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
        assert held(out.past_key_values) == [
            (33, full), *[(WINDOW - 1, heads)] * 3, (33, full)
        ]  # fmt: skip
    static = StaticCache(model.config, max_cache_len=64)
    model.generate(ids, past_key_values=static, max_new_tokens=4, **GREEDY)
    assert held(static) == [(64, full), *[(WINDOW, heads)] * 3, (64, full)]


def test_a_cache_that_is_taken_apart_and_made_again_keeps_the_window() -> None:
    model, ids = tiny_motif_3(dtype=torch.float32), torch.arange(1, 25)[None]
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        again = DynamicCache(ddp_cache_data=list(cache))
        after = model(ids[:, 20:21], past_key_values=again, position_ids=torch.tensor([[20]])).logits
        torch.testing.assert_close(after, model(ids[:, :21]).logits[:, -1:], atol=1e-4, rtol=0)
        short = DynamicCache(config=model.config)
        heads = torch.ones(1, 2, 9, 12), torch.ones(1, 2, 9, 6)
        short.update(*heads, 1)
        with pytest.raises(ValueError, match="keeps a window of 5 tokens"):
            model(ids, past_key_values=short)


@pytest.mark.slow
def test_the_released_cache_has_576_numbers_a_token_and_rings_of_128() -> None:
    attention: dict[str, Any] = {"num_attention_heads": 80, "num_noise_heads": 16, "num_key_value_heads": 16}
    attention |= {"head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
    model = tiny_motif_3(dtype=torch.float32, num_hidden_layers=2, sliding_window=128, **attention)
    with torch.no_grad():
        cache = model(input_ids=prompts(1, 200), use_cache=True).past_key_values
        assert held(cache) == [(200, 576), (128, 16 * 320)]
        seen: list[int] = []
        model.model.layers[1].self_attn.attention_hook = lambda inputs, batch: seen.append(inputs.k1.shape[1])
        model(input_ids=prompts(1, 1), past_key_values=cache)
    assert seen == [129]


@pytest.mark.slow
@pytest.mark.parametrize("length", [80, 79])
def test_a_prompt_with_as_many_tokens_as_heads(length: int) -> None:
    """Motif's published code tells layouts apart by such a number, and confuses the two."""
    model = tiny_motif_3(num_attention_heads=80, num_noise_heads=16, num_key_value_heads=16)
    ids = prompts(1, length)
    out = model.generate(ids, max_new_tokens=4, **GREEDY)
    rows = uncached(model, out, torch.ones_like(out))[:, length - 1 : -1, 1:]
    assert torch.equal(out[:, length:], 1 + rows.argmax(dim=-1))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("kind", ["generate's own", "static"])
def test_beam_search(kind: str, options: dict[str, int]) -> None:
    """In float64, where rounding cannot decide between two words."""
    model, (ids, mask) = tiny_motif_3(), left_padded(9, 4)
    options |= GREEDY | {"max_new_tokens": 12}  # type: ignore[assignment]
    places = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    found = model.generate(ids, attention_mask=mask, **options, **places)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, use_cache=False, **options))


@pytest.mark.slow
def test_rows_of_a_cache_change_places() -> None:
    model, ids = tiny_motif_3(dtype=torch.float32), prompts(3, 12)
    for kind in ("of the config", "without a config"):
        cache = CACHES[kind](model)
        order = torch.tensor([2, 0, 0])
        with torch.no_grad():
            model(input_ids=ids[:, :10], past_key_values=cache)
            cache.reorder_cache(order)
            found = model(input_ids=ids[order, 10:], past_key_values=cache).logits
        assert_agrees(found, uncached(model, ids, torch.ones_like(ids))[order, 10:])


@pytest.mark.slow
def test_rows_that_return_several_sequences_sample_the_same() -> None:
    model, ids = tiny_motif_3(), prompts(2)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 10}
        drawn.append(model.generate(ids, use_cache=use_cache, **(GREEDY | options)))
    assert torch.equal(*drawn)


@pytest.mark.slow
def test_packed_documents_are_computed_as_if_alone() -> None:
    model = tiny_motif_3(dtype=torch.float32)
    documents = [prompts(1, n, seed=n)[0] for n in (11, 1, 7, 20)]
    with torch.no_grad():
        found = model(**packed(documents)).logits[0].split([len(d) for d in documents])
        restarting = model(input_ids=torch.cat(documents)[None], position_ids=packed(documents)["position_ids"]).logits
    for document, logits in zip(documents, found, strict=True):
        assert_agrees(logits, uncached(model, document[None], torch.ones_like(document)[None])[0])
    torch.testing.assert_close(restarting[0], torch.cat(found))


@pytest.mark.slow
def test_compiled_and_exported_models_compute_the_same() -> None:
    model, ids = tiny_motif_3(dtype=torch.float32), prompts(2, 12)
    mask = torch.ones_like(ids)
    expected = uncached(model, ids, mask)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        assert_agrees(compiled(input_ids=ids, use_cache=False).logits, expected)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        program = torch.export.export(model, (), inputs).module()
        assert_agrees(program(**inputs).logits, expected)
