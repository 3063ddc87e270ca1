"""Providers' results held to the plain formula, at the very size that they are timed at."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.lib.providers import by_document, compose, repeated, sdpa
from benchmarks.lib.shapes import AttentionCase, Case, Draw
from motif_kernels import reference

Errors = dict[str, dict[str, float]]
"""For "output" and the gradient of each input, by name: the "largest" error, and the largest
"relative" to |exact| + the root mean square of the exact values.
"""

_BLOCK = 1 << 22  # elements of rows that are computed at once
_TINY = torch.finfo(torch.float64).tiny


class Exact:
    """Exact results.

    Attributes:
        grad: the incoming gradient that they are for, like the output; None where there is no
            backward.
        values: "output", and the gradient of each input.
    """

    def __init__(self, values: Mapping[str, Tensor], grad: Tensor | None, sizes: Mapping[str, float] | None = None):
        self.values, self.grad, self._sizes = values, grad, sizes or {}

    def errors(self, found: Mapping[str, Tensor]) -> Errors:
        """How far results are off, of those values that were found."""
        errors = {}
        for name, tensor in found.items():
            exact = self.values[name]
            if tensor.shape != exact.shape:
                errors[name] = {"largest": math.inf, "relative": math.inf}
                continue
            off = (tensor.to(exact.dtype) - exact).abs()
            size = self._sizes.get(name, exact.square().mean().sqrt().item()) + _TINY
            # The first keys are seen by all: their gradients, and the rounding of these, are far
            # above the others'.
            row = exact.square().mean(-1, keepdim=True).sqrt().clamp(min=size) if exact.ndim > 1 else size
            errors[name] = {"largest": off.max().item(), "relative": (off / (exact.abs() + row)).max().item()}
        return errors


def fault(errors: Mapping[str, Mapping[str, float]], tolerance: float) -> str | None:
    """Why results with these errors are wrong, or None if they pass; NaN never passes."""
    for name, error in errors.items():
        if not error["relative"] <= tolerance:
            what = "output" if name == "output" else f"gradient of {name}"
            return (
                f"its {what} is off by {error['largest']:.3g} ({error['relative']:.3g} relative to the exact value and "
                f"their root mean square; {tolerance:g} is allowed)"
            )
    return None


def exact_results(case: Case, inputs: Mapping[str, Tensor], draw: Draw) -> Exact:
    """What results on these inputs are held to."""
    if isinstance(case, AttentionCase):
        return of_attention(case, inputs, draw)
    like = next(iter(inputs.values())).shape
    grad = draw(*like) if "both" in case.directions else None
    return of_formula(case.formula, inputs, grad, block=_BLOCK if case.rows_apart else None)


def of_formula(
    formula: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    grad: Tensor | None,
    *,
    block: int | None = _BLOCK,
) -> Exact:
    """A formula of rows in float64, and its gradients, a block of rows at a time.

    Args:
        formula: of the inputs in order. Those of two or more dimensions have a row for each index
            of the first; others are parameters.
        inputs: by name.
        grad: the incoming gradient, like the output; None where there is no backward.
        block: elements of the first input in a block; None for all of it at once.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("output", *(() if grad is None else inputs))}
    first = next(iter(inputs.values()))
    step = len(first) if block is None else max(1, block * len(first) // first.numel())
    for start in range(0, len(first), step):
        rows = slice(None) if block is None else slice(start, start + step)
        leaves = [(t[rows] if t.ndim > 1 else t).detach().double().requires_grad_() for t in inputs.values()]
        out = formula(*leaves)
        gradients = () if grad is None else torch.autograd.grad(out, leaves, grad[rows].double())
        for name, tensor in zip(parts, (out.detach(), *gradients), strict=True):
            parts[name].append(tensor)
    whole = {"output", *(name for name, t in inputs.items() if t.ndim > 1)}
    return Exact({n: torch.cat(p) if n in whole else torch.stack(p).sum(0) for n, p in parts.items()}, grad)


def of_attention(case: AttentionCase, inputs: Mapping[str, Tensor], draw: Draw) -> Exact:
    """Attention by torch's own and the plain epilogue, in float64 on a CPU and in float32 on a GPU.

    Those errors are far below any tolerance, and GPUs' attention kernels have no float64. A
    sequence at a time: a cache may take most of the memory.
    """
    device, backward = inputs["v"].device, "both" in case.directions
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    attend = repeated(sdpa(case, device, None, dtype))  # grouped queries would take maps in memory
    function = compose(by_document(case, attend) if case.documents else attend, case.calls, reference.diff_combine)
    grad = draw(*case.shape("output")) if backward else None
    names = [name for name in inputs if name in case.names or name in ("lambda", "norm_weight")]
    shared = [name for name in names if inputs[name].ndim < 2]
    parts: dict[str, list[Tensor]] = {name: [] for name in ("output", *(names if backward else ()))}
    sizes = 0.0
    for i in range(1 if case.documents else case.batch):
        row = slice(None) if case.documents else slice(i, i + 1)
        leaves = {n: (inputs[n] if n in shared else inputs[n][row]).detach().to(dtype) for n in names}
        if "lambda" in shared:  # one for each token and head: the terms of its gradient tell how far they cancel
            leaves["lambda"] = leaves["lambda"].expand(leaves["q1"].shape[:-1]).clone()
        leaves = {name: leaf.requires_grad_(backward) for name, leaf in leaves.items()}
        out = function(leaves)
        parts["output"].append(out.detach())
        if grad is not None:
            gradients = torch.autograd.grad(out, list(leaves.values()), grad[row].to(dtype))
            for name, gradient in zip(leaves, gradients, strict=True):
                if name == "lambda" and name in shared:
                    sizes = math.hypot(sizes, gradient.norm().item())
                    gradient = gradient.sum()
                parts[name].append(gradient)
    values = {n: torch.stack(p).sum(0) if n in shared else torch.cat(p) for n, p in parts.items()}
    return Exact(values, grad, {"lambda": sizes} if "lambda" in shared and backward else {})
