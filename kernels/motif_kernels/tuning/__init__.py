"""Launch choices, measured once for a GPU and kept as data: nothing is tuned on a user's first step.

Each JSON file here serves one GPU (``"gpu"``: a part of the name that CUDA reports) or, ``default.json``, every GPU
without a file of its own. A kernel's entries are ordered by ``up_to``, the largest size that an entry serves; the
last entry's is null and serves the rest. What a kernel's size is, and what the other fields mean to it, its module in
``triton/`` says.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch

Entry = Mapping[str, Any]


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """Every table that is shipped: file name without suffix -> its content."""
    files = (f for f in resources.files(__name__).iterdir() if f.name.endswith(".json"))
    return {f.name.removesuffix(".json"): json.loads(f.read_text(encoding="utf-8")) for f in files}


@functools.cache
def _table(device: torch.device) -> dict[str, Any]:
    """The table for a device: its own if there is one, with the default for kernels it does not list."""
    default = tables()["default"]["kernels"]
    if device.type != "cuda":
        return default
    name = torch.cuda.get_device_name(device)
    own: dict[str, Any] = next(
        (t["kernels"] for t in tables().values() if t["gpu"] is not None and t["gpu"] in name), {}
    )
    return {**default, **own}


def launch_choice(kernel: str, size: int, device: torch.device) -> Entry:
    """The entry of ``kernel`` for a problem of this size on this device.

    Raises:
        KeyError: no table lists the kernel.
    """
    return next(e for e in _table(device)[kernel] if e["up_to"] is None or size <= e["up_to"])
