"""Routing of tokens to experts: selection, weights, and the rows that experts work on.

A token goes to k experts, and has a slot for each. The slots sorted by expert are the experts'
rows.
"""

import torch
from torch import Tensor

from motif_kernels import ops, reference_routing
from motif_kernels.checks import check_devices, may_read
from motif_kernels.ops import expert_rows, routing

SCORE_FUNCTIONS = ("sigmoid", "softmax")


def select_experts(logits: Tensor, bias: Tensor | None, top_k: int, *, score_func: str = "sigmoid") -> Tensor:
    """The experts that each token goes to: those whose score plus bias is highest.

    Source: DeepSeek-V3, arXiv 2412.19437, equation 16. Of experts that are equal the first is taken
    first, on every device; NaN comes before all numbers, as for torch.topk. No gradient passes.

    Args:
        logits: (T, E), of each token and expert.
        bias: (E,), added to the scores; or None.
        top_k: k, how many a token goes to.
        score_func: "sigmoid" or "softmax" of the logits, in float32 (float64 for float64 logits).

    Returns:
        (T, k) int64, the highest first.

    Raises:
        TypeError: logits are not floating-point numbers.
        ValueError: shapes or devices that do not fit, top_k is not 1 to E, or a score_func that is
            not known.
    """
    softmax = _check_logits("select_experts", logits, score_func)
    experts = logits.shape[1]
    check_devices(logits=logits, bias=bias)
    if bias is not None and tuple(bias.shape) != (experts,):
        raise ValueError(f"select_experts: bias has shape {tuple(bias.shape)}; it must be ({experts},)")
    if not 1 <= top_k <= experts:
        raise ValueError(f"select_experts: top_k is {top_k}; it must be 1 to {experts}, the number of experts")
    run = routing.select_experts if ops.has_implementation(logits.device) else reference_routing.select_experts
    return run(logits.detach(), None if bias is None else bias.detach(), top_k, softmax)  # type: ignore[no-any-return]


