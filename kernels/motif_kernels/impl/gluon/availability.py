"""Whether the Gluon kernels can serve a call; where they cannot, the Triton kernels do."""

import functools
import importlib.util
from importlib import metadata

import torch

from motif_kernels.types import AttentionInputs

_INTERFACES = ("3.6", "3.7")  # Triton's releases; 3.9 changed names and arguments
_ARCHITECTURE = (9, 0)
_WIDTHS = ((64, 64), (64, 128), (128, 128), (128, 256))


def release_serves() -> bool:
    """Whether Triton is installed with the Gluon these kernels are written in."""
    if importlib.util.find_spec("triton") is None:
        return False
    return ".".join(metadata.version("triton").split(".")[:2]) in _INTERFACES


@functools.cache
def interface_is_present() -> bool:
    """:func:`release_serves`, and Triton compiles: Gluon has no interpreter."""
    if not release_serves():
        return False
    import triton

    from motif_kernels.impl.triton import attention_tiles

    return isinstance(attention_tiles.document, triton.JITFunction)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU (an AMD GPU may report the same number)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) == _ARCHITECTURE
    )


def can_serve(inputs: AttentionInputs) -> bool:
    """Whether the Gluon kernels can serve a call with these tensors, with any mask and epilogue."""
    q1, v = inputs.q1, inputs.v
    if not (
        interface_is_present()
        and runs_on(q1.device)
        and q1.dtype in (torch.float16, torch.bfloat16)
        and (q1.shape[-1], v.shape[-1]) in _WIDTHS
    ):
        return False
    from motif_kernels.impl.triton.descriptors import describable

    return describable(*inputs[:5])
