"""An optimizer's moments in CPU memory between steps; on a GPU they are only while they are
updated.

The update itself stays on the device, by the same kernels and in the same order, so that nothing
changes in the last bit, a step can still be skipped there without anyone waiting for it, and Muon's
matrix products need no CPU. FSDP2's own offloading (`CPUOffloadPolicy`) moves parameters and
gradients too and steps on the CPU, where found_inf and Newton-Schulz would have to be waited for.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from motifarch.shards import to_local


def offload_state(optimizer: torch.optim.Optimizer, *, piece_bytes: int = 512 << 20) -> None:
    """Keeps an optimizer's moments in CPU memory, pinned where the parameters are on a GPU; in
    place.

    A step takes the parameters in pieces of up to `piece_bytes` of moments: these come to the
    device, are updated, and go back, all in the order of the device's current stream. 8 bytes a
    parameter of AdamW (4 of Muon) cross the bus each way: at 50 GB/s about a third of a second for
    a thousand million parameters on a rank. The device holds the moments of one piece at a time; a
    group of Muon's matrices is one piece, for its exchange between ranks is planned as a whole
    (experts' matrices are exchanged by no one, and go in pieces).
    Loading a checkpoint passes through the device.

    The optimizer's step must leave parameters alone that are in none of its groups. State of a
    parameter's shape counts as its moments; other state stays where it is. On a CPU the moments are
    copied to and fro all the same, to no use.

    Raises:
        ValueError: `piece_bytes` is below 1.
    """
    if piece_bytes < 1:
        raise ValueError(f"piece_bytes is {piece_bytes}; it must be at least 1")
    offloaded = OffloadedState(optimizer, piece_bytes)
    offloaded.writeback_all()
    optimizer.step = offloaded.step  # type: ignore[method-assign]
    # Copies to the CPU are under way when a step returns.
    optimizer.register_state_dict_pre_hook(lambda _: offloaded.synchronize())
    optimizer.register_load_state_dict_post_hook(lambda _: offloaded.reload())


class OffloadedState:
    """Where the moments are between steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, piece_bytes: int) -> None:
        self._optimizer = optimizer
        self._step: Callable[[], Any] = optimizer.step
        self._piece_bytes = piece_bytes
        self._kept: dict[nn.Parameter, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's step, piece by piece."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._optimizer.param_groups
        whole = [group["params"] for group in groups]
        try:
            for number, piece in list(self._pieces()):
                for i, group in enumerate(groups):
                    group["params"] = piece if i == number else []
                self._prefetch(piece)
                try:
                    self._step()
                finally:
                    self._writeback(piece)
        finally:
            for group, params in zip(groups, whole, strict=True):
                group["params"] = params
        return loss

    def writeback_all(self) -> None:
        """Sends moments home that the optimizer has made already."""
        for group in self._optimizer.param_groups:
            self._writeback(group["params"])
        self.synchronize()

    def reload(self) -> None:
        """Sends moments home that were loaded over the kept ones."""
        self._kept.clear()
        self.writeback_all()

    def synchronize(self) -> None:
        """Waits until the CPU may read the moments."""
        if any(p.is_cuda for group in self._optimizer.param_groups for p in group["params"]):
            torch.cuda.current_stream().synchronize()

    def _pieces(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Consecutive parameters of one group, by the group's number."""
        for number, group in enumerate(self._optimizer.param_groups):
            piece: list[nn.Parameter] = []
            size = 0
            exchanged = group.get("muon") and any(p.ndim == 2 for p in group["params"])
            for parameter in [p for p in group["params"] if p.grad is not None]:
                # Two moments; Muon has one.
                bytes_ = 2 * to_local(parameter).nbytes
                if piece and size + bytes_ > self._piece_bytes and not exchanged:
                    yield number, piece
                    piece, size = [], 0
                piece.append(parameter)
                size += bytes_
            if piece:
                yield number, piece

    def _prefetch(self, piece: list[nn.Parameter]) -> None:
        for parameter in piece:
            for name, kept in self._kept.get(parameter, {}).items():
                there = kept.to(parameter.device, non_blocking=True, copy=True)
                self._optimizer.state[parameter][name] = there

    def _writeback(self, piece: list[nn.Parameter]) -> None:
        for parameter in piece:
            state = self._optimizer.state.get(parameter, {})
            kept = self._kept.setdefault(parameter, {})
            for name, there in state.items():
                # The count of steps, though of a scalar's shape, is read on the device.
                if name == "step" or not isinstance(there, torch.Tensor) or there.shape != parameter.shape:
                    continue
                if there is kept.get(name):
                    continue
                if name not in kept:
                    kept[name] = torch.empty_like(there, device="cpu", pin_memory=parameter.is_cuda)
                to_local(kept[name]).copy_(to_local(there), non_blocking=True)
                state[name] = kept[name]
