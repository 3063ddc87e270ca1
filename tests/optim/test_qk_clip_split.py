"""QK-clip where several query heads share a key head: who takes how much of the factor, in latent
attention and elsewhere, and what becomes of the key in the long run.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from motif_kernels import diff_attn_func
from motif_kernels.types import AttentionInputs
from motifarch.layers import (
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    GroupedDifferentialLatentAttention,
    RotaryEmbedding,
    SoftmaxAttention,
)
from motifarch.layers.base_attention import BaseAttention
from motifarch.optim import clip_heads
from motifarch.optim.qk_clip_split import Split

E, S, TAU, RANK = 32, 12, 5.0, 16
PLAIN, ROTATED, VALUE = 8, 4, 6

latent = partial(
    GroupedDifferentialLatentAttention,
    head_dim=PLAIN + ROTATED,
    qk_rope_head_dim=ROTATED,
    v_head_dim=VALUE,
    q_lora_rank=RANK,
    kv_lora_rank=RANK,
)
grouped = {"head_dim": PLAIN}
# name -> layer, query heads on a key head
LATENT: dict[str, tuple[Callable[..., BaseAttention], int]] = {
    "gdla 4:1": (partial(latent, num_heads=10, ratio=4), 5),
    "gdla 1:1, a key for two groups": (partial(latent, num_heads=8, ratio=1, num_kv_heads=2), 4),
    "mla": (partial(latent, num_heads=4, num_noise_heads=0), 1),
    "mla, grouped": (partial(latent, num_heads=4, num_noise_heads=0, num_kv_heads=2), 2),
}
GROUPED: dict[str, tuple[Callable[..., BaseAttention], int]] = {
    "softmax": (partial(SoftmaxAttention, num_heads=10, num_kv_heads=2, **grouped), 5),
    "diff_v2": (partial(DifferentialAttentionV2, num_heads=10, ratio=4, **grouped), 5),
    "gda": (partial(GroupedDifferentialAttention, num_heads=10, ratio=4, **grouped), 4),
}


def build(kind: Callable[..., BaseAttention]) -> BaseAttention:
    torch.manual_seed(0)
    layer = kind(E, layer_idx=0, backend="reference")
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=E**-0.5)
    return layer


def measure(layer: BaseAttention, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The largest logits of each head, from the attention function itself."""
    seen: list[AttentionInputs] = []
    layer.attention_hook = lambda inputs, batch: seen.append(inputs)
    width = ROTATED if isinstance(layer, GroupedDifferentialLatentAttention) else layer.head_dim
    layer(hidden, RotaryEmbedding(width)(torch.arange(S)[None]))
    layer.attention_hook = None
    _, *maxima = diff_attn_func(*seen[0][:6], causal=True, return_max_logits=True, backend="reference")
    return maxima[0], maxima[1] if len(maxima) > 1 else None


def by_query_head(layer: BaseAttention, maxima: tuple[Tensor, Tensor | None]) -> Tensor:
    signal, noise = maxima
    return signal if noise is None else torch.cat([signal.view(len(noise), -1), noise[:, None]], 1).flatten()


def queries_and_keys(layer: BaseAttention) -> tuple[Tensor, Tensor]:
    """Views (heads, rows, columns) of both projections' weights."""
    names = ("wq_b", "wkv_b") if isinstance(layer, GroupedDifferentialLatentAttention) else ("q_proj", "k_proj")
    query, key = (layer.get_parameter(f"{name}.weight").detach() for name in names)
    return query.unflatten(0, (layer.num_heads, -1)), key.unflatten(0, (layer.num_kv_heads, -1))


def scale_to(layer: BaseAttention, hidden: Tensor, targets: Tensor) -> None:
    query, _ = queries_and_keys(layer)
    query *= (targets / by_query_head(layer, measure(layer, hidden)))[:, None, None]


@pytest.mark.parametrize("split", ["query", "symmetric", "asymmetric"])
@pytest.mark.parametrize("name", LATENT | GROUPED)
def test_heads_above_land_on_the_bound_and_others_stay(name: str, split: Split) -> None:
    kind, _ = (LATENT | GROUPED)[name]
    layer = build(kind)
    hidden = torch.randn(2, S, E)
    # In each group heads above the bound, more or less, and below it; in the last group none.
    targets = TAU * torch.linspace(0.5, 4, layer.num_heads).roll(1)
    group = layer.num_heads // 2
    targets[group:] = targets[group:].clamp(max=0.9 * TAU)
    scale_to(layer, hidden, targets)
    before = measure(layer, hidden)
    clip_heads(layer, *before, tau=TAU, split=split)
    after = by_query_head(layer, measure(layer, hidden))
    torch.testing.assert_close(after, targets.clamp(max=TAU), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LATENT)
