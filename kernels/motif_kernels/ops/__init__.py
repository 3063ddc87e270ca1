"""The torch operators: one schema, fake rule and derivative for each operation, and the device that
runs it.

An operator's arithmetic is in ``impl/cpu/`` (plain PyTorch, blocked) or ``impl/triton/`` (kernels),
under the same names and with the same arguments. To torch.compile, to activation checkpointing and
to a profiler each is one opaque node.
"""

import importlib
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    bool: "bool",
}


def implementation(family: str, device: torch.device) -> ModuleType:
    """The module that runs a family of operators ("poly_norm", "combine") on a device.

    Raises:
        NotImplementedError: there is none; :func:`has_implementation` says so beforehand.
    """
    if device.type == "cpu":
        return importlib.import_module(f"motif_kernels.impl.cpu.{family}")
    if has_implementation(device):
        return importlib.import_module(f"motif_kernels.impl.triton.{family}")
    raise NotImplementedError(
        f"motif_kernels has no {family} operator for {device}: it needs a CPU, or a CUDA GPU with triton installed"
    )


def is_exporting() -> bool:
    """Whether a call is recorded for programs that do not have the operators: by torch.export (and
    with it ONNX) or torch.jit.trace.
    """
    # Not torch.compiler.is_exporting(): torch 2.11 calls that true in all that it compiles.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def has_implementation(device: torch.device) -> bool:
    """Whether operators run on this device; if not, the public functions use the plain formulas.

    So they do where they are exported.
    """
    if is_exporting():
        return False
    if device.type == "cuda":
        from motif_kernels.machine import triton_is_installed

        return triton_is_installed()
    return device.type in ("cpu", "meta")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def schema(*values: Any) -> str:
    """An operator's arguments: the fields of NamedTuples, one after the other."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for v in values for name, kind in get_type_hints(v).items())


def take(arguments: tuple[Any, ...], *values: Any) -> tuple[Any, ...]:
    """The opposite of :func:`schema`: arguments as NamedTuples, and those that are left."""
    taken, start = [], 0
    for value in values:
        end = start + len(value._fields)
        taken.append(value(*arguments[start:end]))
        start = end
    return *taken, arguments[start:]


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a norm's result: x's, or float32 where autocast is on and runs norms in float32,
    as it does on CUDA.

    The operators read the narrow tensors and write the wide one; nothing is cast on the way.
    """
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow and x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
