"""Launch choices, measured once for a GPU and kept as data: nothing is tuned on a user's first
step.

Each JSON file here serves one GPU (``"gpu"``: a part of the name that CUDA reports) or,
``default.json``, every GPU without a file of its own. A kernel's entries are ordered by ``up_to``,
the largest size that an entry serves; the last entry's is null and serves the rest. A kernel that a
GPU is not to use has null for its entries. What a kernel's size is, and what the other fields mean
to it, its module in ``impl/triton/`` says.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import torch

Entry = Mapping[str, Any]


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """Every table that is shipped: file name without suffix -> its content."""
    files = (f for f in resources.files(__name__).iterdir() if f.name.endswith(".json"))
    return {f.name.removesuffix(".json"): json.loads(f.read_text(encoding="utf-8")) for f in files}


def merged_table(gpu: str) -> dict[str, Any]:
    """The entries for a GPU of this name: its own where there are any, else the default's.

    Of two tables whose name is a part of the GPU's, the longer name wins: "H100 PCIe" over "H100".
    """
    own = max((t for t in tables().values() if t["gpu"] and t["gpu"] in gpu), key=lambda t: len(t["gpu"]), default=None)
    return {**tables()["default"]["kernels"], **(own["kernels"] if own else {})}


@functools.cache
def _table(device: torch.device) -> dict[str, Any]:
    return merged_table(torch.cuda.get_device_name(device) if device.type == "cuda" else "")


def attention_size(head_dim: int, value_dim: int, element_size: int) -> int:
    """The size of attention in these tables: bytes of a key and a value, padded as tiles are to
    powers of two.
    """
    return sum(1 << max(4, (width - 1).bit_length()) for width in (head_dim, value_dim)) * element_size


def launch_choice(kernel: str, size: int, device: torch.device) -> Entry:
    """The entry of ``kernel`` for a problem of this size on this device.

    Raises:
        KeyError: no table lists the kernel.
    """
    entry = find_choice(kernel, size, device)
    if entry is None:
        raise KeyError(f"no launch table lists the kernel {kernel!r}")
    return entry


def has_table(device: torch.device, kernel: str) -> bool:
    """Whether the kernel was tuned on this GPU."""
    name = torch.cuda.get_device_name(device)
    return any(kernel in t["kernels"] for t in tables().values() if t["gpu"] and t["gpu"] in name)


def find_choice(kernel: str, size: int, device: torch.device) -> Entry | None:
    """:func:`launch_choice`, or None if no table lists the kernel."""
    if kernel in _overrides:
        return _overrides[kernel]
    entries = _table(device).get(kernel) or []
    return next((e for e in entries if e["up_to"] is None or size <= e["up_to"]), None)


_overrides: dict[str, Entry | None] = {}


@contextlib.contextmanager
def overriding(**entries: Entry | None) -> Iterator[None]:
    """Within, these kernels take these entries, None for none: for measuring candidates, and
    tests.
    """
    before = dict(_overrides)
    _overrides.update(entries)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
