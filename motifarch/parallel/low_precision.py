"""Matrix products in 8 bits, through torchao: FP8 with a scale for each row, and MXFP8 with one for
each 32 numbers.

What is cut to 8 bits is only what a product reads, forward and backward: weights, moments,
reductions and everything between the products stay as they are. The first and the last decoder
layer, embedding, output projection, lambda, routers and hyper-connections keep the compute dtype:
they are a small part of the work and the most sensitive one (Micikevicius et al., FP8 Formats for
Deep Learning, arXiv 2209.05433; Mishra et al., Recipes for Pre-training LLMs with MXFP8, arXiv
2506.08027). Routed experts multiply in MXFP8 (`motifarch.parallel.low_precision_experts`), and with
FP8 stay in the compute dtype.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn

from motifarch.errors import UserError
from motifarch.field_types import Matmul
from motifarch.parallel.low_precision_experts import (
    check_expert_sizes,
    check_kernels,
    convert_experts,
    inner_experts,
)
from motifarch.parallel.tensor import projection_style

# What a product's dimensions must be multiples of: a scaled block, or a row of 16 bytes.
MULTIPLE = {"fp8": 16, "mxfp8": 32}
# What is kept: a head's lambda, the choice of experts, hyper-connections' gates; a few rows each.
_KEPT = ("lambda", "router", "mhc_")
_CAPABILITY = {"fp8": ((9, 0), "Hopper"), "mxfp8": ((10, 0), "Blackwell")}
_NEWEST_NEEDED = {"fp8": "0.10", "mxfp8": "0.18"}


def check_low_precision(
    matmul: Matmul,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    tokens: int,
    model: nn.Module | None = None,
    tensor: int = 1,
) -> None:
    """Refuses a `precision.matmul` that hardware, the installed torchao or sizes don't allow.

    The sizes are a model's, unless it is None, cut over `tensor` ranks of tensor parallelism, and
    the `tokens` of one row on one rank: a weight's gradient is a product over them.

    Raises:
        UserError: naming what is there and what is needed.
    """
    if matmul == "compute":
        return
    _converter(matmul, emulate=False)
    _check_hardware(matmul, device)
    if compute_dtype != torch.bfloat16:
        name = str(compute_dtype).removeprefix("torch.")
        raise UserError(
            f"precision.matmul is {matmul} and precision.compute {name}; its products give bfloat16, so "
            "set precision.compute to bfloat16 (or auto, on a GPU)"
        )
    multiple = MULTIPLE[matmul]
    if tokens % multiple:
        raise UserError(
            f"precision.matmul is {matmul}, which needs a multiple of {multiple} tokens in a row on each rank, but "
            f"there are {tokens}; prepare the data with another sequence length, or change parallel.context"
        )
    if model is not None:
        _check_sizes(model, matmul, tensor)
        if matmul == "mxfp8" and any(inner_experts(model)):
            check_expert_sizes(model, emulate=False)
            check_kernels(device)


def apply_low_precision(model: nn.Module, matmul: Matmul, *, tensor: int = 1, emulate: bool = False) -> list[str]:
    """Lets a model's inner decoder layers multiply in 8 bits, in place; parameters and their names
    stay. Returns the names of the replaced linear layers and of the converted experts.

    Call it before tensor parallelism, over ``tensor`` ranks: that hangs itself on the layers which
    this replaces. With ``emulate`` numbers are rounded as the hardware would, but multiplied in the
    compute dtype: for any device, and slow.

    Raises:
        UserError: torchao is missing or too old, or the model has no layer, or one of a size, that
            can be converted.
    """
    if matmul == "compute":
        return []
    convert = _converter(matmul, emulate)
    _check_sizes(model, matmul, tensor)
    converted = []
    for name, linear in list(_inner_linears(model)):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, convert(linear).train(linear.training))
        converted.append(name)
    return converted + (convert_experts(model, emulate=emulate) if matmul == "mxfp8" else [])


def _inner_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of all decoder layers but the first and last; not those of _KEPT."""
    layers: nn.ModuleList = model.model.layers  # type: ignore[union-attr, assignment]
    for i, layer in enumerate(layers):
        if 0 < i < len(layers) - 1:
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear) and not any(part in name for part in _KEPT):
                    yield f"model.layers.{i}.{name}", module


