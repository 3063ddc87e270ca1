"""QK-clip: attention logits are kept from growing by shrinking the projections of the heads that
exceed a bound.

After an optimizer step, a head whose largest logit S over the step's data was above tau has its
logits multiplied by gamma = tau / S from then on. Logits are linear in queries and in keys, so this
is done in their projections' rows (and biases):

- a key head that one query head alone uses: both take sqrt(gamma);
- a key head that several query heads use (grouped queries; a group's signal heads on k1; DIFF V2
  and GDA without paired_kv, where signal and noise share one key head) stays as it is and the query
  head takes gamma; or both take a part, and queries of the group's other heads make up for what the
  key lost (`split`: see `motifarch.optim.qk_clip_split`);
- in latent attention, the rotary key that all heads share stays as it is and the rotated part of a
  query takes gamma; the rest of both is as above. Latents and values are left alone.

So on the same data no head's largest logit is above tau afterwards, a head that was above is
exactly at tau, and every other head computes what it did before: to the bit, unless a key that it
shares was scaled. Momenta are left alone.

Source: Kimi Team, Kimi K2, arXiv 2507.20534, section 2.1 (MuonClip).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from motifarch.layers import GroupedDifferentialLatentAttention
from motifarch.layers.base_attention import BaseAttention
from motifarch.optim.qk_clip_split import Split, split_gamma
from motifarch.shards import local_ranges, to_local

MaxLogits = tuple[torch.Tensor, torch.Tensor | None]
"""Largest logit of each signal head (Hs,) and noise head (Hn,), float32; None without noise."""


@torch.no_grad()
def clip_heads(
    layer: BaseAttention,
    max_signal: torch.Tensor,
    max_noise: torch.Tensor | None = None,
    *,
    tau: float = 100.0,
    skip: torch.Tensor | None = None,
    split: Split | None = None,
) -> None:
    """Rescales query and key projections of a layer's heads whose logits were above tau, in place
    and on the device.

    Args:
        layer: an attention layer; its projections may be sharded in any way.
        max_signal: (Hs,) largest logit of each of the layer's signal heads, those of other ranks
            included (see `gather_max_logits`), as `diff_attn_func(..., return_max_logits=True)`
            gives it. One that is not finite changes nothing.
        max_noise: (Hn,) the same for noise heads; None for softmax attention.
        tau: the bound.
        skip: a scalar on the device; where it is not 0, nothing is changed.
        split: what a key head that several query heads share takes of their factors: "query" for
            nothing, "asymmetric" for 1 / (1 + sqrt(heads)) of the exponent; by default the latter
            in latent attention, as Motif-3 was trained, and nothing elsewhere.

    Raises:
        ValueError: tau not above 0, an unknown split, a number of heads that is not the layer's,
            projections with more parameters than a linear layer's (adapters), or a layer that
            normalises queries and keys: there the rows' scale cancels, and the norms bound the
            logits already.
    """
    rows = _rows_of(layer)
    query_proj, key_proj = _projection(layer, rows.query), _projection(layer, rows.key)
    _check(layer, query_proj.weight.shape[0] // layer.head_dim, max_signal, max_noise, tau)
    key_heads = key_proj.weight.shape[0] // (rows.plain + rows.value)
    split = split or ("asymmetric" if rows.rotated else "query")
    signal = _gamma(max_signal, tau, skip)
    noise = None if max_noise is None else _gamma(max_noise, tau, skip)
    gamma = _in_blocks(signal, noise)
    if noise is not None and layer.paired_kv:
        signal, signal_key = split_gamma(signal, key_heads // 2, split)
        noise, noise_key = split_gamma(noise, key_heads // 2, split)
        query, key = _in_blocks(signal, noise), torch.stack([signal_key, noise_key], dim=1).flatten()
    else:
        query, key = split_gamma(gamma, key_heads, split)
    _scale_rows(query_proj, (query, rows.plain), (gamma, rows.rotated))
    _scale_rows(key_proj, (key, rows.plain), (torch.ones_like(key), rows.value))


def clip_layers(
    layers: Iterable[BaseAttention],
    *,
    tau: float = 100.0,
    skip: torch.Tensor | None = None,
    split: Split | None = None,
) -> None:
    """Clips every layer by what it recorded in `max_logits` since the last call, and clears that.

    All ranks call this together, with their layers in the same order; one all-reduce serves all
    layers. What each rank recorded are the heads that it computes, which tensor parallelism, and
    context parallelism where there is no window, cut into consecutive parts. `tau`, `skip` and
    `split` are those of `clip_heads`.

    Raises:
        ValueError: a layer has recorded nothing, and what `clip_heads` raises.
    """
    layers = list(layers)
    recorded: list[MaxLogits] = []
    for layer in layers:
        maxima: MaxLogits | None = getattr(layer, "max_logits", None)
        if maxima is None:
            raise ValueError(
                f"layer {layer.layer_idx} has no max_logits; set record_max_logits = True on it before the forward pass"
            )
        recorded.append(maxima)
    if not layers:
        return
    shares = [head_share(layer) for layer in layers]
    for layer, maxima in zip(layers, gather_max_logits(recorded, shares), strict=True):
        clip_heads(layer, *maxima, tau=tau, skip=skip, split=split)
        layer.max_logits = None  # type: ignore[assignment]


def head_share(layer: BaseAttention) -> tuple[int, int]:
    """Which part of a layer's heads this rank computes attention for, and of how many parts."""
    part, parts = 0, 1
    # Tensor parallelism cuts the heads first, context parallelism each part.
    for group in (layer.tensor_group, layer.head_group):
        if group is not None:
            part, parts = part * group.size() + group.rank(), parts * group.size()
    return part, parts


