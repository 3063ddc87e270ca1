"""Hyper-connections on a GPU: the kernels under the names that the operators call."""

from motif_kernels.impl.triton.read_streams import read_backward, read_forward
from motif_kernels.impl.triton.stream_maps import maps_backward, maps_forward
from motif_kernels.impl.triton.update_streams import update_backward, update_forward

__all__ = [
    "maps_backward",
    "maps_forward",
    "read_backward",
    "read_forward",
    "update_backward",
    "update_forward",
]
