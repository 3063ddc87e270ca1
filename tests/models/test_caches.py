"""Generation with every kind of cache gives the tokens that no cache gives."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.agreement import assert_agrees
from helpers.models import VARIANTS, random_ids, tiny_model

KINDS = ["dynamic", "static"]
# A penalty, for a model of random weights soon says one word for ever; but then never the padding's
# token, which some transformers punish for standing before a prompt.
GREEDY = {"do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.5, "suppress_tokens": [0]}


def cache_of(kind, model, places=256):
    return StaticCache(model.config, max_cache_len=places) if kind == "static" else DynamicCache(config=model.config)


def continued(model, cache, prompts, mask, count):
    return model.generate(prompts, attention_mask=mask, past_key_values=cache, max_new_tokens=count, **GREEDY)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["gda 4:1", "diff_v1", "diff_v2 gated", "gda window", "softmax"])
def test_two_hundred_tokens_in_float32(variant, kind, rows):
    """Each token is the likeliest without a cache, or as likely within float32's rounding."""
    model = tiny_model(variant)
    ids = random_ids(rows, 9)
    out = continued(model, cache_of(kind, model), ids, torch.ones_like(ids), 200)
    assert out.shape == (rows, 209)
    uncached = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, use_cache=False, **GREEDY)
    assert torch.equal(out, uncached)
    assert len(set(out[0, 9:].tolist())) > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padded_prompts_give_their_own_tokens(variant, kind):
    model = tiny_model(variant, dtype=torch.float64)
    prompts = [random_ids(1, n, seed=n)[0] for n in (3, 17, 11)]
    batch = torch.zeros(3, 17, dtype=torch.long)
    for row, prompt in zip(batch, prompts, strict=True):
        row[17 - len(prompt) :] = prompt
    together = continued(model, cache_of(kind, model, 64), batch, (batch != 0).long(), 20)
    for row, prompt in zip(together, prompts, strict=True):
        alone = continued(model, cache_of(kind, model, 64), prompt[None], torch.ones_like(prompt)[None], 20)
        assert torch.equal(row[17:], alone[0, len(prompt) :])


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_padded_on_the_right_go_on_as_they_do_alone(variant, kind, new):
    """With a window, in a cache that holds all tokens."""
    model, lengths = tiny_model(variant), torch.tensor([3, 9, 6])
    prompts, tokens = random_ids(3, 9), random_ids(3, new * 3, seed=5)
    mask = (torch.arange(9) < lengths[:, None]).long()
    cache = cache_of(kind, tiny_model() if "window" in variant else model, 32)
    with torch.no_grad():
        model(input_ids=prompts * mask, attention_mask=mask, past_key_values=cache)
        parts = []
        for i, chunk in enumerate(tokens.split(new, dim=1)):
            mask = torch.cat((mask, torch.ones_like(chunk)), dim=1)
            positions = lengths[:, None] + i * new + torch.arange(new)
            out = model(input_ids=chunk, attention_mask=mask, position_ids=positions, past_key_values=cache)
            parts.append(out.logits)
        for row, length in enumerate(lengths.tolist()):
            alone = model(input_ids=torch.cat((prompts[row, :length], tokens[row]))[None]).logits[0, length:]
            assert_agrees(torch.cat(parts, dim=1)[row], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_windows_cache_refuses_padding_in_the_place_of_tokens(kind):
    model, ids = tiny_model("gda window"), random_ids(2, 9)
    mask = (torch.arange(12) != torch.tensor([[8], [-1]])).long()
    with torch.no_grad():
        cache = cache_of(kind, model, 32)
        model(input_ids=ids, attention_mask=mask[:, :9], past_key_values=cache)
        with pytest.raises(ValueError, match="pad prompts on the left"):
            model(input_ids=ids[:, :3], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("chunks", [[30], [11, 19], [1] * 30, [5, 1, 1, 16, 7]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_in_chunks_equals_one_pass(variant, kind, chunks):
    model = tiny_model(variant)
    ids = random_ids(2, 30)
    cache = cache_of(kind, model, 48)
    with torch.no_grad():
        parts = [model(input_ids=c, past_key_values=cache, use_cache=True).logits for c in ids.split(chunks, dim=1)]
        whole = model(input_ids=ids, use_cache=False).logits
    assert int(cache.get_seq_length()) == 30
    assert_agrees(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["gda", "diff_v2 gated", "gda window", "softmax"])
def test_a_static_cache_is_compiled_once_for_all_lengths(variant, attention):
    """No graph break, and padding or not, no compilation after the first as rows grow.

    transformers keeps a window's fill as a Python number: a second compilation makes that a symbol,
    and a third follows when the window is full.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = tiny_model(variant, attn_implementation=attention)
    ids, mask = random_ids(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    cache = StaticCache(model.config, max_cache_len=32)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    leftpad = torch.tensor([2, 0], dtype=torch.int32)
    tokens = random_ids(2, 20, seed=5)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        for t in range(20):
            new = tokens[:, t : t + 1]
            position = torch.tensor([[5 + t]])
            out = step(
                input_ids=new.clone(), position_ids=position, past_key_values=cache, cache_leftpad=leftpad.clone()
            )
            ids = torch.cat((ids, new), dim=1)
    whole = torch.cat((mask, torch.ones_like(tokens)), dim=1)
    assert_agrees(out.logits[:, -1], model(input_ids=ids, attention_mask=whole, use_cache=False).logits[:, -1])
    assert counter.frame_count <= (3 if "window" in variant else 1)


@pytest.mark.parametrize("padding", [slice(0, 3), slice(5, 8)], ids=["left", "right"])
@pytest.mark.parametrize("variant", ["gda", "softmax"])
def test_generate_compiles_decoding_with_a_static_cache(variant, padding):
    """What transformers does by itself on a GPU."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    model = tiny_model(variant, dtype=torch.float64)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    batch = random_ids(2, 8)
    batch[0, padding] = 0
    options = {"attention_mask": (batch != 0).long(), "max_new_tokens": 24} | GREEDY
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = model.generate(batch, cache_implementation="static", compile_config=compile_config, **options)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(out, model.generate(batch, use_cache=False, **options))


@pytest.mark.parametrize("variant", ["gda", "gda window", "diff_v2"])
def test_a_prompt_in_chunks_with_a_static_cache(variant):
    """Transformers then makes the cache ahead, with heads as the config has them."""
    model, ids = tiny_model(variant, dtype=torch.float64), random_ids(2, 9)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "disable_compile": True} | GREEDY
    out = model.generate(ids, cache_implementation="static", prefill_chunk_size=4, **options)
    assert torch.equal(out, model.generate(ids, use_cache=False, **options))


def test_a_static_cache_can_be_reset_and_used_again():
    model = tiny_model()
    cache = cache_of("static", model, 48)
    with torch.no_grad():
        model(input_ids=random_ids(2, 20, seed=3), past_key_values=cache)
        cache.reset()
        again = model(input_ids=random_ids(2, 12), past_key_values=cache).logits
        fresh = model(input_ids=random_ids(2, 12), use_cache=False).logits
    assert_agrees(again, fresh)


def test_no_gradients_through_a_cache_written_in_place():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"Cache gives no gradients, for it is written in place; call under"):
        model(input_ids=random_ids(1, 4), past_key_values=cache_of("static", model, 16))


@pytest.mark.parametrize("variant", ["gda", "softmax"])
def test_gradients_through_a_dynamic_cache(variant):
    model, ids = tiny_model(variant), random_ids(2, 12)
    whole = model(input_ids=ids, use_cache=False).logits[:, 8:]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :8], past_key_values=cache)
    part = model(input_ids=ids[:, 8:], past_key_values=cache).logits
    expected = torch.autograd.grad(whole.square().sum(), list(model.parameters()), allow_unused=True)
    found = torch.autograd.grad(part.square().sum(), list(model.parameters()), allow_unused=True)
    for e, f in zip(expected, found, strict=True):
        assert_agrees(f, e)


def test_refuses_with_a_reason():
    model = tiny_model()
    cache = cache_of("static", model, 16)
    with torch.no_grad():
        model(input_ids=random_ids(1, 12), past_key_values=cache)
        with pytest.raises(ValueError, match="room for 16 tokens in a row, but 12 are cached and 5 are to be added"):
            model(input_ids=random_ids(1, 5), past_key_values=cache)