def test_who_takes_what_in_latent_attention(name: str) -> None:
    kind, group = LATENT[name]
    layer = build(kind)
    torch.manual_seed(1)
    signal_heads = layer.num_heads - layer.num_noise_heads
    maxima = torch.rand(signal_heads) * 4 * TAU, torch.rand(layer.num_noise_heads) * 4 * TAU
    given = maxima if layer.num_noise_heads else (maxima[0], None)
    gamma = (TAU / by_query_head(layer, given)).clamp(max=1)
    query, key = (weight.clone() for weight in queries_and_keys(layer))
    untouched = {n: p.clone() for n, p in layer.named_parameters() if n not in ("wq_b.weight", "wkv_b.weight")}
    clip_heads(layer, *given, tau=TAU)
    smallest = gamma.view(-1, group).amin(1)
    key_factor = smallest ** (1 / (1 + group**0.5))
    query_factor = gamma / key_factor.repeat_interleave(group)
    new_query, new_key = queries_and_keys(layer)
    torch.testing.assert_close(new_query[:, :PLAIN], query[:, :PLAIN] * query_factor[:, None, None])
    torch.testing.assert_close(new_query[:, PLAIN:], query[:, PLAIN:] * gamma[:, None, None])
    torch.testing.assert_close(new_key[:, :PLAIN], key[:, :PLAIN] * key_factor[:, None, None])
    assert torch.equal(new_key[:, PLAIN:], key[:, PLAIN:])
    # The head that was highest takes what is published: gamma^(1 - r).
    lowest = gamma.view(-1, group).argmin(1) + group * torch.arange(len(smallest))
    torch.testing.assert_close(query_factor[lowest], smallest ** (1 - 1 / (1 + group**0.5)))
    for other, start in untouched.items():
        assert torch.equal(layer.get_parameter(other), start)


def test_groups_below_the_bound_stay_to_the_bit() -> None:
    layer = build(LATENT["gdla 4:1"][0])
    query, key = (weight.clone() for weight in queries_and_keys(layer))
    clip_heads(layer, torch.tensor([1, 1, 1, 9, 1, 1, 1, 1.0]), torch.ones(2), tau=TAU)
    new_query, new_key = queries_and_keys(layer)
    assert torch.equal(new_query[5:], query[5:])
    assert torch.equal(new_key[1:], key[1:])
    assert not torch.equal(new_key[0], key[0])
    clip_heads(layer, torch.full((8,), 9.0), torch.ones(2), tau=TAU, skip=torch.tensor(1.0))
    assert torch.equal(queries_and_keys(layer)[0], new_query)


@pytest.mark.parametrize(
    "name", ["gdla 4:1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("softmax", "diff_v2"))]
)
def test_shared_keys_live_through_a_thousand_clips(name: str) -> None:
    """A key grows by 5 % a step, and a query by an exponential chance of that mean; the largest
    logit is the product of both norms. Halves of the factor drive keys to nothing.
    """
    shrunk = {}
    for split in ("asymmetric", "symmetric"):
        layer = build((LATENT | GROUPED)[name][0])
        query, key = (weight[:, :PLAIN] for weight in queries_and_keys(layer))
        group = layer.num_heads // layer.num_kv_heads

        def largest(query: Tensor = query, key: Tensor = key, group: int = group) -> Tensor:
            return query.norm(dim=(1, 2)) * key.norm(dim=(1, 2)).repeat_interleave(group)

        query *= (TAU / largest())[:, None, None]
        start = key.norm(dim=(1, 2))
        torch.manual_seed(2)
        for _ in range(1000):
            key *= 1 + 0.05
            query *= (0.05 * torch.empty(layer.num_heads).exponential_()).exp()[:, None, None]
            seen = largest()
            assert (seen > TAU).all()
            if layer.num_noise_heads:
                blocks = seen.view(layer.num_noise_heads, -1)
                clip_heads(layer, blocks[:, :-1].flatten(), blocks[:, -1], tau=TAU, split=split)
            else:
                clip_heads(layer, seen, tau=TAU, split=split)
        torch.testing.assert_close(largest(), torch.full_like(seen, TAU), rtol=1e-3, atol=0)
        shrunk[split] = key.norm(dim=(1, 2)) / start
    assert ((shrunk["asymmetric"] > 0.05) & (shrunk["asymmetric"] < 20)).all()
    assert (shrunk["symmetric"] < 1e-9).all()


def test_an_unknown_split_is_refused() -> None:
    layer = build(GROUPED["softmax"][0])
    with pytest.raises(ValueError, match="split is 'half'; accepted are query, symmetric, asymmetric"):
        clip_heads(layer, torch.zeros(10), split="half")  # type: ignore[arg-type]
