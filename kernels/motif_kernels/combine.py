"""The epilogue of differential attention, for the outputs of any attention library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from motif_kernels import ops, reference
from motif_kernels.checks import check_devices, check_epilogue
from motif_kernels.ops import combine as operator


def diff_combine(
    o_signal: Tensor,
    o_noise: Tensor,
    lam: Tensor | float,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """``out_scale * RMSNorm(o_signal - lam * o_noise)``, or with a sigmoid gate, or with neither.

    Signal head h is paired with noise head ``h // (Hs / Hn)``. The difference is formed in float32
    (float64 for float64 inputs) and rounded once, at the end. Source: Differential Transformer,
    arXiv 2410.05258, equations 1 and 3.

    Args:
        o_signal: (..., Hs, Dv), usually (B, S, Hs, Dv), or (total, Hs, Dv) for packed documents.
        o_noise: (..., Hn, Dv); Hs must be a multiple of Hn.
        lam: a float, or a tensor of shape (), (Hs,) or (..., Hs).
        norm_weight: (Dv,): RMS-normalise each head's output and multiply by this weight, shared by
            all heads.
        norm_eps: added to the mean square.
        out_scale: always multiplies the result.
        gate: like o_signal: multiply by ``sigmoid(gate)``. Not together with norm_weight.

    Returns:
        Tensor of o_signal's shape and dtype (float32 with the sub-norm under autocast on CUDA, as
        PyTorch's own norms).

    Raises:
        ValueError: shapes or devices that do not fit, or gate together with norm_weight.
    """
    check_devices(o_signal=o_signal, o_noise=o_noise, lam=lam, norm_weight=norm_weight, gate=gate)
    check_epilogue(
        o_signal.shape[:-2], o_signal.shape[-2], o_noise.shape[-2], o_signal.shape[-1], lam, norm_weight, gate
    )
    if o_noise.shape[:-2] != o_signal.shape[:-2] or o_noise.shape[-1] != o_signal.shape[-1]:
        raise ValueError(
            f"diff_combine: o_noise has shape {tuple(o_noise.shape)} and o_signal {tuple(o_signal.shape)}; "
            "all but the number of heads must be equal"
        )
    return combine(o_signal, o_noise, lam, norm_weight=norm_weight, norm_eps=norm_eps, out_scale=out_scale, gate=gate)


def combine(
    o_signal: Tensor | Sequence[Tensor],
    o_noise: Tensor | Sequence[Tensor] | None,
    lam: Tensor | float | None,
    *,
    norm_weight: Tensor | None,
    norm_eps: float,
    out_scale: float,
    gate: Tensor | None,
) -> Tensor:
    """:func:`diff_combine` of arguments that were checked; without noise, softmax attention's
    epilogue, in plain PyTorch.

    Outputs may be in pieces, along their width. Two equal ones are read where they are.
    """
    signals, noises = ([t] if isinstance(t, Tensor) else list(t or ()) for t in (o_signal, o_noise))
    fused = len(noises) > 0 and lam is not None and ops.has_implementation(signals[0].device)
    if not (fused and _are_halves(signals, noises)):
        signals, noises = ([torch.cat(t, dim=-1)] if len(t) > 1 else t for t in (signals, noises))
    first = signals[0]
    if not fused or lam is None:
        noise = noises[0] if noises else None
        out = reference.diff_combine(
            first, noise, lam, norm_weight=norm_weight, norm_eps=norm_eps, out_scale=out_scale, gate=gate
        )
        return out.to(first.dtype)
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=reference.compute_dtype(first), device=first.device)
    # Without a sub-norm it is elementwise arithmetic, which autocast leaves in the inputs' dtype.
    out_dtype = ops.result_dtype(first) if norm_weight is not None else first.dtype
    (signal, *signal_rest), (noise, *noise_rest) = ([_tokens(t) for t in pieces] for pieces in (signals, noises))
    out = operator.diff_combine(
        signal,
        noise,
        lam.flatten(0, -2) if lam.ndim > 1 else lam,
        norm_weight,
        _tokens(gate) if gate is not None else None,
        norm_eps,
        out_scale,
        out_dtype,
        signal_rest[0] if signal_rest else None,
        noise_rest[0] if noise_rest else None,
    )
    return out.view(*first.shape[:-1], out.shape[-1])


def _tokens(x: Tensor) -> Tensor:
    """X (..., H, Dv) as (T, H, Dv)."""
    return x.unsqueeze(0).flatten(0, -3)


def _are_halves(signals: Sequence[Tensor], noises: Sequence[Tensor]) -> bool:
    """Whether both maps' outputs are in two pieces of one width."""
    return len(signals) == len(noises) == 2 and len({t.shape[-1] for t in (*signals, *noises)}) == 1
