"""PolyNorm on the CPU; beside its inputs, three numbers a row are kept for the backward pass.

The derivative. With ``n_k = x^k r_k`` and ``r_k = (mean(x^2k) + eps)^-1/2``, for an incoming
gradient g:

    d/dx [w n_k] = w k x^(k-1) r_k (g - n_k mean(g n_k)),    d/dw = sum(g n_k),    d/db = sum(g)

Formulas have a row in the first dimension. Arrays of one number a row are (3, R) outside, or (4, R)
with the plain sum last, in the order of the weight: x^3, x^2, x.

Weight and bias are (3,) and (1,) for all rows. With ``offsets`` (E,), where the rows of each of E
groups end, they are (E, 3) and (E, 1). Rows past the last offset are of no group: they may hold
anything, and all that comes of them is 0.
"""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.constants import POWER_SCALE
from motif_kernels.impl.cpu.row_formulas import RowFormula
from motif_kernels.reference import compute_dtype, rows_of_groups, to_mxfp8

# Up to here, as in decoding, calls cost more than arithmetic: fewer of them, though each makes a
# tensor.
_FEW_ELEMENTS = 1 << 14


def _clamped(x: Tensor, bound: float | None) -> Tensor:
    """In the compute dtype and within the bounds."""
    x = x.to(compute_dtype(x))
    return x if bound is None else x.clamp(-bound, bound)


def _used(x: Tensor, none: Tensor | None) -> Tensor:
    """Rows, with 0 in those of no group."""
    return x if none is None else x.masked_fill(none[:, None], 0)


def _pass_inside(gradient: Tensor, x: Tensor, bound: float | None) -> Tensor:
    """The gradient of :func:`_clamped`: kept where x was within the bounds."""
    return gradient if bound is None else torch.where(x.abs() <= bound, gradient, 0.0)


def _power_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over columns of x^6, x^4 and x^2, each (R, 1)."""
    x2 = x * x
    x4 = x2 * x2
    return (x4 * x2).sum(-1, keepdim=True), x4.sum(-1, keepdim=True), x2.sum(-1, keepdim=True)


def _product_sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over columns of g x^3, g x^2, g x and g, each (R, 1)."""
    gx = g * x
    gx2 = gx * x
    return (
        (gx2 * x).sum(-1, keepdim=True),
        gx2.sum(-1, keepdim=True),
        gx.sum(-1, keepdim=True),
        g.sum(-1, keepdim=True),
    )


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """r_3, r_2 and r_1 of scaled rows: (R, 3)."""
    means = (
        total / x.shape[-1] + eps * POWER_SCALE**power for total, power in zip(_power_sums(x), (6, 4, 2), strict=True)
    )
    return torch.cat([torch.rsqrt(mean) for mean in means], dim=-1)


