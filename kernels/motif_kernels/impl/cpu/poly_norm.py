"""PolyNorm on the CPU, a cache-sized block of rows at a time.

PyTorch's eager formula reads and writes main memory a dozen times and keeps half a dozen
intermediates alive for the backward pass. Here each block of rows is brought into cache once, and
beside the inputs nothing but three numbers a row is saved.

The derivative. With ``n_k = x^k r_k`` and ``r_k = (mean(x^2k) + eps)^-1/2``, for an incoming
gradient g:

    d/dx [w n_k] = w k x^(k-1) r_k (g - n_k mean(g n_k)),    d/dw = sum(g n_k),    d/db = sum(g)

Arrays of one number a row are (3, R), or (4, R) with the plain sum last, in the order of the
weight: x^3, x^2, x.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from motif_kernels.impl.constants import POWER_SCALE
from motif_kernels.reference import compute_dtype

# Elements in a block of rows, for each thread: the six float32 buffers of the backward pass take 3
# MiB. Measured with two threads and 2 MiB of second-level cache a core, half and double are level
# with this on an idle machine; smaller blocks lose to the overhead of an operator call, and on a
# busy machine to waiting for the other thread after each.
_BLOCK_ELEMENTS = 1 << 17

# Up to here, as in decoding, calls cost more than arithmetic: fewer of them, though each makes a
# tensor.
_FEW_ELEMENTS = 1 << 14


class _Buffers:
    """Room for one block of rows, reused from block to block."""

    def __init__(self, x: Tensor, hidden_clamp: float | None):
        self.dtype = compute_dtype(x)
        self.hidden_clamp = hidden_clamp
        self.step = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // max(1, x.shape[-1]))
        self._store: dict[str, Tensor] = {}
        self._shape = (min(self.step, len(x)), x.shape[-1])

    def blocks(self, rows: int) -> Iterator[slice]:
        """The blocks that make up so many rows."""
        return (slice(start, min(start + self.step, rows)) for start in range(0, rows, self.step))

    def get(self, name: str, rows: int) -> Tensor:
        """The buffer of that name (rows, N), made on first use."""
        if name not in self._store:
            self._store[name] = torch.empty(self._shape, dtype=self.dtype)
        return self._store[name][:rows]

    def convert(self, name: str, source: Tensor) -> Tensor:
        """``source`` in the compute dtype: itself, or a copy in the buffer of that name."""
        return source if source.dtype == self.dtype else self.get(name, len(source)).copy_(source)

    def clamped(self, name: str, source: Tensor) -> Tensor:
        """``source`` in the compute dtype and within the hidden clamp."""
        converted = self.convert(name, source)
        if self.hidden_clamp is None:
            return converted
        return torch.clamp(converted, -self.hidden_clamp, self.hidden_clamp, out=self.get(name, len(source)))

    def powers(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, x^2 and x^3 of a block, with x scaled by POWER_SCALE."""
        rows = len(source)
        x = torch.mul(self.clamped("x", source), POWER_SCALE, out=self.get("x", rows))
        x2 = torch.mul(x, x, out=self.get("x2", rows))
        return x, x2, torch.mul(x2, x, out=self.get("x3", rows))