def _check_sizes(model: nn.Module, matmul: Matmul, tensor: int) -> None:
    multiple = MULTIPLE[matmul]
    linears = list(_inner_linears(model))
    if not linears:
        count = len(model.model.layers)  # type: ignore[union-attr, arg-type]
        raise UserError(
            f"precision.matmul is {matmul} and model.num_hidden_layers {count}; the first and the last layer stay in "
            "the compute dtype, so take at least 3 layers, or precision.matmul compute"
        )
    for name, linear in linears:
        sizes = linear.in_features, linear.out_features
        style = projection_style(name.rpartition(".")[2])
        ranks = tensor if style == "rowwise" else 1, tensor if style == "colwise" else 1
        if any(size % (multiple * n) for size, n in zip(sizes, ranks, strict=True)):
            each = f" on each of parallel.tensor {tensor} ranks" if max(ranks) > 1 else ""
            raise UserError(
                f"precision.matmul is {matmul}, whose products need sizes that are multiples of {multiple}{each}, but "
                f"{name} is {sizes[0]} by {sizes[1]}; change the model's widths, or take precision.matmul compute"
            )


def _check_hardware(matmul: Matmul, device: torch.device) -> None:
    needed, generation = _CAPABILITY[matmul]
    on_gpu = device.type == "cuda"
    found = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    if torch.version.hip is not None and found < (9, 4):
        found = (0, 0)  # AMD counts apart: gfx90a says 9.0 and knows no fp8, gfx942 (9.4) does
    if found < needed:
        there = f"this run is on {device.type}"
        if on_gpu:
            there = f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
        raise UserError(
            f"precision.matmul is {matmul}, which needs a GPU of compute capability {needed[0]}.{needed[1]} "
            f"({generation}) or newer, but {there}; take precision.matmul {'fp8 or ' if found >= (9, 0) else ''}compute"
        )
    if matmul == "mxfp8" and not _has_mxfp8_kernels():
        raise UserError(
            f"precision.matmul is mxfp8, but torchao {_version()} came without its MXFP8 kernels for this Python and "
            "CUDA; install a build of it that has them (CUDA 12.8 or newer), or take precision.matmul fp8"
        )


def _has_mxfp8_kernels() -> bool:
    # torchao always declares the operator, but has a kernel only if its compiled part loads.
    name = "mxfp8_quantize"
    return hasattr(torch.ops.torchao, name) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"torchao::{name}", "CUDA"
    )


def _version() -> str:
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _converter(matmul: Matmul, emulate: bool) -> Callable[[nn.Linear], nn.Linear]:
    """What makes torchao's layer of an nn.Linear, with the same parameters."""
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise UserError(
            f"precision.matmul is {matmul}, which needs torchao {_NEWEST_NEEDED[matmul]} or newer, and none is "
            "installed; run pip install 'motifarch[low-precision]', or take precision.matmul compute"
        ) from None
    try:
        return _fp8(emulate) if matmul == "fp8" else _mxfp8(emulate)
    except (ImportError, AttributeError, TypeError):
        raise UserError(
            f"precision.matmul is {matmul}, which torchao {_version()} does not offer for training; it needs "
            f"{_NEWEST_NEEDED[matmul]} or newer: run pip install --upgrade 'motifarch[low-precision]', or take "
            "precision.matmul compute"
        ) from None


def _fp8(emulate: bool) -> Callable[[nn.Linear], nn.Linear]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    return partial(convert_to_float8_training, config=config)


def _mxfp8(emulate: bool) -> Callable[[nn.Linear], nn.Linear]:
    from torchao.prototype.moe_training import _to_mxfp8_then_scaled_grouped_mm  # noqa: F401  (of experts)
    from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
    from torchao.quantization.quantize_.common import KernelPreference

    options: dict[str, Any] = {"kernel_preference": KernelPreference.EMULATED if emulate else KernelPreference.AUTO}

    def convert(linear: nn.Linear) -> nn.Linear:
        with torch.device("meta"):
            converted: nn.Linear = MXFP8Linear(linear.in_features, linear.out_features, bias=False, **options)
        converted.weight, converted.bias = linear.weight, linear.bias
        converted.register_forward_pre_hook(_make_contiguous)
        return converted

    return convert


def _make_contiguous(linear: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """For torchao refuses a part of a wider tensor, such as attention's latents."""
    return (inputs[0].contiguous(),)