def _coefficients(weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w_k r_k, each (R, 1), in r's dtype."""
    c3, c2, c1 = (weight.to(inverse_rms.dtype) * inverse_rms).split(1, dim=-1)
    return c3, c2, c1


def _polynomial(x: Tensor, c3: Tensor, c2: Tensor, c1: Tensor, c0: Tensor) -> Tensor:
    return ((c3 * x + c2) * x + c1) * x + c0


@RowFormula
def _forward(
    x: Tensor,
    up: Tensor | None,
    inverse_rms: Tensor | None,
    group: Tensor | None,
    none: Tensor | None,
    *,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hidden_clamp: float | None,
    out_clamp: float | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    x = _clamped(_used(x, none), hidden_clamp) * POWER_SCALE
    r = _inverse_rms(x, eps) if inverse_rms is None else inverse_rms
    if group is not None:
        weight, bias = weight[group], bias[group]
    y = _polynomial(x, *_coefficients(weight, r), bias.to(x.dtype))
    if up is not None:
        y = y * _clamped(_used(up, none), hidden_clamp)
    return _clamped(y, out_clamp).to(out_dtype), r


@RowFormula
def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    inverse_rms: Tensor,
    mean_products: Tensor | None,
    group: Tensor | None,
    none: Tensor | None,
    *,
    weight: Tensor,
    bias: Tensor,
    hidden_clamp: float | None,
    out_clamp: float | None,
    joined: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype, raw = x.dtype, _used(x, none)
    x = _clamped(raw, hidden_clamp) * POWER_SCALE
    if group is not None:
        weight, bias = weight[group], bias[group]
    r3, r2, r1 = inverse_rms.split(1, dim=-1)
    c3, c2, c1 = _coefficients(weight, inverse_rms)
    g, dup = _used(grad, none).to(x.dtype), None
    if up is not None:
        raw_up = _used(up, none)
        clamped_up = _clamped(raw_up, hidden_clamp)
        y = _polynomial(x, c3, c2, c1, bias.to(x.dtype))
        g = _pass_inside(g, y * clamped_up, out_clamp)
        dup = _pass_inside(g * y, raw_up, hidden_clamp).to(dtype)
        g = g * clamped_up
    sums = None
    if mean_products is not None:
        m3, m2, m1 = mean_products.split(1, dim=-1)
    else:
        g3, g2, g1, g0 = _product_sums(g, x)
        g3, g2, g1 = g3 * r3, g2 * r2, g1 * r1
        sums = torch.cat((g3, g2, g1, g0), dim=-1)
        m3, m2, m1 = g3 / x.shape[-1], g2 / x.shape[-1], g1 / x.shape[-1]
    # With m_k = mean(g n_k). The factor POWER_SCALE undoes the scaling of x.
    x2 = x * x
    direct = g * ((3 * c3 * x + 2 * c2) * x + c1)
    projection = (3 * c3 * r3 * m3 * x2 + 2 * c2 * r2 * m2) * x2 + c1 * r1 * m1
    dx = _pass_inside(POWER_SCALE * (direct - x * projection), raw, hidden_clamp).to(dtype)
    if joined:
        assert dup is not None
        return torch.cat((dx, dup), dim=-1), None, sums
    return dx, dup, sums


@RowFormula
def _sums_of_powers(x: Tensor, *, hidden_clamp: float | None) -> tuple[Tensor]:
    return (torch.cat(_power_sums(_clamped(x, hidden_clamp) * POWER_SCALE), dim=-1),)


@RowFormula
def _sums_of_products(grad: Tensor, x: Tensor, up: Tensor | None, *, hidden_clamp: float | None) -> tuple[Tensor]:
    x = _clamped(x, hidden_clamp) * POWER_SCALE
    g = grad.to(x.dtype)
    return (torch.cat(_product_sums(g if up is None else g * _clamped(up, hidden_clamp), x), dim=-1),)


def _of_rows(numbers: Tensor | None) -> Tensor | None:
    """From (3, R) to (R, 3)."""
    return None if numbers is None else numbers.T


def _groups_of(offsets: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Rows' groups and which are of none, both (R,), if there are groups."""
    return (None, None) if offsets is None else rows_of_groups(offsets, len(x))


def _forward_of_few(
    x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, hidden_clamp: float | None
) -> tuple[Tensor, Tensor]:
    """PolyNorm of a few numbers in the compute dtype, and the inverse root mean squares (3, R)."""
    dtype = compute_dtype(x)
    x, up = x.to(dtype), None if up is None else up.to(dtype)
    if hidden_clamp is not None:
        x, up = x.clamp(-hidden_clamp, hidden_clamp), None if up is None else up.clamp(-hidden_clamp, hidden_clamp)
    x = x * POWER_SCALE
    x2 = x * x
    powers = torch.stack((x2 * x, x2, x), dim=1)  # (R, 3, N)
    scaled_eps = torch.tensor([eps * POWER_SCALE**power for power in (6, 4, 2)], dtype=dtype)
    norms = torch.linalg.vector_norm(powers, dim=-1)
    inverse_rms = torch.addcmul(scaled_eps, norms, norms, value=1 / x.shape[-1]).rsqrt_()
    # No matrix product, which autocast would round.
    coefficients = (inverse_rms * weight.to(dtype))[..., None]
    y = powers.mul_(coefficients).sum(1).add_(bias.to(dtype))
    return y if up is None else y.mul_(up), inverse_rms.T.contiguous()


def forward(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor | None = None,
    *,
    inverse_rms: Tensor | None,
    keep_inverse_rms: bool,
    eps: float,
    hidden_clamp: float | None,
    out_clamp: float | None = None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """PolyNorm of x (R, N), times up if given, and the rows' inverse root mean squares (3, R):
    those given, or if they are to be kept, the rows' own.
    """
    group, none = _groups_of(offsets, x)
    if inverse_rms is None and x.numel() <= _FEW_ELEMENTS:
        if group is not None:
            x, up, weight, bias = _used(x, none), None if up is None else _used(up, none), weight[group], bias[group]
        y, found = _forward_of_few(x, up, weight, bias, eps=eps, hidden_clamp=hidden_clamp)
        return _clamped(y, out_clamp).to(out_dtype), found if keep_inverse_rms else None
    numbers = {"eps": eps, "hidden_clamp": hidden_clamp, "out_clamp": out_clamp, "out_dtype": out_dtype}
    out, r = _forward(x, up, _of_rows(inverse_rms), group, none, weight=weight, bias=bias, **numbers)
    if inverse_rms is not None or not keep_inverse_rms:
        return out, inverse_rms
    return out, r.T.contiguous()


def forward_mxfp8(
    x: Tensor, up: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, **numbers: Any
) -> tuple[Tensor, Tensor]:
    """The result of :func:`forward` in MXFP8 (R, N), and the scales (R, N / 32)."""
    numbers |= {"inverse_rms": None, "keep_inverse_rms": False, "out_dtype": x.dtype}
    return to_mxfp8(forward(x, up, weight, bias, offsets, **numbers)[0])


def backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor | None = None,
    *,
    inverse_rms: Tensor,
    mean_products: Tensor | None,
    hidden_clamp: float | None,
    out_clamp: float | None = None,
    joined: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x and up, and each row's sums of g n_3, g n_2, g n_1 and g, (4, R).

    inverse_rms (3, R) is the forward pass's. With mean_products (3, R), the means of g n_k, given,
    the sums are None. Joined, both gradients are one tensor (R, 2 N), the second is None.
    """
    of_rows = inverse_rms.T, _of_rows(mean_products), *_groups_of(offsets, x)
    numbers = {"hidden_clamp": hidden_clamp, "out_clamp": out_clamp, "joined": joined}
    dx, dup, sums = _backward(grad, x, up, *of_rows, weight=weight, bias=bias, **numbers)
    return dx, dup, None if sums is None else sums.T


def power_sums(x: Tensor, *, hidden_clamp: float | None) -> Tensor:
    """Sums of x's sixth, fourth and second powers (x scaled by POWER_SCALE): (3, R)."""
    (sums,) = _sums_of_powers(x, hidden_clamp=hidden_clamp)
    return sums.T


def product_sums(grad: Tensor, x: Tensor, up: Tensor | None, *, hidden_clamp: float | None) -> Tensor:
    """Sums of g x^3, g x^2, g x and g (x scaled; g = grad, times up if given): (4, R)."""
    (sums,) = _sums_of_products(grad, x, up, hidden_clamp=hidden_clamp)
    return sums.T
