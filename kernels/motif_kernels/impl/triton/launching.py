"""How every kernel is launched."""

from typing import Any

import torch

# A product and a sum are one instruction, rounded once: triton 3.10 will not do so unasked.
_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the current device's current stream.

    Args:
        kernel: made by ``triton.jit``.
        grid: programs along up to three axes.
        arguments: the kernel's tensors and numbers.
        constants: its constants by name, and num_warps, num_stages, maxnreg.
    """
    if constants.get("maxnreg") is None or torch.version.hip is not None:
        constants.pop("maxnreg", None)  # AMD's compiler knows no such limit, and refuses the name
    kernel[grid](*arguments, **constants, **_OPTIONS)
