"""Whole models against transformers' own: DIFF V1 with DiffLlama, softmax attention with Llama."""

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.agreement import assert_agrees, randomise
from helpers.models import random_ids
from motifarch.models.motif import MotifConfig, MotifForCausalLM

HEADS = 4
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def as_motif(name, tensor, kv_heads):
    """DiffLlama's halves of signal and noise heads as Motif's adjacent pairs."""
    for projection, heads in (("q_proj", HEADS), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        if projection in name:
            return tensor.unflatten(0, (2, heads // 2, -1)).transpose(0, 1).flatten(0, 2)
    return tensor


def compare(ours, theirs, translate, order=None):
    """Logits, loss, attention maps (theirs in ``order``) and gradients of all parameters that both
    have, in float64: in float32 the gradient of lambda, a sum that cancels, differs by DiffLlama's
    own rounding, 1.2e-5 on some processors.
    """
    ids = random_ids(2, 33)
    labels = ids.clone()
    labels[0, :9] = -100
    for model in (ours, theirs):
        model.double().eval()
    a, b = ours(input_ids=ids, labels=labels), theirs(input_ids=ids, labels=labels)
    assert_agrees(a.logits, b.logits, name="logits")
    assert_agrees(a.loss, b.loss, name="loss")
    maps, expected_maps = (model(input_ids=ids, output_attentions=True).attentions for model in (ours, theirs))
    for found, expected in zip(maps, expected_maps, strict=True):
        assert_agrees(found, expected if order is None else expected[:, order], name="maps")
    # The loss is a mean over 50 tokens: scaled, so that the comparison is of numbers of the size of
    # 1.
    (a.loss * 50).backward()
    (b.loss * 50).backward()
    named = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert_agrees(named[name].grad, translate(name, p.grad), name=name)


@pytest.mark.parametrize("ours_attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_diff_v1_agrees_with_diffllama(kv_heads, ours_attention):
    theirs = DiffLlamaForCausalLM(
        DiffLlamaConfig(**SIZES, num_key_value_heads=kv_heads, tie_word_embeddings=False, attn_implementation="eager")
    )
    randomise(theirs, std=0.2)
    options = {"num_key_value_heads": kv_heads, "attention_type": "diff_v1", "num_noise_heads": None}
    options |= {"hidden_act": "silu", "attn_rms_norm_eps": 1e-5, "attn_implementation": ours_attention}
    ours = MotifForCausalLM(MotifConfig(**SIZES, **options, rope_theta=theirs.config.rope_parameters["rope_theta"]))
    copied = {name: as_motif(name, t, kv_heads) for name, t in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(copied, strict=False)
    # DiffLlama's sub-norm has no weight; ours starts at 1.
    assert sorted(missing) == [f"model.layers.{i}.self_attn.subln.weight" for i in range(3)]
    assert not unexpected
    compare(ours, theirs, lambda name, t: as_motif(name, t, kv_heads), order=[0, 2, 1, 3])


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500_000.0}, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("tied", [False, True])
def test_softmax_agrees_with_llama(rope, tied):
    sizes = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=dict(rope), attn_implementation="eager"))
    randomise(theirs, std=0.2)
    config = MotifConfig(**sizes, rope_parameters=dict(rope), attention_type="softmax", hidden_act="silu")
    ours = MotifForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, lambda name, t: t)


def test_yarn_given_as_the_released_files_do():
    """rope_theta and rope_scaling of older files, through transformers' own computation."""
    position_ids = torch.arange(60)[None]
    scaling = {k: v for k, v in YARN.items() if k != "rope_theta"}
    config = MotifConfig(**SIZES, num_key_value_heads=2, attention_type="softmax", rope_theta=5e5, rope_scaling=scaling)
    ours = MotifForCausalLM(config).model.rotary_embs["full_attention"](position_ids)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=dict(YARN)))
    for a, b in zip(ours, llama.model.rotary_emb(torch.zeros(1), position_ids), strict=True):
        assert_agrees(a, b)
    plain = MotifForCausalLM(MotifConfig(**SIZES, num_key_value_heads=2, attention_type="softmax", rope_theta=5e5))
    assert (plain.model.rotary_embs["full_attention"](position_ids)[0] - ours[0]).abs().max() > 0.1
