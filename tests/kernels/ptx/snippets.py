"""A few instructions of PTX as a program of their own."""

from types import SimpleNamespace
from typing import Any

import torch

from tests.kernels.ptx.launching import Launch, execute
from tests.kernels.ptx.program import parse


def entry(body: str, pointers: int) -> str:
    """An entry whose pointer parameters are in %rd1, %rd2, ... and whose thread is in %r0."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(pointers))
    return f"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{parameters}
)
{{
.reg .pred %p<32>;
.reg .b16 %rs<32>;
.reg .b32 %r<512>;
.reg .b64 %rd<64>;
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def run(
    body: str, *tensors: torch.Tensor, threads: int = 32, shared: int = 1024, grid: tuple[int, ...] = (1, 1, 1)
) -> Launch:
    """Run instructions; tensors are read and written."""
    metadata = SimpleNamespace(num_warps=threads // 32, shared=shared, tensordesc_meta=None)
    arguments: list[tuple[str, Any]] = [(f"tensor {i}", t) for i, t in enumerate(tensors)]
    return execute(parse(entry(body, len(tensors))), metadata, arguments, grid)


def run_with_descriptor(
    body: str, descriptor: Any, meta: dict[str, Any], *tensors: torch.Tensor, threads: int = 32, shared: int = 8192
) -> Launch:
    """The same with a tensor descriptor of rank 2, whose address is in %rd60."""
    text = entry(body, len(tensors)).replace(".visible .entry k(\n", ".visible .entry k(\n" + _TENSORMAP)
    text = text.replace(
        "mov.u32 %r0, %tid.x;", "mov.b64 %rd60, d_param_0;\ncvta.param.u64 %rd60, %rd60;\nmov.u32 %r0, %tid.x;"
    )
    metadata = SimpleNamespace(num_warps=threads // 32, shared=shared, tensordesc_meta=[meta])
    arguments: list[tuple[str, Any]] = [("descriptor", descriptor)]
    arguments += [(f"tensor {i}", t) for i, t in enumerate(tensors)]
    return execute(parse(text), metadata, arguments, (1, 1, 1))


_TENSORMAP = """.param .align 64 .b8 d_param_0[128],
.param .u32 d_param_1,
.param .u32 d_param_2,
.param .u64 d_param_3,
.param .u64 d_param_4,
"""
