"""FLOPs of a step, as they are run: by part, by direction, and what is recomputed.

Operators are counted by torch's flop counter's formulas, those of `motif_kernels.flops` for
attention among them: a noise map once for its group, hidden pairs not at all. The `reference`
backend multiplies whole maps, hidden pairs and all; of its products the visible share is counted,
so that a plan on it says what the mathematics needs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from motif_kernels.flops import visible_pairs  # this import registers our operators' formulas
from motifarch.models.motif import MotifConfig
from motifarch.models.motif.rotary import mtp_layer_type
from motifarch.plan.memory import whole_bytes

MATRICES, EXPERTS, ATTENTION = "matrices", "experts", "attention"
DIRECTIONS = ("forward", "backward", "recompute")


def visible_share(config: MotifConfig, seq_len: int) -> float:
    """The part of a sequence's (query, key) pairs that causal masks and windows show."""
    windows = [*config.windows, *[config.window_of(mtp_layer_type(config))] * config.num_nextn_predict_layers]
    pairs = [visible_pairs(seq_len, seq_len, True, window) for window in windows]
    return sum(pairs) / len(pairs) / seq_len**2


def count(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of an operator, as a dispatch mode gets it; 0 where it multiplies no matrices."""
    formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def part_of(func: Any, args: tuple[Any, ...], phase: str, tokens: int) -> str:
    """Whether an operator with FLOPs multiplies by weights, by routed experts' or computes
    attention, in a micro-batch of so many tokens.
    """
    name = func._schema.name
    if name.startswith("motif::grouped_"):
        return EXPERTS
    return ATTENTION if is_plain_attention(func, args, phase, tokens) or "attention" in name else MATRICES


def is_plain_attention(func: Any, args: tuple[Any, ...], phase: str, tokens: int) -> bool:
    """Whether the operator is a product of whole attention maps."""
    # Weights are multiplied by mm; in the optimizer, batches of matrices are Newton-Schulz's. A
    # matrix for each token is that of hyper-connections, and a single row or column weights a sum.
    if func._schema.name != "aten::bmm" or phase == "optimizer" or len(args[0]) == tokens:
        return False
    return all(1 not in factor.shape[-2:] for factor in args[:2])


# Operators that move no data on a GPU, or whose bytes are counted elsewhere.
_FREE = ("empty", "new_empty", "detach", "lift", "is_", "sym_", "resize", "set_", "_local_scalar", "record_stream")


def moved_bytes(func: Any, args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> int:
    """Bytes that an operator reads and writes; 0 for views and for what FLOPs or a link bound.

    Its arguments include the keyword ones. One that returns no tensors writes what it reads.
    """
    namespace, _, name = func._schema.name.partition("::")
    if func.is_view or namespace not in ("aten", "motif", "fsdp") or name.startswith(_FREE):
        return 0
    if func._overloadpacket in flop_registry and "streams" not in name:  # of so few columns that memory bounds them
        return 0
    if name == "embedding":  # the rows looked up, not the table
        return 2 * whole_bytes(outputs)
    return whole_bytes(args) + whole_bytes(outputs or args)
