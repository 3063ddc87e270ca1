"""How every kernel is launched."""

from typing import Any

import torch
from triton.runtime.errors import OutOfResources

# A product and a sum are one instruction, rounded once: triton 3.10 will not do so unasked.
_OPTIONS = {"enable_fp_fusion": True}


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up: triton.cdiv, which serves kernels too, takes 2 µs here."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n: likewise."""
    return 1 << max(0, n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the current device's current stream.

    Args:
        kernel: made by ``triton.jit``.
        grid: programs along up to three axes.
        arguments: the kernel's tensors and numbers.
        constants: its constants by name, and num_warps, num_stages, maxnreg.

    Tables are for the releases of Triton and the GPUs that they were made with. Where others have
    less room, there are fewer stages of loads: the same numbers, later.

    Raises:
        OutOfResources: one stage is too much for the GPU.
    """
    if constants.get("maxnreg") is None or torch.version.hip is not None:
        constants.pop("maxnreg", None)  # AMD's compiler knows no such limit, and refuses the name
    while True:
        try:
            kernel[grid](*arguments, **constants, **_OPTIONS)
        except OutOfResources:  # found once, when the kernel is loaded; afterwards Triton raises at once
            if constants.get("num_stages", 1) == 1:
                raise
            constants["num_stages"] -= 1
        else:
            return
