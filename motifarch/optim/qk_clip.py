"""QK-clip: attention logits are kept from growing by shrinking the projections of the heads that
exceed a bound.

After an optimizer step, a head whose largest logit S over the step's data was above tau has its
logits multiplied by gamma = tau / S from then on. Logits are linear in queries and in keys, so this
is done in their projections' rows (and biases):

- a key head that one query head alone uses: both take sqrt(gamma);
- a key head that several query heads use (grouped queries; a group's signal heads on k1; DIFF V2
  and GDA without paired_kv, where signal and noise share one key head): it stays as it is and the
  query head takes gamma, as Kimi K2 does with the rotary key that all of its heads share. Scaling
  such a key would change heads that are below the bound.

So on the same data no head's largest logit is above tau afterwards, a head that was above is
exactly at tau, and every other head computes what it did before. Momenta are left alone.

Source: Kimi Team, Kimi K2, arXiv 2507.20534, section 2.1 (MuonClip).
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from motifarch.layers import SoftmaxAttention
from motifarch.layers.base_attention import BaseAttention
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

    Raises:
        ValueError: tau not above 0, a number of heads that is not the layer's, projections with
            more parameters than a linear layer's (adapters), or a layer that normalises queries and
            keys: there the rows' scale cancels, and the norms bound the logits already.
    """
    _check(layer, max_signal, max_noise, tau)
    signal = _gamma(max_signal, tau, skip)
    key_heads = layer.k_proj.weight.shape[0] // layer.head_dim
    if max_noise is None:
        query, key = _split(signal, key_heads)
    else:
        noise = _gamma(max_noise, tau, skip)
        if layer.paired_kv:
            signal, signal_key = _split(signal, key_heads // 2)
            noise, noise_key = _split(noise, key_heads // 2)
            key = torch.stack([signal_key, noise_key], dim=1).flatten()
        else:
            key = torch.ones(key_heads, device=signal.device)
        # Query heads lie in blocks of a noise head's signal heads and itself.
        query = torch.cat([signal.view(len(noise), -1), noise[:, None]], dim=1).flatten()
    _scale_heads(layer.q_proj, query, layer.head_dim)
    _scale_heads(layer.k_proj, key, layer.head_dim)


def clip_layers(layers: Iterable[BaseAttention], *, tau: float = 100.0, skip: torch.Tensor | None = None) -> None:
    """Clips every layer by what it recorded in `max_logits` since the last call, and clears that.

    All ranks call this together, with their layers in the same order; one all-reduce serves all
    layers. What each rank recorded are the heads that it computes, which tensor and context
    parallelism cut into consecutive parts. `tau` and `skip` are those of `clip_heads`.

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
    part, parts = head_share(layers[0])
    for layer, maxima in zip(layers, gather_max_logits(recorded, part=part, parts=parts), strict=True):
        clip_heads(layer, *maxima, tau=tau, skip=skip)
        layer.max_logits = None  # type: ignore[assignment]


def head_share(layer: BaseAttention) -> tuple[int, int]:
    """Which part of a layer's heads this rank computes attention for, and of how many parts."""
    part, parts = 0, 1
    # Tensor parallelism cuts the heads first, context parallelism each part.
    for group in (layer.tensor_group, layer.context_group):
        if group is not None:
            part, parts = part * group.size() + group.rank(), parts * group.size()
    return part, parts


def gather_max_logits(recorded: Sequence[MaxLogits], *, part: int = 0, parts: int = 1) -> list[MaxLogits]:
    """The largest logits over all ranks, of all heads, from what each rank saw of its own: of each
    layer, consecutive part number ``part`` of ``parts``; -inf for a head that saw no key.
    """
    vectors = [vector for pair in recorded for vector in pair if vector is not None]
    whole = [v.new_full((parts, len(v)), -torch.inf, dtype=torch.float32) for v in vectors]
    for target, vector in zip(whole, vectors, strict=True):
        target[part] = vector.detach()
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


def _split(gamma: torch.Tensor, key_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of query heads and of the key heads that they use."""
    if len(gamma) == key_heads:
        return gamma.sqrt(), gamma.sqrt()
    return gamma, torch.ones(key_heads, device=gamma.device)


def _scale_heads(projection: nn.Linear, factors: torch.Tensor, head_dim: int) -> None:
    """Multiplies each head's rows of weight and bias, where this rank has them."""
    rows = factors.repeat_interleave(head_dim)
    for parameter in projection.parameters():
        local = to_local(parameter)
        if local.numel():
            own = torch.cat([rows[start:stop] for start, stop in local_ranges(parameter)[0]])
            local.mul_(own.view(-1, *[1] * (local.ndim - 1)))


def _check(layer: BaseAttention, max_signal: torch.Tensor, max_noise: torch.Tensor | None, tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    if layer.q_norm is not None:
        raise ValueError(
            f"layer {layer.layer_idx} normalises queries and keys, so that scaling their projections changes nothing; "
            "qk_norm bounds the logits already: use one or the other"
        )
    for name in ("q_proj", "k_proj"):
        projection = layer.get_submodule(name)
        others = sorted({n for n, _ in projection.named_parameters()} - {"weight", "bias"})
        if others or not isinstance(projection, nn.Linear):
            raise ValueError(
                f"layer {layer.layer_idx}'s {name} is a {type(projection).__name__}"
                f"{' with ' + ', '.join(others) if others else ''}; heads are rescaled in the weight and bias of a "
                "linear layer: merge adapters first"
            )
    softmax = isinstance(layer, SoftmaxAttention)
    if softmax != (max_noise is None):
        raise ValueError(
            f"max_noise is {'given' if softmax else 'missing'} for a {type(layer).__name__}; "
            "it belongs to differential attention alone"
        )
    found = len(max_signal) + (0 if max_noise is None else len(max_noise))
    heads = layer.q_proj.weight.shape[0] // layer.head_dim
    if found != heads:
        raise ValueError(
            f"there are maxima of {found} heads, and layer {layer.layer_idx} has {heads}; gather those of all ranks "
            "first (gather_max_logits)"
        )