def _mean_squares(x: Tensor, x2: Tensor, x3: Tensor, work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # torch's mean adds in a tree; a vector norm would save a pass but loses three bits on rows of
    # 65,536.
    return (
        torch.mul(x3, x3, out=work).mean(-1, keepdim=True),
        torch.mul(x2, x2, out=work).mean(-1, keepdim=True),
        x2.mean(-1, keepdim=True),
    )


def _inverse_rms(
    given: Tensor | None, rows: slice, powers: tuple[Tensor, Tensor, Tensor], work: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """r_3, r_2 and r_1 of a block (R, 1): given, or from its rows."""
    if given is not None:
        return tuple(given[:, rows].unsqueeze(-1))
    squares = _mean_squares(*powers, work)
    return tuple(m.add_(eps * POWER_SCALE**power).rsqrt_() for m, power in zip(squares, (6, 4, 2), strict=True))


def _horner(x: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, out: Tensor) -> Tensor:
    """``(c2 x + c1) x + c0``, coefficients (R, 1); addcmul takes one broadcast argument."""
    torch.mul(x, c2, out=out)
    return torch.addcmul(c0, out.add_(c1), x, out=out)


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
    powers = torch.stack((x2 * x, x2, x))
    scaled_eps = torch.tensor([eps * POWER_SCALE**power for power in (6, 4, 2)], dtype=dtype).view(3, 1, 1)
    inverse_rms = powers.square().mean(-1, keepdim=True).add_(scaled_eps).rsqrt_()
    y = powers.mul_(inverse_rms * weight.to(dtype).view(3, 1, 1)).sum(0).add_(bias.to(dtype))
    return y if up is None else y.mul_(up), inverse_rms.squeeze(-1)


def forward(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    inverse_rms: Tensor | None,
    keep_inverse_rms: bool,
    eps: float,
    hidden_clamp: float | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """PolyNorm of x (R, N), times up if given, and the rows' inverse root mean squares (3, R):
    those given, or if they are to be kept, the rows' own.
    """
    if inverse_rms is None and x.numel() <= _FEW_ELEMENTS:
        y, found = _forward_of_few(x, up, weight, bias, eps=eps, hidden_clamp=hidden_clamp)
        return y.to(out_dtype), found if keep_inverse_rms else None
    out = torch.empty(x.shape, dtype=out_dtype)
    buffers = _Buffers(x, hidden_clamp)
    kept = torch.empty(3, len(x), dtype=buffers.dtype) if keep_inverse_rms and inverse_rms is None else None
    w, b = weight.to(buffers.dtype), bias.to(buffers.dtype)
    for rows in buffers.blocks(len(x)):
        powers = buffers.powers(x[rows])
        work = buffers.get("work", len(powers[0]))
        r3, r2, r1 = moments = _inverse_rms(inverse_rms, rows, powers, work, eps)
        if kept is not None:
            torch.cat(moments, dim=1, out=kept.t()[rows])
        y = _horner(powers[0], w[2] * r1, w[1] * r2, w[0] * r3, out=work)
        if up is None:
            torch.addcmul(b, y, powers[0], out=out[rows])
        else:
            torch.mul(torch.addcmul(b, y, powers[0], out=y), buffers.clamped("up", up[rows]), out=out[rows])
    return out, inverse_rms if kept is None else kept


def backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    inverse_rms: Tensor,
    mean_products: Tensor | None,
    hidden_clamp: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x and up, and each row's sums of g n_3, g n_2, g n_1 and g, (4, R).

    inverse_rms (3, R) is the forward pass's. With mean_products (3, R), the means of g n_k, given,
    the sums are None.
    """
    buffers = _Buffers(x, hidden_clamp)
    w, b = weight.to(buffers.dtype), bias.to(buffers.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dup = torch.empty(up.shape, dtype=up.dtype) if up is not None else None
    sums = torch.empty(4, len(x), dtype=buffers.dtype) if mean_products is None else None
    for rows in buffers.blocks(len(x)):
        powers = buffers.powers(x[rows])
        x_, x2, x3 = powers
        work = buffers.get("work", len(x_))
        g = buffers.convert("grad", grad[rows])
        r3, r2, r1 = inverse_rms[:, rows].unsqueeze(-1)
        c3, c2, c1 = w[0] * r3, w[1] * r2, w[2] * r1
        if up is not None and dup is not None:
            y = torch.addcmul(b, _horner(x_, c1, c2, c3, out=work), x_, out=work)
            torch.mul(y, g, out=dup[rows])
            g = torch.mul(g, buffers.clamped("up", up[rows]), out=buffers.get("grad", len(x_)))
        if mean_products is not None:
            m3, m2, m1 = mean_products[:, rows].unsqueeze(-1)
        else:
            assert sums is not None
            block_sums = _product_sums(g, powers, work) * torch.stack((r3, r2, r1, torch.ones_like(r1)))
            sums[:, rows] = block_sums.squeeze(-1)
            m3, m2, m1 = block_sums[:3] / x.shape[1]
        # dx = g (3 c3 x^2 + 2 c2 x + c1) - x (3 c3 r3 m3 x^4 + 2 c2 r2 m2 x^2 + c1 r1 m1), with m_k
        # = mean(g n_k). The factor POWER_SCALE undoes the scaling of x.
        c3, c2, c1 = 3 * POWER_SCALE * c3, 2 * POWER_SCALE * c2, POWER_SCALE * c1
        _horner(x_, c1, c2, c3, out=work).mul_(g)
        projection = _horner(x2, c1 * r1 * m1, c2 * r2 * m2, c3 * r3 * m3, out=x3)
        torch.addcmul(work, projection, x_, value=-1, out=dx[rows])
        if hidden_clamp is not None:
            dx[rows].masked_fill_(x[rows].abs() > hidden_clamp, 0.0)
            if up is not None and dup is not None:
                dup[rows].masked_fill_(up[rows].abs() > hidden_clamp, 0.0)
    return dx, dup, sums


def _product_sums(g: Tensor, powers: tuple[Tensor, Tensor, Tensor], work: Tensor) -> Tensor:
    """Sums over columns of g x^3, g x^2, g x and g for a block: (4, R, 1)."""
    x, x2, x3 = powers
    return torch.stack(
        [torch.mul(g, power, out=work).sum(-1, keepdim=True) for power in (x3, x2, x)] + [g.sum(-1, keepdim=True)]
    )


def power_sums(x: Tensor, *, hidden_clamp: float | None) -> Tensor:
    """Sums of x's sixth, fourth and second powers (x scaled by POWER_SCALE): (3, R)."""
    buffers = _Buffers(x, hidden_clamp)
    sums = torch.empty(3, len(x), dtype=buffers.dtype)
    for rows in buffers.blocks(len(x)):
        powers = buffers.powers(x[rows])
        squares = _mean_squares(*powers, buffers.get("work", len(powers[0])))
        sums[:, rows] = torch.stack(squares).squeeze(-1).mul_(x.shape[1])
    return sums


def product_sums(grad: Tensor, x: Tensor, up: Tensor | None, *, hidden_clamp: float | None) -> Tensor:
    """Sums of g x^3, g x^2, g x and g (x scaled; g = grad, times up if given): (4, R)."""
    buffers = _Buffers(x, hidden_clamp)
    sums = torch.empty(4, len(x), dtype=buffers.dtype)
    for rows in buffers.blocks(len(x)):
        powers = buffers.powers(x[rows])
        g = buffers.convert("grad", grad[rows])
        if up is not None:
            g = torch.mul(g, buffers.clamped("up", up[rows]), out=buffers.get("grad", len(g)))
        sums[:, rows] = _product_sums(g, powers, buffers.get("work", len(g))).squeeze(-1)
    return sums
