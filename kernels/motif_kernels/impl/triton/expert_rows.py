"""Tokens' rows for experts on a GPU. Nothing waits for the device, and there are no atomics.

The sort counts: programs count the experts of a part of the slots each, the counts are added up
over experts and parts, and the same programs give each slot its place. A part's slots are met in
their order, so the sort is stable.

A token's program knows where its k rows lie. It reads the token once and writes k rows, or reads k
rows and writes their sum, slot by slot.

In a launch table the sort's size is the number of experts, and ``tile`` how many (slot, expert)
pairs are looked at together; the others' is a row's bytes, and ``tile_bytes`` how many of these.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.tuning import launch_choice

# Parts of the slots that are counted by themselves: some for each of a GPU's processors.
_PARTS = 512


@triton.jit
def _one_hot(selected_pointer, at, end, experts, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) int32, 1 where a slot's expert is; no expert is after the last."""
    expert = tl.load(selected_pointer + at, mask=at < end, other=0)
    expert = tl.where((expert < 0) | (expert > experts), experts, expert)
    expert = tl.where(at < end, expert, BLOCK)
    return (expert[:, None] == tl.arange(0, BLOCK)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["slots", "per_part"])
def _count_kernel(selected_pointer, counts_pointer, slots, per_part, experts, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts (experts + 1, parts) of each part's slots."""
    part = tl.program_id(0).to(tl.int64)
    end = tl.minimum((part + 1) * per_part, slots)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(part * per_part, end, ROWS):
        counts += tl.sum(_one_hot(selected_pointer, start + tl.arange(0, ROWS), end, experts, BLOCK), 0)
    column = tl.arange(0, BLOCK)
    tl.store(counts_pointer + column * tl.num_programs(0) + part, counts, mask=column <= experts)


@triton.jit(do_not_specialize=["slots", "per_part"])
def _place_kernel(
    selected_pointer,
    counts_pointer,
    ends_pointer,
    places_pointer,
    slots,
    per_part,
    experts,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ends (experts + 1, parts) int64 are sums of the counts up to each."""
    part = tl.program_id(0).to(tl.int64)
    end = tl.minimum((part + 1) * per_part, slots)
    column = tl.arange(0, BLOCK)
    at = column * tl.num_programs(0) + part
    begin = tl.load(ends_pointer + at, mask=column <= experts, other=0)
    begin -= tl.load(counts_pointer + at, mask=column <= experts, other=0)
    for start in range(part * per_part, end, ROWS):
        slot = start + tl.arange(0, ROWS)
        here = _one_hot(selected_pointer, slot, end, experts, BLOCK)
        before = tl.cumsum(here, 0) - here
        place = tl.sum(here * (begin[None, :] + before), 1)
        tl.store(places_pointer + slot, place, mask=slot < end)
        begin += tl.sum(here, 0)


@triton.jit(do_not_specialize=["row_count"])
def _dispatch_kernel(
    x_pointer,
    places_pointer,
    end_pointer,
    out_pointer,
    row_count,
    columns,
    x_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(end_pointer)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + token * x_stride + column, mask=column < columns)
        for slot in tl.static_range(K):
            place = tl.load(places_pointer + token * K + slot)
            row = tl.where(place < end, x, 0.0)
            tl.store(out_pointer + place * columns + column, row, mask=(column < columns) & (place < row_count))


@triton.jit
def _combine_kernel(
    rows_pointer,
    weights_pointer,
    places_pointer,
    end_pointer,
    out_pointer,
    columns,
    row_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(end_pointer)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], DTYPE)
        for slot in tl.static_range(K):
            place = tl.load(places_pointer + token * K + slot)
            mask = (column < columns) & (place < end)
            row = tl.load(rows_pointer + place * row_stride + column, mask=mask, other=0.0).to(DTYPE)
            if weights_pointer is not None:
                row *= tl.load(weights_pointer + token * K + slot, mask=place < end, other=0.0).to(DTYPE)
            total += row
        tl.store(out_pointer + token * columns + column, total, mask=column < columns)


@triton.jit(do_not_specialize=["row_count"])
def _combine_backward_kernel(
    grad_pointer,
    rows_pointer,
    weights_pointer,
    places_pointer,
    end_pointer,
    drows_pointer,
    dweights_pointer,
    row_count,
    columns,
    grad_stride,
    row_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(end_pointer)
    for slot in range(K):
        place = tl.load(places_pointer + token * K + slot)
        weight = tl.load(weights_pointer + token * K + slot, mask=place < end, other=0.0).to(DTYPE)
        products = tl.zeros([BLOCK], DTYPE)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = (column < columns) & (place < end)
            # From the second slot on out of the processor's cache.
            grad = tl.load(grad_pointer + token * grad_stride + column, mask=mask, other=0.0).to(DTYPE)
            products += grad * tl.load(rows_pointer + place * row_stride + column, mask=mask, other=0.0).to(DTYPE)
            into = (column < columns) & (place < row_count)
            tl.store(drows_pointer + place * columns + column, grad * weight, mask=into)
        tl.store(dweights_pointer + token * K + slot, tl.sum(products, 0))


def sort_by_expert(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """As :func:`motif_kernels.reference_routing.sort_by_expert`."""
    selected = selected.contiguous()
    slots, device = selected.numel(), selected.device
    choice = launch_choice("sort_by_expert", num_experts, device)
    block = max(2, next_power_of_2(num_experts + 1))
    rows = max(2, choice["tile"] // block)
    per_part = cdiv(cdiv(slots, rows), _PARTS) * rows
    parts = cdiv(slots, per_part)
    constants: dict[str, Any] = {"ROWS": rows, "BLOCK": block, "num_warps": choice["num_warps"]}
    counts = torch.empty(num_experts + 1, parts, dtype=torch.int32, device=device)
    launch(_count_kernel, (parts,), selected, counts, slots, per_part, num_experts, **constants)
    ends = counts.view(-1).cumsum(0).view_as(counts)
    places = torch.empty_like(selected)
    launch(_place_kernel, (parts,), selected, counts, ends, places, slots, per_part, num_experts, **constants)
    return places, ends[:-1, -1].to(torch.int32)


def _tile(kernel: str, x: Tensor) -> dict[str, Any]:
    """Constants of a launch over rows such as x's (., N)."""
    choice = launch_choice(kernel, x.shape[1] * x.element_size(), x.device)
    block = min(next_power_of_2(x.shape[1]), choice["tile_bytes"] // x.element_size())
    return {"BLOCK": block, "num_warps": choice["num_warps"]}


def _dtype(*tensors: Tensor | None) -> tl.dtype:
    return tl.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else tl.float32


def dispatch(x: Tensor, places: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """As :func:`motif_kernels.reference_routing.dispatch`."""
    out = torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
    places, constants = places.contiguous(), _tile("dispatch_rows", x)
    arguments = (x, places, offsets[-1:], out, rows, x.shape[1], x.stride(0))
    launch(_dispatch_kernel, (len(places),), *arguments, K=places.shape[1], **constants)
    return out


def combine(rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`motif_kernels.reference_routing.combine`, rounded once to ``dtype``."""
    out = torch.empty(len(places), rows.shape[1], dtype=dtype, device=rows.device)
    places, constants = places.contiguous(), _tile("combine_rows", rows)
    launch(
        _combine_kernel,
        (len(places),),
        rows,
        None if weights is None else weights.contiguous(),
        places,
        offsets[-1:],
        out,
        rows.shape[1],
        rows.stride(0),
        K=places.shape[1],
        DTYPE=_dtype(rows, weights),
        **constants,
    )
    return out


def combine_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, places: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights."""
    drows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=rows.device)
    places, constants = places.contiguous(), _tile("combine_rows_backward", rows)
    launch(
        _combine_backward_kernel,
        (len(places),),
        grad,
        rows,
        weights.contiguous(),
        places,
        offsets[-1:],
        drows,
        dweights,
        *rows.shape,
        grad.stride(0),
        rows.stride(0),
        K=places.shape[1],
        DTYPE=_dtype(rows, weights),
        **constants,
    )
    return drows, dweights
