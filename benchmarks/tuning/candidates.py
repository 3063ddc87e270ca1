"""What is tried in place of an entry of a launch table, and in which order."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lib import predict
from benchmarks.lib.compiling import executed_spills, usage
from benchmarks.lib.shapes import AttentionCase, Case
from benchmarks.tuning.kernels import Entry

Launched = tuple[str, Any, Mapping[str, Any]]
"""A kernel's name, what compiling it gave, and the keyword arguments of its launch."""

# Kernels that walk through tiles, as launch tables and as the source name them.
TILED = {
    "attention_forward": "_forward_kernel",
    "attention_forward_tma": "_forward_kernel",
    "attention_backward_keys": "_keys_kernel",
    "attention_backward_keys_tma": "_keys_kernel",
    "attention_backward_queries": "_queries_kernel",
    "attention_backward_queries_tma": "_queries_kernel",
}


def neighbours(entry: Entry) -> list[Entry]:
    """The entry, then each that one step of one field, or another shape of tile, gives."""
    limits = {"block_m": 16, "block_m_both": 16, "block_n": 16, "num_warps": 2, "tile_bytes": 512, "tiles": 1}
    most = {"num_warps": 32, "tiles": 64}
    changes: list[dict[str, Any]] = []
    for name, least in limits.items():
        if name in entry:
            steps = entry[name] * 2, entry[name] // 2
            changes += [{name: n} for n in steps if least <= n <= most.get(name, 256 * least)]
    if "num_stages" in entry:
        changes += [{"num_stages": n} for n in (entry["num_stages"] + 1, entry["num_stages"] - 1) if n >= 1]
    if {"block_m", "block_n"} <= entry.keys():
        m, n = entry["block_m"], entry["block_n"]
        changes += [{"block_m": a, "block_n": b} for a, b in ((m * 2, n // 2), (m // 2, n * 2)) if min(a, b) >= 16]
    if "maxnreg" in entry:
        changes += [{"maxnreg": n} for n in (96, 128, 168) if n != entry["maxnreg"]]
    if "backend" in entry:
        changes += [{"backend": name} for name in ("triton", "flash", "sdpa") if name != entry["backend"]]
    return [entry, *({**entry, **change} for change in changes)]


def candidates(kernel: str, present: Entry) -> list[Entry]:
    """The present entry, its neighbours, and for attention every tile that gives each warp 16 rows
    of the products that are chained: with fewer, warps would repeat one another.
    """
    of_keys, entry = kernel.startswith("attention_backward_keys"), present
    if of_keys:  # fields that an entry need not have
        entry = {
            **entry,
            "split": entry.get("split", False),
            "block_m_both": entry.get("block_m_both", entry["block_m"]),
        }
    found = [present, *neighbours(entry)[1:]]
    if of_keys:
        found.append({**entry, "split": not entry["split"]})
    if kernel in TILED:
        sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        for rows, columns, warps, stages in sizes:
            if rows >= 16 * warps:
                m, n = (columns, rows) if of_keys else (rows, columns)  # the keys' products have keys as rows
                tile = {**entry, "block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages}
                if of_keys:  # walks over both maps hold twice as much
                    found.append(tile | {"block_m_both": m})
                    tile["block_m_both"] = max(16, m // 2)
                # Without pointers a thread may do with 128 registers: two blocks a multiprocessor.
                found += [tile, {**tile, "maxnreg": 128}] if kernel.endswith("_tma") else [tile]
    return [e for i, e in enumerate(found) if e not in found[:i]]


def predicted_seconds(kernel: str, launched: Sequence[Launched], case: Case) -> float | None:
    """What a pass spends in the kernel by the static model; None where that has no say: on another
    GPU than Hopper, and for other kernels than attention's.

    Args:
        kernel: as launch tables name it.
        launched: the kernels of the pass.
        case: what it is for.
    """
    own = [needs for needs in launched if needs[0] == TILED.get(kernel)]
    if not own or not isinstance(case, AttentionCase) or own[0][1].metadata.target.arch != 90:
        return None
    layout = case.layout
    groups = layout.noise_heads or layout.signal_heads
    shape = predict.Shape(
        layout.head_dim, layout.v_head_dim, layout.signal_heads // groups, groups, case.length, case.batch,
        layout.window, noise=layout.noise_heads > 0,
    )  # fmt: skip
    needs = ({"kernel": function, "constants": constants, **usage(compiled)} for function, compiled, constants in own)
    return sum(predict.attention_kernel(predict.Compiled.of(each), shape).seconds for each in needs)


def spills(kernel: str, launched: Sequence[Launched]) -> bool:
    """Whether the kernel spills registers where it costs; in a pass of attention, that kernel
    alone.
    """
    of_kernel = TILED.get(kernel)
    return any(executed_spills(compiled) for name, compiled, _ in launched if of_kernel in (None, name))
