"""Faults planted into a kernel: is it noticed when a barrier, a wait or a fence is missing?

TRITON_INTERPRET=0 python -m tests.kernels.ptx.planted
"""

import json
from collections import Counter
from typing import Any

import numpy as np
import torch

from tests.kernels.ptx import cases
from tests.kernels.ptx.launching import Launch, emulated, execute
from tests.kernels.ptx.program import Fault, Instruction, Program

KINDS = {
    "barrier": (("bar", "sync"), ("barrier", "sync"), ("barrier", "cta", "sync")),
    "warp barrier": (("bar", "warp", "sync"),),
    "cp.async wait": (("cp", "async", "wait_group"),),
    "bulk store wait": (("cp", "async", "bulk", "wait_group"),),
    "wgmma wait": (("wgmma", "wait_group"),),
    "wgmma fence": (("wgmma", "fence"),),
    "proxy fence": (("fence", "proxy"),),
    "mbarrier expect": (("mbarrier", "arrive", "expect_tx"),),
    "mbarrier arrive": (("mbarrier", "arrive"),),
    "mbarrier wait": (("mbarrier", "try_wait"),),
}


def kind_of(instruction: Instruction) -> str | None:
    """The kind of synchronisation that an instruction is."""
    for kind, starts in KINDS.items():
        if any(instruction.parts[: len(start)] == start for start in starts):
            return kind
    return None


class Planted:
    """Runs launches, and of chosen kernels also all that lack one synchronising instruction.

    Attributes:
        noticed: how many of each kind were answered by a fault or by other bits.
        missed: kernel, kind and instruction of the others that the launch had reached.
        drains: as missed, the waits whose every cp.async is of bytes that nobody touches after it.
    """

    def __init__(self, kernels: tuple[str, ...]) -> None:
        self.kernels, self.seen = kernels, set[str]()
        self.noticed: Counter[str] = Counter()
        self.missed: list[tuple[str, str, int, str]] = []
        self.drains: list[tuple[str, str, int, str]] = []

    def __call__(
        self, program: Program, metadata: Any, arguments: list[tuple[str, Any]], grid: tuple[int, ...]
    ) -> Launch:
        before = _contents(arguments)
        launch = execute(program, metadata, arguments, grid)
        if program.name in self.kernels and program.name not in self.seen:
            self.seen.add(program.name)
            after = _contents(arguments)
            for index in sorted(launch.reached):
                instruction = program.instructions[index]
                if (kind := kind_of(instruction)) and (instruction.guard is None or instruction.acted):
                    _restore(arguments, before)
                    lacking = _same(program.without(index), metadata, arguments, grid, after)
                    if lacking is None:
                        self.noticed[kind] += 1
                        continue
                    # Whoever touches bytes of an unfinished copy is noticed.
                    drains = 0 < launch.completed[index] == lacking.unfinished - launch.unfinished
                    found = self.drains if drains else self.missed
                    found.append((program.name, kind, index, instruction.text))
            _restore(arguments, after)
        return launch


def _same(
    program: Program, metadata: Any, arguments: list[tuple[str, Any]], grid: tuple[int, ...], after: list[np.ndarray]
) -> Launch | None:
    """The launch, if it ends without a fault and with the same bits."""
    try:
        launch = execute(program, metadata, arguments, grid)
    except Fault:
        return None
    return launch if all(np.array_equal(a, b) for a, b in zip(_contents(arguments), after, strict=True)) else None


def _tensors(arguments: list[tuple[str, Any]]) -> list[torch.Tensor]:
    found = (v if isinstance(v, torch.Tensor) else getattr(v, "base", None) for _, v in arguments)
    return [t for t in found if t is not None]


def _contents(arguments: list[tuple[str, Any]]) -> list[np.ndarray]:
    return [_bytes(t).copy() for t in _tensors(arguments)]


def _restore(arguments: list[tuple[str, Any]], contents: list[np.ndarray]) -> None:
    for tensor, content in zip(_tensors(arguments), contents, strict=True):
        _bytes(tensor)[:] = content


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "_forward_kernel": ("attention", {"tokens": 130, "keys": 650, "backward": False}),
    "_keys_kernel": ("attention", {"tokens": 260, "keys": 100}),
    "_queries_kernel": ("attention", {"tokens": 100, "keys": 330}),
    "_split_kernel": ("decoding", {"cached": (60, 23)}),
    "_backward_kernel": ("poly_norm", {"columns": 4096, "rows": 2}),
}
"""Kernel -> family and options of a case that enters its loops."""
GLUON: dict[str, tuple[str, dict[str, Any]]] = {
    "_forward_kernel": ("attention", {"tokens": 256, "keys": 600, "backward": False}),
    "_backward_kernel": ("attention", {"tokens": 260}),
}
"""The same where the Gluon kernels serve."""


def main() -> None:
    from motif_kernels.impl.gluon import availability

    for gluon, kernels in ((False, CASES), (True, GLUON if availability.interface_is_present() else {})):
        for kernel, (family, options) in kernels.items():
            planted = Planted((kernel,))
            with emulated(gluon=gluon, run=planted):
                cases.CASES[family](**options)
            line = {"kernel": f"{kernel}{' in Gluon' if gluon else ''}", "noticed": planted.noticed}
            print(json.dumps(line | {"missed": planted.missed, "drains": planted.drains}), flush=True)


if __name__ == "__main__":
    main()
