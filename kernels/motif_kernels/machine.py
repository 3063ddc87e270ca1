"""What this machine has: questions whose answers torch.compile takes as constants.

Imported at the first question, not with the package: the decorator imports torch's tracer, and that
triton, which takes seconds. (The first call of any operator does, too.)
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.compiler import assume_constant_result

from motif_kernels import tuning
from motif_kernels.impl.flash import libraries

_LAUNCH_TABLES_FIT = ((9, 0), (10, 0), (10, 3))
_kernels_assumed = False


@assume_constant_result
def triton_is_installed() -> bool:
    """Whether there is a triton to import."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def assume_kernels_run() -> Iterator[None]:
    """Within, the Triton kernels count as available on every device.

    For tracing on tensors without data, whose operators are not run.
    """
    global _kernels_assumed
    before, _kernels_assumed = _kernels_assumed, True
    try:
        yield
    finally:
        _kernels_assumed = before


@assume_constant_result
def triton_unsupported_reason(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, or None."""
    if _kernels_assumed:
        return None
    if not triton_is_installed():
        return f"tensors on {device}: triton is not installed"
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        # AMD's gfx90a too says 9.0, and has a quarter of Hopper's shared memory.
        if (torch.version.hip is None and capability in _LAUNCH_TABLES_FIT) or tuning.has_table(
            device, "attention_forward"
        ):
            return None
        return (
            f"compute capability {'.'.join(map(str, capability))}: there are launch tables for Hopper and data-centre "
            "Blackwell, whose tiles may not fit here; benchmarks.tuning.tune writes a table for another GPU"
        )
    return f"tensors on {device}: Triton kernels need a CUDA GPU (or, to try them out, TRITON_INTERPRET=1)"


@assume_constant_result
def measured_backend(size: int, device: torch.device) -> str | None:
    """What the GPU's table says is fastest for heads of this size, or None without a table."""
    entry = tuning.find_choice("attention_backend", size, device)
    return None if entry is None else entry["backend"]


@assume_constant_result
def flash_plan(device: torch.device, *request: Any) -> tuple[int, ...] | str:
    """(generation of flash-attn, *:class:`~motif_kernels.impl.flash.libraries.ValuePlan`) for the
    fields of a request, plain numbers all; or why none can serve it.
    """
    plan = libraries.plan(device, libraries.Request(*request))
    return plan if isinstance(plan, str) else (plan[0], *plan[1])