def expert_weights(
    logits: Tensor, selected: Tensor, *, score_func: str = "sigmoid", normalise: bool = True, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The weights of the experts that each token goes to, and the scores of all.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 12 to 15.

    Args:
        logits: (T, E), of each token and expert.
        selected: (T, k) int64, different experts of each token.
        score_func: "sigmoid" or "softmax" of the logits.
        normalise: divide a token's weights by their sum (plus 1e-20).
        scale: multiplies the weights, after that.

    Returns:
        Weights (T, k) and scores (T, E), float32 (float64 for float64 logits).

    Raises:
        TypeError: logits are not floating-point numbers, or selected is not int64.
        ValueError: shapes or devices that do not fit, or a score_func that is not known.
    """
    softmax = _check_logits("expert_weights", logits, score_func)
    check_devices(logits=logits, selected=selected)
    if selected.dtype != torch.int64:
        raise TypeError(f"expert_weights: selected is {selected.dtype}; it must be int64")
    if selected.ndim != 2 or selected.shape[0] != logits.shape[0]:
        raise ValueError(
            f"expert_weights: selected has shape {tuple(selected.shape)} and logits {tuple(logits.shape)}; they must "
            "be (T, k) and (T, experts)"
        )
    run = routing.expert_weights if ops.has_implementation(logits.device) else reference_routing.expert_weights
    return run(logits, selected, softmax, normalise, float(scale))  # type: ignore[no-any-return]


def _check_logits(function: str, logits: Tensor, score_func: str) -> bool:
    """Whether the scores are a softmax."""
    if score_func not in SCORE_FUNCTIONS:
        names = ", ".join(map(repr, SCORE_FUNCTIONS))
        raise ValueError(f"{function}: score_func is {score_func!r}; it must be one of {names}")
    if not logits.is_floating_point():
        raise TypeError(f"{function}: logits are {logits.dtype}; they must be floating-point numbers")
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"{function}: logits have shape {tuple(logits.shape)}; it must be (T, experts)")
    return score_func == "softmax"


def sort_by_expert(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where the row of each slot lies, where slots are sorted by expert, and tokens in their order.

    A counting sort on a GPU, in which nothing waits for the device.

    Args:
        selected: (T, k) int64, the expert of each slot; one that is not 0 to ``num_experts - 1``
            for none, whose rows come last.
        num_experts: E, how many there are.

    Returns:
        places (T, k) int64, a row for each slot, and offsets (E,) int32, where each expert's rows
        end, as :func:`~motif_kernels.grouped_linear` takes them.

    Raises:
        TypeError: selected is not int64.
        ValueError: selected is not (T, k), or there is no expert.
    """
    if selected.dtype != torch.int64:
        raise TypeError(f"sort_by_expert: selected is {selected.dtype}; it must be int64")
    if selected.ndim != 2 or num_experts < 1:
        raise ValueError(
            f"sort_by_expert: selected has shape {tuple(selected.shape)}, and num_experts is {num_experts}; they must "
            "be (T, k), and at least 1"
        )
    run = expert_rows.sort_by_expert if ops.has_implementation(selected.device) else reference_routing.sort_by_expert
    return run(selected, num_experts)  # type: ignore[no-any-return]


def dispatch_rows(x: Tensor, places: Tensor, offsets: Tensor, *, rows: int | None = None) -> Tensor:
    """Tokens copied to their experts' rows.

    Its gradient adds up each token's rows, slot by slot, in float32 (float64 for float64).

    Args:
        x: (T, N), the tokens.
        places: (T, k) int64, from :func:`sort_by_expert`.
        offsets: (E,) int32, likewise.
        rows: how many there are to be, at least ``offsets[-1]``; default T k, one for each slot.

    Returns:
        (rows, N), of x's dtype; 0 in rows of no expert, which pass no gradient.

    Raises:
        TypeError: places is not int64, or offsets not int32.
        ValueError: shapes or devices that do not fit, or too few or many rows.
    """
    check_devices(x=x, places=places, offsets=offsets)
    _check_places("dispatch_rows", places, offsets)
    if x.ndim != 2 or x.shape[0] != places.shape[0]:
        raise ValueError(
            f"dispatch_rows: x has shape {tuple(x.shape)} and places {tuple(places.shape)}; they must be (T, N) and "
            "(T, k)"
        )
    slots = places.shape[0] * places.shape[1]
    count = slots if rows is None else rows
    if rows is not None:
        _check_rows("dispatch_rows", rows, slots, offsets)
    run = expert_rows.dispatch if ops.has_implementation(x.device) else reference_routing.dispatch
    return run(x, places, offsets, count)  # type: ignore[no-any-return]


def combine_rows(rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor) -> Tensor:
    """What experts made of each token, added up: ``sum_j weights[t, j] rows[places[t, j]]``.

    Slot by slot, in float32 (float64 for float64), rounded once.

    Args:
        rows: (R, N), R at least ``offsets[-1]`` and at most T k. Rows of no expert may hold
            anything.
        weights: (T, k), or None for sums without weights.
        places: (T, k) int64, from :func:`sort_by_expert`.
        offsets: (E,) int32, likewise.

    Returns:
        (T, N), of the dtype that rows and weights promote to; slots of no expert add nothing.

    Raises:
        TypeError: places is not int64, or offsets not int32.
        ValueError: shapes or devices that do not fit, or too few or many rows.
    """
    check_devices(rows=rows, weights=weights, places=places, offsets=offsets)
    _check_places("combine_rows", places, offsets)
    if rows.ndim != 2 or (weights is not None and weights.shape != places.shape):
        raise ValueError(
            f"combine_rows: rows has shape {tuple(rows.shape)}, weights "
            f"{None if weights is None else tuple(weights.shape)} and places {tuple(places.shape)}; they must be "
            "(R, N), (T, k) or None, and (T, k)"
        )
    _check_rows("combine_rows", rows.shape[0], places.shape[0] * places.shape[1], offsets)
    run = expert_rows.combine if ops.has_implementation(rows.device) else reference_routing.combine
    return run(rows, weights, places, offsets)  # type: ignore[no-any-return]


def _check_places(function: str, places: Tensor, offsets: Tensor) -> None:
    if places.dtype != torch.int64 or offsets.dtype != torch.int32:
        raise TypeError(
            f"{function}: places is {places.dtype} and offsets {offsets.dtype}; they must be int64 and int32"
        )
    if places.ndim != 2 or places.shape[1] < 1 or offsets.ndim != 1 or len(offsets) < 1:
        raise ValueError(
            f"{function}: places has shape {tuple(places.shape)} and offsets {tuple(offsets.shape)}; they must be "
            "(T, k) and (experts,)"
        )


def _check_rows(function: str, rows: int, slots: int, offsets: Tensor) -> None:
    """How many experts' rows there are is read on a CPU alone."""
    least = int(offsets[-1]) if may_read(offsets) else 0
    if not least <= rows <= slots:
        raise ValueError(
            f"{function}: there are {rows} rows; there must be at least offsets[-1], {least}, and at most one for each "
            f"of the {slots} slots"
        )
