"""The torch operators: one schema, fake rule and derivative for each operation, and the device that
runs it.

An operator's arithmetic is in ``impl/cpu/`` (plain PyTorch, blocked) or ``impl/triton/`` (kernels),
under the same names and with the same arguments. To torch.compile, to activation checkpointing and
to a profiler each is one opaque node.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from motif_kernels.tracing import constant


def implementation(family: str, device: torch.device) -> ModuleType:
    """The module that runs a family of operators ("poly_norm", "combine") on a device.

    Raises:
        NotImplementedError: there is none; :func:`has_implementation` says so beforehand.
    """
    if device.type == "cpu":
        return importlib.import_module(f"..impl.cpu.{family}", __name__)
    if has_implementation(device):
        return importlib.import_module(f"..impl.triton.{family}", __name__)
    raise NotImplementedError(
        f"motif_kernels has no {family} operator for {device}: it needs a CPU, or a CUDA GPU with triton installed"
    )


def has_implementation(device: torch.device) -> bool:
    """Whether operators run on this device; if not, the public functions use the plain formulas."""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and triton_is_installed())


def needs_no_operator(x: torch.Tensor) -> bool:
    """Whether a call may go straight to its implementation: nobody traces or differentiates it, and
    x is no subclass.

    An operator's way through the dispatcher costs as much as the arithmetic of a token that is
    decoded.
    """
    return type(x) is torch.Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@constant
def triton_is_installed() -> bool:
    """Whether there is a triton to import."""
    return _find_triton()


@functools.cache  # a search through the path, asked for in every call
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a norm's result: x's, or float32 where autocast is on and runs norms in float32,
    as it does on CUDA.

    The operators read the narrow tensors and write the wide one; nothing is cast on the way.
    """
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow and x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
