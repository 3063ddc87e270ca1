"""GPUs by name: what their datasheets promise."""

import difflib
from dataclasses import dataclass

from motifarch.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU of a kind of machine. Bandwidths are per GPU and in one direction."""

    name: str
    """What users see."""
    bf16_flops: float
    """Peak of dense bf16 matrix products, FLOPs/s."""
    memory: float
    """Bytes; a datasheet's GB as 10^9, the least that it can mean."""
    memory_bandwidth: float
    """Bytes a second."""
    nvlink: float
    """Bytes a second to GPUs of the same NVLink domain."""
    network: float
    """Bytes a second to others: one 400 Gbit/s adapter a GPU, the reference designs'."""
    host: float
    """Bytes a second to the CPU's memory: PCIe 5, or NVLink-C2C."""
    domain: int
    """GPUs in an NVLink domain."""
    source: str
    """Where the figures are from."""


GPUS = {
    "h100": Gpu(
        "H100 SXM", 989.4e12, 80e9, 3.35e12, 450e9, 50e9, 64e9, 8, "https://www.nvidia.com/en-us/data-center/h100/"
    ),
    "h200": Gpu(
        "H200 SXM", 989.4e12, 141e9, 4.8e12, 450e9, 50e9, 64e9, 8, "https://www.nvidia.com/en-us/data-center/h200/"
    ),
    "b200": Gpu(
        "B200 (HGX)", 2250e12, 180e9, 8e12, 900e9, 50e9, 64e9, 8, "https://www.nvidia.com/en-us/data-center/hgx/"
    ),
    "gb200": Gpu(
        "GB200 (NVL72)", 2500e12, 186e9, 8e12, 900e9, 50e9, 450e9, 72, "https://www.nvidia.com/en-us/data-center/gb200-nvl72/"
    ),
}  # fmt: skip
"""Datasheets give sparse matrix products, twice the dense, and NVLink both ways."""


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in the table.

    Raises:
        UserError: it is not there.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    close = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"--gpu is {name!r}; accepted are {', '.join(GPUS)}{hint}")
