"""Any attention that transformers' interface has, under the models of this package and under those
that travel with a folder.
"""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.models import VARIANTS, packed, random_ids, tiny_model
from motifarch.models.motif import MotifForCausalLM
from motifarch.portable.modeling_motif import MotifForCausalLM as PortableMotif

CALLS: list[tuple[int, ...]] = []


def counted(module, query, key, value, attention_mask, **options):
    CALLS.append(tuple(query.shape))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("counted", counted)
AttentionMaskInterface.register("counted", sdpa_mask)


@pytest.fixture(params=["motifarch", "portable"])
def model(request, variant, tmp_path):
    """One that asks the registered attention."""
    made = tiny_model(variant)
    made.save_pretrained(tmp_path)
    own = MotifForCausalLM if request.param == "motifarch" else PortableMotif
    CALLS.clear()
    return own.from_pretrained(tmp_path, attn_implementation="counted").eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_call_of_all_heads_a_layer_gives_the_same_logits(model, variant):
    wanted = tiny_model(variant)
    ids, mask = random_ids(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[0, :9], mask[2, :1] = 0, 0
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, wanted))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    config = model.config
    assert [(3, config.num_attention_heads, 21, wanted.config.v_head_dim)] * config.num_hidden_layers == CALLS
    documents = packed([random_ids(n, seed=n) for n in (9, 3, 11)])
    with torch.no_grad():
        torch.testing.assert_close(model(**documents).logits, wanted(**documents).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["gda", "gda window", "diff_v2 gated", "softmax"])
def test_generation_with_growing_and_static_caches(model, variant):
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = tiny_model(variant).generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(ids, **options, past_key_values=cache), expected)


@pytest.mark.parametrize("variant", ["gda", "diff_v2 gated"])
def test_gradients(model, variant):
    wanted, ids = tiny_model(variant), random_ids(2, 13)
    for m in (model, wanted):
        m(ids, labels=ids).loss.backward()
    for (name, found), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4 * scale, rtol=1e-4, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["gda", "gda 4:1", "gda window", "diff_v2 gated"])
def test_continuous_batching_gives_generates_tokens(model, variant, attention):
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 12, 3)]
    config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=8)
    model.set_attn_implementation(attention)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    wanted = tiny_model(variant)
    for prompt, output in zip(prompts, sorted(found.values(), key=lambda o: prompts.index(o.prompt_ids)), strict=True):
        expected = wanted.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert output.generated_tokens == expected.tolist()


@pytest.mark.slow  # flex attention is compiled
@pytest.mark.parametrize("variant", ["gda", "diff_v2"])
def test_flex_attention(model, variant):
    model.set_attn_implementation("flex_attention")
    ids = random_ids(2, 40)
    with torch.no_grad():
        found, expected = (m(ids).logits for m in (model, tiny_model(variant)))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
