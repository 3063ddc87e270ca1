"""Rotary tables and rotation against transformers' Llama and the complex-number formula."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from helpers.agreement import assert_agrees
from helpers.plain_attention import rotate
from motifarch.layers import RotaryEmbedding, apply_rotary


@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
def test_tables_and_rotation_agree_with_llama(base):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    position_ids = torch.stack([torch.arange(40), torch.arange(7, 47)])
    q, k = torch.randn(2, 40, 4, 16), torch.randn(2, 40, 2, 16)
    ours = RotaryEmbedding(16, base=base)(position_ids)
    theirs = LlamaRotaryEmbedding(config)(q, position_ids)
    for a, b in zip(ours, theirs, strict=True):
        assert_agrees(a, b)
    rotated = apply_rotary_pos_emb(q, k, *theirs, unsqueeze_dim=2)
    for a, b in zip((apply_rotary(q, ours), apply_rotary(k, ours)), rotated, strict=True):
        assert_agrees(a, b)


def test_rotation_multiplies_pairs_of_halves_by_unit_complex_numbers():
    x = torch.randn(9, 12, dtype=torch.float64)
    tables = RotaryEmbedding(12, base=500.0)(torch.arange(9)[None], torch.float64)
    assert_agrees(apply_rotary(x[None, :, None], tables)[0, :, 0], rotate(x, base=500.0), 1e-12)


def test_tables_are_exact_far_out():
    """Positions of 10^5 and more, against float64."""
    positions = torch.tensor([[131_071]])
    exact = RotaryEmbedding(8)(positions, torch.float64)
    for a, b in zip(RotaryEmbedding(8)(positions), exact, strict=True):
        assert (a - b).abs().max() < 131_071 * 2**-24 * 2


def test_half_precision_is_rounded_once():
    x = torch.randn(1, 50, 2, 16).bfloat16()
    rotary = RotaryEmbedding(16)
    tables = rotary(torch.arange(50)[None], x.dtype)
    assert tables[0].dtype == torch.float32
    assert torch.equal(apply_rotary(x, tables), apply_rotary(x.float(), tables).bfloat16())


def test_module_has_no_state_that_dtype_or_device_moves_could_spoil():
    rotary = RotaryEmbedding(8, inv_freq=torch.tensor([1.0, 0.3, 0.1, 0.01]), attention_scaling=1.5)
    before = rotary(torch.arange(100)[None])
    with torch.device("meta"):
        on_meta = RotaryEmbedding(8)
    assert not rotary.state_dict()
    assert not list(rotary.buffers())
    for a, b in zip(before, rotary.bfloat16()(torch.arange(100)[None]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(on_meta(torch.arange(3)[None])[0], RotaryEmbedding(8)(torch.arange(3)[None])[0])


def test_replaced_frequencies_and_scaling_are_used():
    inv_freq = torch.tensor([0.5, 0.25])
    cos, sin = RotaryEmbedding(4, inv_freq=inv_freq, attention_scaling=2.0)(torch.tensor([[3]]))
    angles = torch.tensor([1.5, 0.75, 1.5, 0.75])
    assert_agrees(cos[0, 0], 2 * angles.cos())
    assert_agrees(sin[0, 0], 2 * angles.sin())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="head_dim is 7"):
        RotaryEmbedding(7)
    with pytest.raises(ValueError, match=r"inv_freq has shape \(3,\); it must be \(4,\)"):
        RotaryEmbedding(8, inv_freq=torch.ones(3))
