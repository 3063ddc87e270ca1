"""Floating-point operations of attention and experts, by the mathematics, for torch's counter.

``torch.utils.flop_counter`` knows this package's operators not at all, and torch's own attention on
a CPU not before 2.15, where it counts the pairs that a causal mask hides. Importing this module
registers them; it must be imported before a ``FlopCounterMode`` is made, for the mode copies the
registry.

What is counted: a multiply-add is two operations; (query, key) pairs that the mask hides are not
counted, nor is what an implementation wastes (masked tiles, recomputation across kernels, padding
inside an operator). The exponentials and the epilogue are left out, as they are by torch.

Work for one pair, with D the width of queries and keys and Dv that of values:

======================  =====================  ==============================================
map                     forward                backward
======================  =====================  ==============================================
softmax                 S 2D, P V 2Dv          S 2D, dP 2Dv, dV 2Dv, dK 2D, dQ 2D
differential, signal    S 2D, P V 2Dv          S 2D, dP 2Dv, dV 2Dv, dK 2D, dQ 2D
differential, noise     S 2D, P V 2Dv          S 2D, dK 2D, dQ 2D (dP and dV are its group's)
======================  =====================  ==============================================
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from motif_kernels.ops import diff_attention, hyper_connections, moe, sdpa, take  # noqa: F401  (define what is registered here)
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences

_Formula = TypeVar("_Formula", bound=Callable[..., int])


def visible_pairs(
    seqlens_q: int | Sequence[int],
    seqlens_k: int | Sequence[int],
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> int:
    """(Query, key) pairs that a mask leaves visible, in :func:`motif_kernels.diff_attn_func`'s
    conventions.

    Takes time in the number of documents, not of tokens.

    Args:
        seqlens_q: queries of each document, or of the one sequence.
        seqlens_k: keys of each document, or of the one sequence.
        causal: hide later keys; the last query stands at the last key.
        window_size: inclusive (left, right) around each query's position, -1 for unbounded.

    Returns:
        The number of pairs in one map, over all documents.

    Raises:
        ValueError: seqlens_q and seqlens_k name different numbers of documents.
    """
    lengths_q = [seqlens_q] if isinstance(seqlens_q, int) else list(seqlens_q)
    lengths_k = [seqlens_k] if isinstance(seqlens_k, int) else list(seqlens_k)
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            f"seqlens_q names {len(lengths_q)} documents and seqlens_k {len(lengths_k)}; they must be equal"
        )
    left, right = window_size
    if causal:
        right = 0
    total = 0
    for queries, keys in zip(lengths_q, lengths_k, strict=True):
        up_to_right = queries * keys if right < 0 else _keys_before(queries, keys, right + 1)
        before_left = 0 if left < 0 else _keys_before(queries, keys, -left)
        total += up_to_right - before_left
    return total


def _keys_before(queries: int, keys: int, shift: int) -> int:
    """Keys before ``position + shift``, summed over queries that end at keys - 1."""

    def running_sum(n: int) -> int:
        """The sum of clamp(x, 0, keys) over all x <= n."""
        if n <= 0:
            return 0
        inside = min(n, keys)
        return inside * (inside + 1) // 2 + (n - inside) * keys

    last = keys - 1 + shift
    return running_sum(last) - running_sum(last - queries)


def attention_flops(pairs: int, heads: int, head_dim: int, v_head_dim: int) -> int:
    """Softmax attention's forward pass: ``pairs`` visible pairs a head, summed over the batch."""
    return pairs * heads * (2 * head_dim + 2 * v_head_dim)


def attention_backward_flops(pairs: int, heads: int, head_dim: int, v_head_dim: int) -> int:
    """Softmax attention's backward pass: five products, 2.5 forwards where D = Dv."""
    return pairs * heads * (6 * head_dim + 4 * v_head_dim)


def diff_attention_flops(pairs: int, signal_heads: int, noise_heads: int, head_dim: int, v_head_dim: int) -> int:
    """Differential attention's forward pass, the noise map computed once for its group.

    With Dv = 2D a group takes 12D a pair for one signal head and 30D for four.

    Args:
        pairs: visible pairs of one map, summed over the batch (:func:`visible_pairs`).
        signal_heads: Hs.
        noise_heads: Hn.
        head_dim: D.
        v_head_dim: Dv.
    """
    return attention_flops(pairs, signal_heads + noise_heads, head_dim, v_head_dim)


def diff_attention_backward_flops(
    pairs: int, signal_heads: int, noise_heads: int, head_dim: int, v_head_dim: int
) -> int:
    """Differential attention's backward pass in one pass, dP and dV shared within a group.

    With Dv = 2D a group takes 20D a pair for one signal head and 62D for four. Arguments as in
    :func:`diff_attention_flops`.
    """
    return attention_backward_flops(pairs, signal_heads, head_dim, v_head_dim) + pairs * noise_heads * 6 * head_dim


def document_lengths(cu_seqlens: Tensor) -> list[int]:
    """Lengths of packed documents; torch raises for fake or meta tensors."""
    return [end - start for start, end in pairwise(cu_seqlens.tolist())]


