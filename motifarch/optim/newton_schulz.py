"""Orthogonalisation of matrices by Newton-Schulz steps: products only, so it runs at a matrix
unit's speed.

Muon's update is the orthogonal factor U V^T of the momentum U S V^T. An odd quintic, applied to the
matrix again and again, drives every singular value towards 1 without a decomposition.
"""

from collections.abc import Sequence

import torch

Coefficients = Sequence[tuple[float, float, float]]
"""(a, b, c) of each step's quintic a x + b x^3 + c x^5."""

NS_COEFFICIENTS: dict[str, Coefficients] = {
    # A quintic for each step, each the best for the interval that those before it leave: Motif's
    # set, by the method of Polar Express (Amsel et al., arXiv 2505.16932).
    "polar_express": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # As steep at 0 as one can be: singular values end between 0.7 and 1.2 (Jordan et al., 2024).
    "keller_jordan": ((3.4445, -4.7750, 2.0315),) * 5,
}


def newton_schulz(
    matrices: torch.Tensor,
    coefficients: Coefficients = NS_COEFFICIENTS["polar_express"],
    *,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
) -> torch.Tensor:
    """Brings the singular values of each matrix near to 1, keeping its singular vectors.

    Args:
        matrices: (..., rows, columns) of any real dtype; left as they are.
        coefficients: one triple a step, in order.
        dtype: what is multiplied in. bfloat16's rounding leaves about 1e-2 of noise in each entry's
            relative size.
        eps: smallest norm to divide by: a matrix of zeros stays one.

    Returns:
        A tensor of the same shape, in `dtype`.

    Raises:
        ValueError: fewer than two dimensions.

    Source: Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/.
    """
    if matrices.ndim < 2:
        raise ValueError(f"matrices has the shape {tuple(matrices.shape)}; Newton-Schulz needs (..., rows, columns)")
    tall = matrices.shape[-2] > matrices.shape[-1]
    # The Gram matrix of the shorter side is the smaller one.
    x = (matrices.mT if tall else matrices).to(dtype).reshape(-1, *sorted(matrices.shape[-2:]))
    # The Frobenius norm bounds the singular values: quintics converge on [0, 1] only.
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(*matrices.shape[:-2], *x.shape[-2:])
    return x.mT if tall else x


def newton_schulz_flops(rows: int, columns: int, steps: int = 5) -> int:
    """FLOPs of `newton_schulz` on one matrix: three products a step, two with the long side."""
    short, long = sorted((rows, columns))
    return steps * (4 * short * short * long + 2 * short**3)