def gather_max_logits(recorded: Sequence[MaxLogits], shares: Sequence[tuple[int, int]]) -> list[MaxLogits]:
    """The largest logits over all ranks, of all heads, from what each rank saw of its own: of each
    layer the share (`head_share`) consecutive part p of n; -inf for a head that saw no key.
    """
    whole = []
    for pair, (part, parts) in zip(recorded, shares, strict=True):
        for vector in pair:
            if vector is not None:
                whole.append(vector.new_full((parts, len(vector)), -torch.inf, dtype=torch.float32))
                whole[-1][part] = vector.detach()
    flat = torch.cat([target.flatten() for target in whole])
    if dist.is_initialized():
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    found = iter(flat.split([target.numel() for target in whole]))
    return [(next(found), None if noise is None else next(found)) for _, noise in recorded]


def _gamma(maxima: torch.Tensor, tau: float, skip: torch.Tensor | None) -> torch.Tensor:
    """What each head's logits are multiplied by: exactly 1 for those that stay."""
    maxima = maxima.float()
    high = (maxima > tau) & torch.isfinite(maxima)
    if skip is not None:
        high = high & (skip == 0)
    return torch.where(high, tau / maxima, 1.0)


def _in_blocks(signal: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Signal and noise heads in blocks of a noise head's signal heads and itself."""
    return signal if noise is None else torch.cat([signal.view(len(noise), -1), noise[:, None]], dim=1).flatten()


def _scale_rows(projection: nn.Linear, *parts: tuple[torch.Tensor, int]) -> None:
    """Multiplies each head's rows of weight and bias, where this rank has them: those of each part
    by a factor for each head and the part's number of rows.
    """
    rows = torch.cat([factors[:, None].expand(-1, count) for factors, count in parts], dim=1).flatten()
    for parameter in projection.parameters():
        local = to_local(parameter)
        if local.numel():
            own = torch.cat([rows[start:stop] for start, stop in local_ranges(parameter)[0]])
            local.mul_(own.view(-1, *[1] * (local.ndim - 1)))


class _Rows(NamedTuple):
    """Which projections make a layer's queries and keys, and what rows they have for each head."""

    query: str
    key: str
    plain: int
    """Of a query and of its key: those that are scaled in both."""
    rotated: int = 0
    """Of a query, below: their keys are all heads' in common."""
    value: int = 0
    """Of a value, below the key's."""


def _rows_of(layer: BaseAttention) -> _Rows:
    if isinstance(layer, GroupedDifferentialLatentAttention):
        rotated = layer.qk_rope_head_dim
        return _Rows("wq_b", "wkv_b", layer.head_dim - rotated, rotated, layer.v_head_dim)
    if getattr(layer, "q_norm", None) is not None:
        raise ValueError(
            f"layer {layer.layer_idx} normalises queries and keys, so that scaling their projections changes nothing; "
            "qk_norm bounds the logits already: use one or the other"
        )
    return _Rows("q_proj", "k_proj", layer.head_dim)


def _projection(layer: BaseAttention, name: str) -> nn.Linear:
    projection = layer.get_submodule(name)
    others = sorted({n for n, _ in projection.named_parameters()} - {"weight", "bias"})
    if others or not isinstance(projection, nn.Linear):
        raise ValueError(
            f"layer {layer.layer_idx}'s {name} is a {type(projection).__name__}"
            f"{' with ' + ', '.join(others) if others else ''}; heads are rescaled in the weight and bias of a "
            "linear layer: merge adapters first"
        )
    return projection


def _check(
    layer: BaseAttention, heads: int, max_signal: torch.Tensor, max_noise: torch.Tensor | None, tau: float
) -> None:
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    softmax = layer.num_noise_heads == 0
    if softmax != (max_noise is None):
        raise ValueError(
            f"max_noise is {'given' if softmax else 'missing'} for a {type(layer).__name__}; "
            "it belongs to differential attention alone"
        )
    found = len(max_signal) + (0 if max_noise is None else len(max_noise))
    if found != heads:
        raise ValueError(
            f"there are maxima of {found} heads, and layer {layer.layer_idx} has {heads}; gather those of all ranks "
            "first (gather_max_logits)"
        )
