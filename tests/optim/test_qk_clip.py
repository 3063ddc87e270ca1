"""QK-clip: no head above the bound afterwards, every other head untouched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from helpers.distributed import on_ranks
from helpers.qk_clip_ranks import clip_on_ranks
from motif_kernels import diff_attn_func
from motif_kernels.types import AttentionInputs
from motifarch.layers import (
    DifferentialAttention,
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    RotaryEmbedding,
    SoftmaxAttention,
)
from motifarch.layers.base_attention import BaseAttention
from motifarch.optim import clip_heads, clip_layers
from motifarch.optim.qk_clip import gather_max_logits

E, D, S, TAU = 32, 8, 12, 5.0

# name -> layer, signal heads, noise heads, whether a signal head's key is its own, whether a noise
# head's is
LAYERS: dict[str, tuple[Callable[..., BaseAttention], dict[str, int], tuple[bool, bool]]] = {
    "diff_v1, own keys": (DifferentialAttention, {"num_heads": 6, "num_kv_heads": 6}, (True, True)),
    "diff_v1, shared keys": (DifferentialAttention, {"num_heads": 8, "num_kv_heads": 4}, (False, False)),
    "gda 2:1, own noise keys": (
        GroupedDifferentialAttention,
        {"num_heads": 9, "num_noise_heads": 3, "num_kv_heads": 6},
        (False, True),
    ),
    "gda 2:1, shared keys": (
        GroupedDifferentialAttention,
        {"num_heads": 12, "num_noise_heads": 4, "num_kv_heads": 4},
        (False, False),
    ),
    "gda 2:1, one key for both": (
        GroupedDifferentialAttention,
        {"num_heads": 6, "num_noise_heads": 2, "num_kv_heads": 2, "paired_kv": False},
        (False, False),
    ),
    "diff_v2": (DifferentialAttentionV2, {"num_heads": 8, "num_kv_heads": 4}, (False, False)),
    "diff_v2 2:1": (
        DifferentialAttentionV2,
        {"num_heads": 6, "num_noise_heads": 2, "num_kv_heads": 1},
        (False, False),
    ),
    "softmax, own keys": (SoftmaxAttention, {"num_heads": 4, "num_kv_heads": 4}, (True, True)),
    "softmax, shared keys": (SoftmaxAttention, {"num_heads": 4, "num_kv_heads": 2}, (False, False)),
}


def build(name: str, *, bias: bool = False, **options: Any) -> BaseAttention:
    torch.manual_seed(0)
    kind, heads, _ = LAYERS[name]
    layer = kind(E, **heads, head_dim=D, layer_idx=0, bias=bias, backend="reference", **options)
    for projection in (layer.q_proj, layer.k_proj):
        nn.init.normal_(projection.weight)
        if projection.bias is not None:
            nn.init.normal_(projection.bias)
    return layer


def head_order(layer: BaseAttention) -> tuple[list[int], list[int]]:
    """Which query heads are signal, and which noise: the last one of each block."""
    heads = range(layer.q_proj.weight.shape[0] // D)
    if isinstance(layer, SoftmaxAttention):
        return list(heads), []
    block = len(heads) // layer.num_noise_heads  # type: ignore[operator]
    return [h for h in heads if h % block != block - 1], [h for h in heads if h % block == block - 1]


def measure(layer: BaseAttention, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The largest logits of each head, from the attention function itself."""
    seen: list[AttentionInputs] = []
    layer.attention_hook = lambda inputs, batch: seen.append(inputs)
    layer(hidden, RotaryEmbedding(D)(torch.arange(S)[None]))
    layer.attention_hook = None
    _, *maxima = diff_attn_func(*seen[0][:6], causal=True, return_max_logits=True, backend="reference")
    return maxima[0], maxima[1] if len(maxima) > 1 else None


@torch.no_grad()
def set_maxima(layer: BaseAttention, hidden: torch.Tensor) -> None:
    """Scales queries so that on this data every other head is above the bound."""
    for heads, maxima in zip(head_order(layer), measure(layer, hidden), strict=True):
        if maxima is None:
            continue
        for place, head in enumerate(heads):
            target = TAU * (1.3 + place if place % 2 else 0.3 + 0.6 / (1 + place))
            for parameter in (layer.q_proj.weight, layer.q_proj.bias):
                if parameter is not None:
                    parameter[head * D : head * D + D] *= target / maxima[place]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [False, True])