def register(operator: torch._ops.OpOverloadPacket) -> Callable[[_Formula], _Formula]:
    """Register a formula that gets the operator's own arguments and ``out_val``.

    It takes the place of one that is there: since torch 2.15 its CPU attention has one, which
    counts what the causal mask hides, and a module may be imported again.
    """

    def decorate(formula: _Formula) -> _Formula:
        flop_registry.pop(operator, None)
        register_flop_formula(operator, get_raw=True)(formula)
        return formula

    return decorate


def _pairs(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, window_size: tuple[int, int]
) -> int:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return q.shape[0] * visible_pairs(q.shape[1], k.shape[1], window_size=window_size)
    lengths = document_lengths(cu_seqlens_q), document_lengths(cu_seqlens_k)
    return visible_pairs(*lengths, window_size=window_size)


@register(torch.ops.motif.segmented_attention)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    **_: Any,
) -> int:
    pairs = _pairs(q, k, cu_seqlens_q, cu_seqlens_k, (left, right))
    return attention_flops(pairs, q.shape[2], q.shape[-1], v.shape[-1])


@register(torch.ops.motif.segmented_attention_backward)
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    **_: Any,
) -> int:
    pairs = _pairs(q, k, cu_seqlens_q, cu_seqlens_k, (left, right))
    return attention_backward_flops(pairs, q.shape[2], q.shape[-1], v.shape[-1])


@register(torch.ops.motif.blocked_attention)
def _(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, **_: Any) -> int:
    return attention_flops(_blocked_pairs(q, k, *bounds), q.shape[2], q.shape[-1], v.shape[-1])


@register(torch.ops.motif.blocked_attention_backward)
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *bounds: Any, **_: Any) -> int:
    return attention_backward_flops(_blocked_pairs(q, k, *bounds), q.shape[2], q.shape[-1], v.shape[-1])


def _blocked_pairs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> int:
    return _pairs(q, k, cu_seqlens_q, cu_seqlens_k, (left, right))


def _top_left_pairs(query: Tensor, key: Tensor, causal: bool) -> int:
    """Pairs of (B, H, S, D) tensors; torch's causal mask aligns to the top left."""
    queries, keys = query.shape[-2], key.shape[-2]
    if not causal:
        return query.shape[0] * queries * keys
    square = min(queries, keys)
    return query.shape[0] * (square * (square + 1) // 2 + (queries - square) * keys)


@register(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    # A mask tensor's values are not read: every pair is counted, as torch does on other devices.
    pairs = _top_left_pairs(query, key, is_causal)
    return attention_flops(pairs, query.shape[1], query.shape[-1], value.shape[-1])


@register(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    **_: Any,
) -> int:
    pairs = _top_left_pairs(query, key, is_causal)
    return attention_backward_flops(pairs, query.shape[1], query.shape[-1], value.shape[-1])


def _call(arguments: tuple[Any, ...]) -> tuple[int, int, int, int, int]:
    """Visible pairs, signal heads, noise heads, D and Dv of the operator's arguments."""
    inputs, sequences, options, _ = take(arguments, AttentionInputs, Sequences, AttentionOptions)
    q1 = inputs.q1
    pairs = _pairs(q1, inputs.k1, sequences.cu_seqlens_q, sequences.cu_seqlens_k, options.window_size)
    return pairs, q1.shape[-2], inputs.noise_heads, q1.shape[-1], inputs.v.shape[-1]


@register(torch.ops.motif.diff_attention)
def _(*arguments: Any, **_: Any) -> int:
    return diff_attention_flops(*_call(arguments))


@register(torch.ops.motif.diff_attention_backward)
def _(grad: Tensor, *arguments: Any, **_: Any) -> int:
    return diff_attention_backward_flops(*_call(arguments))


@register(torch.ops.motif.grouped_product)
def _(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, **_: Any) -> int:
    # Rows of no expert are counted too: offsets may lie on a device, which nobody should wait for.
    return 2 * x.shape[0] * weight.shape[1] * weight.shape[2]


@register(torch.ops.motif.grouped_weight_gradient)
def _(grad: Tensor, x: Tensor, offsets: Tensor, **_: Any) -> int:
    return 2 * grad.shape[0] * grad.shape[1] * x.shape[1]


# Hyper-connections: products, the sum that is read, and the mixing matrices; their sums of squares
# and Sinkhorn's iterations are left out, as norms are.


@register(torch.ops.motif.read_streams)
def _(streams: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * streams.numel() * (weight.shape[0] + 1)


@register(torch.ops.motif.read_streams_backward)
def _(grad: Tensor | None, grad_products: Tensor | None, streams: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 4 * streams.numel() * (weight.shape[0] + 1)


@register(torch.ops.motif.update_streams)
def _(streams: Tensor, *_: Any, **__: Any) -> int:
    return 2 * streams.numel() * streams.shape[-2]


@register(torch.ops.motif.update_streams_backward)
def _(grad: Tensor, streams: Tensor, *_: Any, **__: Any) -> int:
    return 4 * streams.numel() * streams.shape[-2]
