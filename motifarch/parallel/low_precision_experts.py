"""MXFP8 products of routed experts, through torchao's grouped products.

Forward and backward, rows, weights and gradients are cut to 8 bits where a product reads them, with
a scale for each 32 numbers along the dimension that is summed over: for a weight's gradient these
are 32 rows of one expert. What comes out has the compute dtype.

torchao 0.18 offers to pad rows to 32, but its kernels for Blackwell check for whole tiles of 128
rows an expert; so `motifarch.layers.padded_rows` pads them, with zeros, which it alone can hold to
account: in others' runs the gradient of the down projection came out NaN from the first step on,
and into a checkpoint (marin-community/marin#7271).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from motifarch.errors import UserError
from motifarch.layers.experts import Experts

ROWS = 128
"""What each expert's rows are padded to a multiple of: a tile of scales, as the hardware reads
them.
"""
_MULTIPLE = {True: 32, False: 128}
"""What widths must be multiples of: emulated, a block; on a GPU, torchao's tiles."""


def convert_experts(model: nn.Module, *, emulate: bool) -> list[str]:
    """Lets the experts of a model's inner decoder layers multiply in MXFP8, in place. Returns their
    names.

    Raises:
        ImportError: torchao does not offer it.
        UserError: a width that it cannot multiply.
    """
    from torchao.prototype.moe_training import _to_mxfp8_then_scaled_grouped_mm
    from torchao.quantization.quantize_.common import KernelPreference

    check_expert_sizes(model, emulate=emulate)
    multiply = partial(
        _to_mxfp8_then_scaled_grouped_mm,
        kernel_preference=KernelPreference.EMULATED if emulate else KernelPreference.AUTO,
    )

    def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        # torchao takes matrices (experts, K, N) whose columns lie together: those of ours.
        return multiply(x, weight.transpose(1, 2), offsets)  # type: ignore[no-any-return]

    converted = []
    for name, experts in inner_experts(model):
        experts.grouped_product, experts.row_multiple = grouped_product, ROWS
        converted.append(name)
    return converted


def inner_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The routed experts of all decoder layers but the first and last, by name."""
    layers: nn.ModuleList = model.model.layers  # type: ignore[union-attr, assignment]
    for i, layer in enumerate(layers):
        if 0 < i < len(layers) - 1:
            for name, module in layer.named_modules():
                if isinstance(module, Experts):
                    yield f"model.layers.{i}.{name}", module


def check_expert_sizes(model: nn.Module, *, emulate: bool) -> None:
    """Refuses experts whose matrices MXFP8 cannot multiply.

    Raises:
        UserError: naming the experts and what is needed.
    """
    multiple = _MULTIPLE[emulate]
    for name, experts in inner_experts(model):
        hidden, intermediate = experts.down_proj.shape[1:]
        if hidden % multiple or intermediate % multiple:
            raise UserError(
                f"precision.matmul is mxfp8, whose products of experts need widths that are multiples of {multiple}, "
                f"but {name} has model.hidden_size {hidden} and model.moe_intermediate_size {intermediate}; change "
                "these, or take precision.matmul compute"
            )


def has_kernels() -> bool:
    """Whether torchao can multiply experts on this machine's GPU: beside its own kernels it needs
    those that it compiles with NVIDIA's CuTe DSL.
    """
    try:
        from torchao.prototype.moe_training.kernels.mxfp8 import quant
        from torchao.prototype.moe_training.mxfp8_grouped_mm import _SM100_KERNELS_AVAILABLE
    except ImportError:
        return False
    return bool(_SM100_KERNELS_AVAILABLE and quant._mxfp8_cutedsl_kernels_available)


def check_kernels(device: torch.device) -> None:
    """Refuses a machine on which torchao cannot multiply experts.

    Raises:
        UserError: naming the packages that it needs.
    """
    if device.type == "cuda" and not has_kernels():
        raise UserError(
            "precision.matmul is mxfp8 and the model has experts, but torchao lacks kernels for their products; run "
            "pip install nvidia-cutlass-dsl apache-tvm-ffi, beside a build of torchao for CUDA 12.8 or newer, or take "
            "precision.matmul compute"
        )