def test_no_head_stays_above_and_no_other_head_changes(name: str, bias: bool) -> None:
    layer = build(name, bias=bias)
    hidden = torch.randn(2, S, E)
    set_maxima(layer, hidden)
    before = measure(layer, hidden)
    queries, keys = layer.q_proj.weight.detach().clone(), layer.k_proj.weight.detach().clone()
    clip_heads(layer, *before, tau=TAU)
    after = measure(layer, hidden)
    for old, new in zip(before, after, strict=True):
        if old is None:
            assert new is None
            continue
        assert (old > TAU).tolist() == [place % 2 == 1 for place in range(len(old))]
        torch.testing.assert_close(new[old > TAU], torch.full_like(new[old > TAU], TAU), rtol=1e-5, atol=0)
        assert torch.equal(new[old <= TAU], old[old <= TAU])

    # Whose keys are shared: those stay, and the queries take it all.
    own_signal, own_noise = LAYERS[name][2]
    changed = [bool((a != b).any()) for a, b in zip(layer.k_proj.weight.split(D), keys.split(D), strict=True)]
    if isinstance(layer, GroupedDifferentialAttention):
        assert any(changed[::2]) == own_signal
        assert any(changed[1::2]) == own_noise
    else:
        assert any(changed) == own_signal
    signal = before[0] > TAU
    high = int(signal.sum()) + (0 if before[1] is None else int((before[1] > TAU).sum()))
    assert (
        sum(bool((a != b).any()) for a, b in zip(layer.q_proj.weight.split(D), queries.split(D), strict=True)) == high
    )


def test_own_keys_share_the_factor_with_their_queries() -> None:
    layer = build("diff_v1, own keys")
    queries, keys = layer.q_proj.weight.detach().clone(), layer.k_proj.weight.detach().clone()
    signal, noise = torch.tensor([1.0, 4 * TAU, 1.0]), torch.tensor([9 * TAU, 1.0, TAU])
    clip_heads(layer, signal, noise, tau=TAU)
    factors = torch.tensor([1.0, 1 / 3, 1 / 2, 1.0, 1.0, 1.0]).repeat_interleave(D)[:, None]
    torch.testing.assert_close(layer.q_proj.weight.detach(), queries * factors)
    torch.testing.assert_close(layer.k_proj.weight.detach(), keys * factors)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), -1e9])
def test_a_maximum_without_meaning_changes_nothing(value: float) -> None:
    layer = build("diff_v2")
    before = layer.q_proj.weight.detach().clone()
    clip_heads(layer, torch.full((4,), value), torch.full((4,), value), tau=TAU)
    assert torch.equal(layer.q_proj.weight, before)


def test_a_skipped_step_clips_nothing() -> None:
    layer = build("diff_v2")
    before = layer.q_proj.weight.detach().clone()
    high = torch.full((4,), 2 * TAU)
    clip_heads(layer, high, high, tau=TAU, skip=torch.tensor(1.0))
    assert torch.equal(layer.q_proj.weight, before)
    clip_heads(layer, high, high, tau=TAU, skip=torch.tensor(0.0))
    torch.testing.assert_close(layer.q_proj.weight.detach(), before / 2)


def test_layers_are_clipped_by_what_they_recorded() -> None:
    layers = [build(name) for name in ("gda 2:1, own noise keys", "softmax, own keys")]
    hidden = torch.randn(2, S, E)
    for layer in layers:
        set_maxima(layer, hidden)
        layer.max_logits = measure(layer, hidden)  # type: ignore[assignment]
    clip_layers(layers, tau=TAU)
    for layer in layers:
        assert max(m.max().item() for m in measure(layer, hidden) if m is not None) <= TAU * (1 + 1e-5)
        assert layer.max_logits is None
    with pytest.raises(ValueError, match="layer 0 has no max_logits; set record_max_logits = True"):
        clip_layers(layers, tau=TAU)
    clip_layers([], tau=TAU)


def test_one_ranks_heads_find_their_places() -> None:
    recorded = [(torch.tensor([1.0, 2.0]), torch.tensor([3.0])), (torch.tensor([4.0]), None)]
    # The second layer's heads are all on each rank.
    (signal, noise), (softmax, none) = gather_max_logits(recorded, [(1, 2), (0, 1)])
    hidden = -float("inf")
    assert signal.tolist() == [hidden, hidden, 1.0, 2.0]
    assert noise is not None
    assert noise.tolist() == [hidden, 3.0]
    assert (softmax.tolist(), none) == ([4.0], None)


def test_what_is_refused() -> None:
    layer = build("diff_v2")
    four = torch.zeros(4)
    with pytest.raises(ValueError, match="there are maxima of 6 heads, and layer 0 has 8"):
        clip_heads(layer, four, torch.zeros(2))
    with pytest.raises(ValueError, match="max_noise is missing for a DifferentialAttentionV2"):
        clip_heads(layer, four)
    with pytest.raises(ValueError, match="max_noise is given for a SoftmaxAttention"):
        clip_heads(build("softmax, own keys"), four, four)
    with pytest.raises(ValueError, match="tau is 0"):
        clip_heads(layer, four, four, tau=0.0)
    with pytest.raises(ValueError, match="qk_norm bounds the logits already"):
        clip_heads(build("diff_v2", qk_norm=True), four, four)
    adapted = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    inject_adapter_in_model(adapted, layer)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"layer 0's k_proj is a Linear with .*lora_A.* merge adapters first"):
        clip_heads(layer, four, four)


def test_sharded_projections() -> None:
    on_ranks(4, clip_on_ranks)
