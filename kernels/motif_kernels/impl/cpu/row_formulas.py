"""Formulas over rows, each run in one of two ways.

``inductor``: torch's compiler makes one C++ loop of the formula, that reads and writes main memory
once. It takes some seconds at the first call of a process on a machine, and is kept on disk. It
needs a C++ compiler. ``eager``: PyTorch's operators, a cache-sized block of rows at a time.

Both round where the formula does, but add in another order: their bits differ.
``MOTIF_CPU_KERNELS`` (``auto``, ``inductor`` or ``eager``) chooses; ``auto`` is inductor where
there is a compiler.
"""

import functools
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

CpuKernels = Literal["inductor", "eager"]
VARIABLE = "MOTIF_CPU_KERNELS"

# Compiling pays where arrays leave the caches; below, a call's own cost and the seconds of the
# first one weigh more.
_LARGE_ELEMENTS = 1 << 18

# A formula is compiled anew for each combination of dtypes, absent tensors and widths of 1. Beyond
# these many, blocks serve; 8, dynamo's own limit, is for code that should not vary.
_LIMITS = {"recompile_limit": 64, "accumulated_recompile_limit": 1 << 20}

# The number of threads is asked for at each call, not written into the code. Nothing between inputs
# and results is stored in main memory because many read it or much was computed for it: to compute
# it again in the loop is cheap.
_OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,
    "realize_opcount_threshold": 1000,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
}

# Elements in a block of rows, for each thread: half a mebibyte of float32. Smaller blocks lose to
# the overhead of an operator call, larger ones leave the second-level cache.
_BLOCK_ELEMENTS = 1 << 17

_failure: str | None = None


@functools.cache
def _compiler() -> str | None:
    """The C++ compiler that inductor calls, or None."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def cpu_kernels() -> CpuKernels:
    """How formulas over large arrays run on this machine.

    Raises:
        ValueError: the environment variable has another value, or asks for a compiler that is not
            there.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", "inductor", "eager"):
        raise ValueError(f"{VARIABLE} is {asked!r}; it can be 'auto', 'inductor' or 'eager'")
    if asked == "inductor" and (_failure or not _compiler()):
        reason = _failure or "there is no C++ compiler (CXX, or g++)"
        raise ValueError(f"{VARIABLE} is 'inductor', but {reason}; install one, or use 'auto' or 'eager'")
    return "inductor" if asked != "eager" and _compiler() and not _failure else "eager"


def is_large(x: Tensor) -> bool:
    """Whether a formula over x is worth compiling."""
    return x.numel() >= _LARGE_ELEMENTS


class RowFormula:
    """A formula over rows.

    Called with the formula's own arguments. Those by position have a row in their first dimension
    for each row of the first of them, or are None; those by name are passed whole. A float may
    reach the formula as a tensor ().

    Args:
        function: gives a tuple of tensors (or None): first those with a row for each row, then
            ``sums`` of them, which are added up over blocks of rows.
        sums: how many results are sums over rows.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], *, sums: int = 0) -> None:
        functools.update_wrapper(self, function)
        self._function, self._sums = function, sums

    @functools.cached_property
    def _compiled(self) -> Callable[..., tuple[Any, ...]]:
        return torch.compile(self._function, dynamic=True, fullgraph=True, options=_OPTIONS)

    def __call__(self, *rows: Tensor | None, **whole: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            first = next(t for t in rows if t is not None)
            if is_large(first) and cpu_kernels() == "inductor":
                try:
                    with torch._dynamo.config.patch(_LIMITS):
                        return self._compiled(*rows, **{name: _number(value) for name, value in whole.items()})
                except torch._dynamo.exc.FailOnRecompileLimitHit:
                    pass
                except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as error:
                    _give_up(error)
            return self._by_blocks(first, rows, whole)

    def _by_blocks(self, first: Tensor, rows: tuple[Tensor | None, ...], whole: dict[str, Any]) -> tuple[Any, ...]:
        count = len(first)
        step = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() * count // max(1, first.numel()))
        if step >= count:
            return self._function(*rows, **whole)
        results: list[Tensor | None] = []
        for start in range(0, count, step):
            block = slice(start, start + step)
            parts = self._function(*(None if t is None else t[block] for t in rows), **whole)
            of_rows = len(parts) - self._sums
            if not results:
                results = [
                    p if p is None else p.new_empty(count, *p.shape[1:]) if i < of_rows else torch.zeros_like(p)
                    for i, p in enumerate(parts)
                ]
            for i, (result, part) in enumerate(zip(results, parts, strict=True)):
                if result is not None and part is not None:
                    if i < of_rows:
                        result[block] = part
                    else:
                        result += part
        return tuple(results)


def _number(value: Any) -> Any:
    """A number as a tensor: the code is then one for all layers, each with numbers of its own. (As
    a number that varies, torch 2.13's compiler compared with the first call's.)
    """
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value


def _give_up(error: Exception) -> None:
    """Goes on without the compiler, once and for all, and says why."""
    global _failure
    cause = error.__cause__ or error
    _failure = f"its compiler fails: {str(cause).strip().splitlines()[0]}"
    if os.environ.get(VARIABLE) == "inductor":
        raise ValueError(f"{VARIABLE} is 'inductor', but {_failure}") from error
    warnings.warn(
        f"no fused CPU kernels, which are several times faster: {_failure}. PyTorch's operators run instead, whose "
        f"results differ in the last bits; {VARIABLE}=eager chooses them without this warning",
        RuntimeWarning,
        stacklevel=4,
    )
