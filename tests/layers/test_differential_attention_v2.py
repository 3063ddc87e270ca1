"""DIFF V2, grouped and gated, against the formula."""

import pytest
import torch

from helpers.agreement import assert_agrees, randomise
from helpers.plain_attention import attend, rms_norm, rotate
from motifarch.layers import DifferentialAttentionV2, RotaryEmbedding

EMBED, D = 24, 8


def plain_v2(layer, x, *, gate=False, sub_norm=False, lambda_init=0.0, qk_norm=False, window=None):
    """One row x (S, E): adjacent pairs (or blocks) share a key/value head."""
    blocks = layer.num_noise_heads
    q = (x @ layer.q_proj.weight.T).split(D, dim=-1)
    k = (x @ layer.k_proj.weight.T).split(D, dim=-1)
    v = (x @ layer.v_proj.weight.T).split(D, dim=-1)
    if qk_norm:
        q = [rms_norm(t, layer.q_norm.weight, 1e-6) for t in q]
        k = [rms_norm(t, layer.k_norm.weight, 1e-6) for t in k]
    lam = 1 / (1 + torch.exp(-(x @ layer.lambda_proj.weight.T))) + lambda_init
    size = len(q) // blocks
    heads = []
    for n in range(blocks):
        shared = n // (blocks // layer.num_kv_heads)
        key, scale = rotate(k[shared]), D**-0.5
        noise = attend(rotate(q[n * size + size - 1]), key, v[shared], scale=scale, window=window)
        for j in range(size - 1):
            signal = attend(rotate(q[n * size + j]), key, v[shared], scale=scale, window=window)
            out = signal - lam[:, len(heads), None] * noise
            if sub_norm:
                out = (1 - lambda_init) * rms_norm(out, layer.subln.weight, 1e-5)
            heads.append(out)
    out = torch.cat(heads, dim=-1)
    if gate:
        out = out / (1 + torch.exp(-(x @ layer.gate_proj.weight.T)))
    return out @ layer.o_proj.weight.T


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("ratio", [1, 3, 4])
@pytest.mark.parametrize("gate", [False, True])
def test_every_head_ratio_is_the_formula(ratio, kv_heads, gate, backend):
    heads = {"num_heads": 2 * (ratio + 1), "num_noise_heads": 2, "num_kv_heads": kv_heads, "head_dim": D}
    options = {"layer_idx": 0, "gate": gate, "backend": backend, "dtype": torch.float64}
    check(DifferentialAttentionV2(EMBED, **heads, **options), gate=gate)


@pytest.mark.parametrize(
    ("options", "plain_options"),
    [
        ({"sub_norm": True, "lambda_init": 0.2}, {"sub_norm": True, "lambda_init": 0.2}),
        ({"qk_norm": True}, {"qk_norm": True}),
        ({"window_size": (3, 0)}, {"window": 4}),
        ({"num_noise_heads": None}, {}),
    ],
    ids=lambda o: next(iter(o), "default"),
)
def test_options_are_the_formula_s(options, plain_options):
    arguments = {"num_heads": 8, "num_noise_heads": 4, "num_kv_heads": 2, "head_dim": D, "layer_idx": 0}
    check(DifferentialAttentionV2(EMBED, **(arguments | options), dtype=torch.float64), **plain_options)


def check(layer, **plain_options):
    randomise(layer)
    x = torch.randn(2, 7, EMBED, dtype=torch.float64)
    ours = layer(x, RotaryEmbedding(D)(torch.arange(7)[None], torch.float64))
    with torch.no_grad():
        plain = torch.stack([plain_v2(layer, row, **plain_options) for row in x])
    assert_agrees(ours, plain, 1e-10)


def test_lambda_projection_starts_without_bias():
    layer = DifferentialAttentionV2(EMBED, num_heads=4, num_kv_heads=2, head_dim=D, layer_idx=0, bias=True)
    names = {name for name, _ in layer.named_parameters()}
    assert "lambda_proj.bias" not in names
    assert "q_proj.bias" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 6, "num_noise_heads": 4}, "num_heads=6 .* num_noise_heads=4"),
        ({"num_heads": 6, "num_noise_heads": 3, "num_kv_heads": 2}, "=3 is not a multiple of the 2 key/value heads"),
        ({"gate": True, "sub_norm": True}, "gate and sub_norm are both on"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {"num_heads": 4, "num_kv_heads": 1, "head_dim": D, "layer_idx": 0}
    with pytest.raises(ValueError, match=message):
        DifferentialAttentionV2(EMBED, **(good | arguments))
