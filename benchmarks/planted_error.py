"""A kernel that reads past the end of its tensor: what a sanitizer must find before its silence
means anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _read_past_the_end(source, target, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, SIZE)
    # One element more than there are.
    tl.store(target + offsets, tl.load(source + offsets + 1))


def read_past_the_end(device: torch.device) -> None:
    """Read one number beyond an allocation of 1,024 bytes."""
    target = torch.zeros(256, device=device)
    source = torch.zeros(256, device=device)  # the last allocation: no other begins where it ends
    _read_past_the_end[(1,)](source, target, SIZE=256)
