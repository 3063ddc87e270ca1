"""What no attention kernel's inner loop may hold, read out of the compiled code.

Each is a defect that tests of numbers do not see: the kernel is right and slow, or right until a
compiler's bug is met.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.lib.sass import Loop

_LAYOUT = re.compile(r"(#\w+) = #ttg.nvidia_mma<\{.*?warpsPerCTA = \[(\d+), (\d+)\]")
_DOT = re.compile(r"(%\w+) = (?:ttng.warp_group_dot|tt.dot) (%\w+), (%\w+), (%\w+).*-> tensor<(\d+)x(\d+)xf32, (#\w+)>")
_TENSOR_MEMORY_MMA = re.compile(r"ttng.tc_gen5_mma (%[\w#]+), (%[\w#]+), (%[\w#]+)(?:\[[^\]]*\])?, (%\w+)")
_WAIT = re.compile(r"(%\w+)(?::\d+)? = ttng.warp_group_dot_wait (%[\w#]+(?:, %[\w#]+)*)")


def lints(kernel: str, needs: Mapping[str, Any], code: str) -> list[str]:
    """The defects of a kernel, one a kind.

    Args:
        kernel: its name. What a Gluon kernel does in a loop body is not rearranged by the compiler.
        needs: as :func:`benchmarks.lib.compiling.usage` makes them: loops, global_scratch.
        code: its ttgir.
    """
    loops = [loop for loop in map(Loop.parse, needs["loops"]) if loop.mma or loop["hmma"] or loop["tcgen05"]]
    found = {
        "HMMA in an inner loop": any(loop["hmma"] for loop in loops),
        "spills in an inner loop": any(loop["ldl"] or loop["stl"] for loop in loops),
        "products one by one": any(loop["mma_waits"] > max(5, sum(loop.mma.values()) / 2) for loop in loops),
        "fewer than 16 rows a warp": any(_repeated_rows(code)),
        "global scratch": needs["global_scratch"] > 0,
        "two products into one accumulator": not kernel.startswith("gluon")
        and any(map(_shares_accumulator, _loop_bodies(code))),
    }
    return [name for name, there in found.items() if there]


KEYS, SPILLS = "triton.attention_backward._keys_kernel", "spills in an inner loop"

# Defects that are still there: release of Triton -> (kernel, defect) -> widths (D, Dv), and why.
# One that is mended must leave this list. With the releases that are not pinned, tests compile the
# attention of Motif-2-12.7B alone.
KNOWN: dict[str, dict[tuple[str, str], tuple[tuple[tuple[int, int], ...], str]]] = {
    "3.6.0": {
        (KEYS, SPILLS): (((128, 256),), "keys cut by the mask: 34 loads and stores an iteration"),
        ("gluon.attention_backward._backward_kernel", SPILLS): (
            ((128, 256),),
            "one number is loaded an iteration, in noise heads",
        ),
    },
    "3.7.1": {
        (KEYS, SPILLS): (
            ((64, 128), (192, 128)),
            "two maps in one walk by pointers, where tensors are not aligned; 192 wide, keys in registers beside their "
            "gradients: up to 61 loads and 44 stores an iteration of 942 instructions (in shared memory, Triton "
            "leaves out fences)",
        ),
        ("triton.attention_forward._forward_kernel", SPILLS): (
            ((128, 256),),
            "pointers beside an accumulator of 128 x 256, where tensors are not aligned",
        ),
        ("gluon.attention_backward._backward_kernel", SPILLS): (
            ((128, 256),),
            "one number is loaded an iteration, in windows of one head a group",
        ),
    },
    "3.9.0": {
        (KEYS, SPILLS): (((128, 256),), "up to 14 loads and 3 stores an iteration"),
    },
}


def judge(kernels: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Defects of attention kernels that are not known with the release of Triton that compiled
    them, and known ones that are gone with it, in words.

    On Blackwell only those count that make a kernel wrong.
    """
    wrong = {"global scratch", "two products into one accumulator"}
    found: set[tuple[str, str, str, tuple[int, int]]] = set()
    releases: set[str] = set()
    for k in kernels:
        releases.add(k["triton"])
        found |= {
            (k["triton"], k["kernel"], lint, (k["head_dim"], k["v_head_dim"]))
            for lint in k["lints"]
            if k["arch"] == 90 or lint in wrong
        }
    known = {
        (release, *key, widths)
        for release in releases
        for key, (all_widths, _) in KNOWN.get(release, {}).items()
        for widths in all_widths
    }
    new = [
        f"{kernel} at {widths}: {lint} is new with triton {release}"
        for release, kernel, lint, widths in sorted(found - known)
    ]
    gone = [
        f"{kernel} at {widths}: {lint} is gone with triton {release}; take it from KNOWN"
        for release, kernel, lint, widths in sorted(known - found)
    ]
    return new, gone


def _repeated_rows(code: str) -> Iterator[bool]:
    """For each warpgroup's product whether warps compute the same rows: Triton keeps products that
    are chained on [warps, 1], whether or not there are 16 rows for each.
    """
    layouts = {name: int(rows) for name, rows, _ in _LAYOUT.findall(code)}
    for line in code.splitlines():
        if "warp_group_dot " in line and (dot := _DOT.search(line)):
            yield int(dot[5]) < 16 * layouts.get(dot[7], 0)


def _loop_bodies(code: str) -> Iterator[list[str]]:
    """The lines of each loop, without those of loops inside."""
    open_loops: list[tuple[int, list[str]]] = []
    for line in code.splitlines():
        depth = len(line) - len(line.lstrip())
        if "scf.for " in line or "scf.while " in line:
            open_loops.append((depth, []))
        elif open_loops and depth == open_loops[-1][0] and line.lstrip().startswith("}"):
            yield open_loops.pop()[1]
        elif open_loops:
            open_loops[-1][1].append(line)


def _shares_accumulator(body: list[str]) -> bool:
    """Whether a product of a loop adds to what another of the same iteration gave, and to what came
    from the iteration before.

    That is wrong on Blackwell in Triton 3.6 to 3.8 (triton#10821), which takes the two apart. Sums
    that begin anew in each iteration are not concerned: the logits of heads in parts.
    """
    results: set[str] = set()
    anew: set[str] = set()
    memory: set[str] = set()
    for line in body:
        if wait := _WAIT.search(line):
            waited = {x.partition("#")[0] for x in wait[2].split(", ")}
            for names in (results, anew):
                if waited & names:
                    names.add(wait[1])
        elif dot := _DOT.search(line):
            if dot[4] in results:
                return True
            (anew if dot[4].startswith("%cst") or dot[4] in anew else results).add(dot[1])
        elif dot := _TENSOR_MEMORY_MMA.search(line):
            if dot[3] in memory and dot[4] != "%false":  # false: it begins anew
                return True
            memory.add(dot[3])
    return False
