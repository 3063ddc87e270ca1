"""Triton's interpreter: where it runs the kernels, and tiles that suit it."""

import itertools
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from motif_kernels import tuning


def require_interpreter() -> None:
    """Skips the test where kernels are compiled in this process, as with a GPU."""
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("with a GPU, Triton kernels are compiled in this process, not interpreted")


def small_tiles(*, descriptors: bool = True) -> AbstractContextManager[None]:
    """Tiles so small that a hundred tokens are many of them; read by tensor descriptors or not."""
    tiles = {"block_m": 32, "block_n": 16, "num_warps": 4, "num_stages": 1, "parts": True}
    kernels = itertools.product(("forward", "backward_keys", "backward_queries"), ("", "_float32"))
    small: dict[str, Any] = dict.fromkeys([f"attention_{name}{suffix}" for name, suffix in kernels], tiles)
    described = {f"{name}_tma": entry if descriptors else None for name, entry in small.items()}
    return tuning.overriding(**small, **described, decoding_split={"block_n": 16, "num_warps": 4, "num_stages": 1})


def reduce_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reductions of tuples by whole arrays; the interpreter's own calls Python for each element."""
    from triton.runtime.interpreter import ReduceOps

    def reduce(self: Any, tensors: tuple[Any, ...]) -> list[Any]:
        parts, dtypes = [t.handle.data for t in tensors], [t.dtype for t in tensors]
        while (length := parts[0].shape[self.axis]) > 1:
            first, second = (
                [self.to_tensor(np.take(p, half, self.axis), d) for p, d in zip(parts, dtypes, strict=True)]
                for half in np.split(np.arange(length), 2)
            )
            parts = [t.handle.data for t in self.combine_fn.fn(*first, *second)]
        parts = parts if self.keep_dims else [p.squeeze(self.axis) for p in parts]
        return [self.to_tensor(p, d) for p, d in zip(parts, dtypes, strict=True)]

    monkeypatch.setattr(ReduceOps, "generic_reduce", reduce)
