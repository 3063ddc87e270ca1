"""Chooses the precision of the matrix products."""

import time
from typing import Literal

import torch

Compute = Literal["float32", "bfloat16"]


def choose_compute(device: torch.device, at_least: float = 1.5) -> Compute:
    """Chooses bfloat16 on a GPU, and on a CPU where a product is `at_least` times as fast in it.

    Only the rank that decides for all should call this: two ranks might measure differently.
    """
    if device.type != "cpu":
        return "bfloat16"
    speedup = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
    return "bfloat16" if speedup >= at_least else "float32"


def _matmul_seconds(dtype: torch.dtype, size: int = 768, repeats: int = 5) -> float:
    """The shortest of several times, for a busy machine only ever adds to one."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times)
