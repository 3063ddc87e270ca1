"""Attention held to exact arithmetic at the very size it is timed at, on slices that are cheap
enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.attention_problems import Problem, epilogue
from benchmarks.kernels import Draw
from motif_kernels import reference

Index = tuple[int | slice, ...]

# Elements of the maps of a block of queries.
_BLOCK = 1 << 24
# Work beyond which float32 stands in for float64, which many GPUs are slow at; its error is far
# below any tolerance.
_DOUBLE_FLOPS = 2e12


class Truth(Protocol):
    """What a contender's results are held to."""

    @property
    def grad(self) -> Tensor:
        """The incoming gradient to check with, like the output."""

    def errors(self, found: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """For the output and each gradient that was found, the "largest" and the "relative"
        error.
        """


class Exact:
    """The plain formula in float64 (float32 where that is too much work) for two slices of a
    problem.

    A slice is one sequence and one key and value head with all query heads that use it: the first
    of both, and the last of both. The incoming gradient is 0 outside of the slices, so that what
    they give is all that the parameters' gradients have, and every other gradient must be exactly 0
    elsewhere. The output elsewhere must be finite.

    Attributes:
        grad: the incoming gradient to check with, like the output.
    """

    def __init__(self, problem: Problem, inputs: Mapping[str, Tensor], draw: Draw):
        heads = problem.heads
        groups = heads["v"]
        slices = {(0, 0), (problem.batch - 1, groups - 1)}
        self.indices: dict[str, list[Index]] = {name: [] for name in heads}
        for sequence, group in sorted(slices):
            for name, count in heads.items():
                share = count // groups
                rows = (slice(None),) if problem.documents else (sequence, slice(None))
                self.indices[name].append((*rows, slice(group * share, (group + 1) * share)))
        work = problem.flops()["both"] * len(slices) / (problem.batch * groups)
        self.dtype = torch.float64 if work < _DOUBLE_FLOPS else torch.float32
        drawn = draw(*problem.shape("output"))
        self.grad = torch.zeros_like(drawn)
        for index in self.indices["output"]:
            self.grad[index] = drawn[index]

        self.exact: dict[str, list[Tensor]] = {"output": [], **{name: [] for name in inputs}}
        self._sizes: dict[str, float] = {}
        first = problem.first_keys().to(self.grad.device)
        for i in range(len(slices)):
            self._compute(problem, inputs, i, first)
        for name in ("lambda", "norm_weight"):
            if name in inputs and name not in self._sliced(inputs):
                self.exact[name] = [torch.stack(self.exact[name]).sum(0)]

    def _sliced(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """The inputs that have heads."""
        return [name for name in inputs if name in self.indices and inputs[name].ndim > 1]

    def _compute(self, problem: Problem, inputs: Mapping[str, Tensor], i: int, first: Tensor) -> None:
        sliced = self._sliced(inputs)
        leaves = {}
        for name, tensor in inputs.items():
            tensor = tensor.detach()
            if name in sliced:
                tensor = tensor[self.indices[name][i]][None]
            elif name == "lambda":  # one for each token and head: the terms of its gradient tell how far they cancel
                tensor = tensor.expand(self.grad[self.indices["output"][i]].shape[:-1])[None]
            leaves[name] = tensor.to(self.dtype, copy=True).requires_grad_()
        grad = self.grad[self.indices["output"][i]][None].to(self.dtype)
        heads = leaves["q1"].shape[2] + leaves["q2"].shape[2]
        step = max(1, _BLOCK // (heads * problem.rows))
        outputs = []
        for start in range(0, problem.rows, step):
            rows = slice(start, min(start + step, problem.rows))
            keys = slice(int(first[rows].min()), rows.stop)
            key = torch.arange(keys.start, keys.stop, device=first.device)
            query = torch.arange(rows.start, rows.stop, device=first.device)
            out, _, _ = reference.diff_attention(
                leaves["q1"][:, rows],
                leaves["k1"][:, keys],
                leaves["q2"][:, rows],
                leaves.get("k2", leaves["k1"])[:, keys],
                leaves["v"][:, keys],
                leaves["lambda"][:, rows],
                mask=(key >= first[rows, None]) & (key <= query[:, None]),
                softmax_scale=problem.scale,
                **epilogue(leaves),
            )
            out.backward(grad[:, rows])
            outputs.append(out.detach()[0])
        self.exact["output"].append(torch.cat(outputs))
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            if name == "lambda" and name not in sliced:
                self._sizes[name] = math.hypot(self._sizes.get(name, 0.0), leaf.grad.norm().item())
                self.exact[name].append(leaf.grad.sum())
            else:
                self.exact[name].append(leaf.grad[0] if name in sliced else leaf.grad)

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """How far results are off, given :attr:`grad`.

        Args:
            found: "output" and the gradient of each input, by its name; gradients may be left out.

        Returns:
            For each: the "largest" error, and the largest "relative" to |exact| + root mean square
            of the exact values, of its row or of all, whichever is larger.
        """
        errors = {}
        for name, tensor in found.items():
            exact = self.exact[name]
            size = math.sqrt(sum(t.square().sum().item() for t in exact) / sum(t.numel() for t in exact))
            size = self._sizes.get(name, size) + torch.finfo(torch.float64).tiny
            whole = tensor.ndim <= 1
            parts = [(tensor if whole else tensor[index]) for index in ([()] if whole else self.indices[name])]
            off = [(part.to(self.dtype) - t).abs() for part, t in zip(parts, exact, strict=True)]
            largest = [t.max().item() for t in off]
            # The first keys are seen by all: their gradients, and the rounding of these, are far
            # above the others'.
            sizes = [t.abs() + _row_mean(t).clamp(min=size) for t in exact]
            relative = [(o / s).max().item() for o, s in zip(off, sizes, strict=True)]
            if name == "output":
                # Elsewhere it is only known to be a number.
                largest.append(0.0 if tensor.isfinite().all() else math.inf)
                relative.append(largest[-1])
            elif not whole:
                elsewhere = tensor.clone()
                for index in self.indices[name]:
                    elsewhere[index] = 0
                stray = elsewhere.abs().max().item()
                largest, relative = [*largest, stray], [*relative, stray / size]
            errors[name] = {"largest": _worst(largest), "relative": _worst(relative)}
        return errors


def _row_mean(exact: Tensor) -> Tensor:
    """The root mean square of each row."""
    return exact.square().mean(-1, keepdim=True).sqrt() if exact.ndim > 1 else torch.zeros_like(exact)


def _worst(values: Iterable[float]) -> float:
    """The largest, or NaN if there is one."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)
