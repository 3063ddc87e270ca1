"""What of a forward pass is alive for the backward pass, and the most that there is in that."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators make within."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata: weakref.ref(t.untyped_storage()) for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size


def kept_and_peak(forward: Callable[[], torch.Tensor], known: list[torch.Tensor]) -> tuple[int, int]:
    """Bytes that a forward pass leaves besides its result and `known` tensors, and the most that
    there are in the backward pass.
    """
    with Alive(known) as alive:
        out = forward()
        kept = alive.now - out.untyped_storage().nbytes()
        alive.peak = 0
        out.backward(torch.ones_like(out))
    return kept, alive.peak
