"""Benchmarks of memory-bound kernels on rows, and their providers.

*eager* is the plain formula, float32 arithmetic and one rounding at the end; *compile* is
torch.compile of it, static shapes; *liger* is liger-kernel, on a GPU and where it is installed;
*ours* is motif_kernels. Each is held to the formula in float64 before it is timed.

GB/s is over the bytes that the mathematics must move: each input read once and each result written
once, parameters of a row's length or less left out. On a CPU, tensors that fit its caches may go
beyond the bandwidth of a large copy.
"""

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.providers import Function, Provider
from benchmarks.lib.run import Aim, KernelBenchmark
from benchmarks.lib.shapes import DIRECTIONS, RowCase

LABELS = {"eager": "eager PyTorch", "compile": "torch.compile", "liger": "liger-kernel", "ours": "motif_kernels"}

# Largest error of an element, relative to |exact| + the root mean square: an order above what
# rounding does, liger's powers in bf16 included, and far below what a wrong formula or an element
# that nothing wrote would show.
TOLERANCES = {"float32": 1e-3, "bf16": 6e-2}


def providers(case: RowCase, names: Sequence[str], device: torch.device) -> list[Provider]:
    """Those of these names that can do it."""
    functions: dict[str, Callable[..., Tensor] | None] = {
        "eager": case.formula,
        "compile": torch.compile(case.formula, dynamic=False),
        "liger": case.liger,
        "ours": case.ours,
    }

    def by_name(function: Callable[..., Tensor]) -> Function:
        return lambda t: function(*t.values())

    return [
        Provider(name, [("", by_name(function))], in_place=name == "liger" and case.liger_in_place)
        for name in names
        if (function := functions[name]) is not None
    ]


def _large(result: Mapping[str, Any]) -> bool:
    """Below these, a kernel is over before the memory system is busy."""
    return bool(result["rows"] >= 8192 and result["columns"] >= 4096)


def _of_experts(result: Mapping[str, Any]) -> bool:
    return result["function"].endswith("experts") and result["rows"] >= 2048


def _of_streams(result: Mapping[str, Any]) -> bool:
    return result["function"] == "hyper_connections" and result["columns"] >= 2048


def _wide_poly_norm(result: Mapping[str, Any]) -> bool:
    return "poly_norm" in result["function"] and result["rows"] >= 2048 and result["columns"] >= 8192


_OURS = ("ours",)
AIMS = {
    "cuda": (
        Aim("at least 80% of copy bandwidth", "copy_share", 0.8, _OURS, (), DIRECTIONS[:2], _large),
        Aim("at least 1.3 times torch.compile", "speed", 1.3, _OURS, ("compile",), ("forward",), _large),
        Aim("at least 3 times torch.compile", "speed", 3.0, _OURS, ("compile",), ("backward",), _large),
        Aim("ahead of liger-kernel at every size", "speed", 1.0, _OURS, ("liger",), DIRECTIONS),
    ),
    "cpu": (
        Aim(
            "peak memory at most half of eager's", "peak_bytes", 0.5, _OURS, ("eager",),
            applies=_wide_poly_norm, dtype="float32",
        ),
        Aim("experts' PolyNorm at least 3 times eager", "speed", 3.0, _OURS, ("eager",), DIRECTIONS[2:], _of_experts),
        Aim(
            "experts' PolyNorm in at most half of eager's memory", "peak_bytes", 0.5, _OURS, ("eager",),
            applies=_of_experts,
        ),
        Aim("hyper-connections at least twice eager", "speed", 2.0, _OURS, ("eager",), DIRECTIONS[2:], _of_streams),
        Aim(
            "hyper-connections in at most half of eager's memory", "peak_bytes", 0.5, _OURS, ("eager",),
            applies=_of_streams,
        ),
    ),
}  # fmt: skip


class RowBenchmark(KernelBenchmark):
    """A benchmark of memory-bound kernels."""

    labels, ours, tolerances, aims = LABELS, _OURS, TOLERANCES, AIMS
    group, size = ("function", "dtype", "rows"), "columns"
    numbers = ("rows", "columns")
    default_rows: tuple[int, int]
    """On a GPU, on a CPU."""
    default_columns: str
    """In words."""
    providers = staticmethod(providers)

    def __init__(self, name: str, doc: str | None):
        self.name, self.doc = name, (doc or "") + "\n" + (__doc__ or "").partition("\n\n")[2]

    def add_options(self, add: Callable[..., Any]) -> None:
        """See :class:`KernelBenchmark`."""
        gpu, cpu = self.default_rows
        add("--rows", type=int, help=f"rows (tokens); default {gpu}, on a CPU {cpu}")
        add("--columns", nargs="+", type=int, help=f"elements of a row; default {self.default_columns}")

    def set_defaults(self, arguments: argparse.Namespace, *, cuda: bool, quick: bool) -> None:
        """See :class:`KernelBenchmark`."""
        arguments.seconds = arguments.seconds or (0.02 if quick else 0.4 if cuda else 1.0)
        arguments.rows = arguments.rows or (16 if quick else self.default_rows[0 if cuda else 1])

    def left_out(self, device: torch.device) -> dict[str, str]:
        """See :class:`KernelBenchmark`."""
        if device.type != "cuda":
            return {"liger": "liger-kernel has no CPU path"}
        return {} if importlib.util.find_spec("liger_kernel") else {"liger": "liger-kernel is not installed"}

    def describe_group(self, result: Mapping[str, Any]) -> str:
        """See :class:`KernelBenchmark`."""
        return f"{result['function']}, {result['dtype']}, {result['rows']:,} rows"
