"""Triton's interpreter: where it runs the kernels, and tiles that suit it."""

import itertools
from contextlib import AbstractContextManager

import pytest

from motif_kernels import tuning


def require_interpreter() -> None:
    """Skips the test where kernels are compiled in this process, as with a GPU."""
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("with a GPU, Triton kernels are compiled in this process, not interpreted")


def small_tiles() -> AbstractContextManager[None]:
    """Tiles so small that a hundred tokens are many of them."""
    tiles = {"block_m": 32, "block_n": 16, "num_warps": 4, "num_stages": 1}
    kernels = itertools.product(("forward", "backward_keys", "backward_queries"), ("", "_float32"))
    small = dict.fromkeys([f"attention_{name}{suffix}" for name, suffix in kernels], tiles)
    return tuning.overriding(**small, decoding_split={"block_n": 16, "num_warps": 4, "num_stages": 1})
