"""Results that a layer's recomputation in the backward pass must find as they were.

An expert may be chosen by the last bit of a score, and scores that are computed again may differ in
it: tokens would come from an expert that their gradient does not go to. So choices are recorded in
the forward pass, with all that is made of them: where rows lie, and how many travel.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from motif_kernels.ops import is_exporting

T = TypeVar("T")

_here = threading.local()  # backward passes run on threads of their own


class Recording:
    """Results of one forward pass through a layer, in order: ``with recording.record(): ...``, and
    then ``with recording.replay(): ...`` around each repetition.
    """

    def __init__(self) -> None:
        self._results: list[Any] = []
        self._next: Iterator[Any] | None = None

    def record(self) -> "_Within":
        """Within it, :func:`recorded` computes and records."""
        return _Within(self, replay=False)

    def replay(self) -> "_Within":
        """Within it, :func:`recorded` gives what was recorded, in the same order."""
        return _Within(self, replay=True)

    def give(self, compute: Callable[[], Any]) -> Any:
        """The next result: a recorded one, or a new one."""
        if self._next is not None:
            return next(self._next)
        result = compute()
        self._results.append(result)
        return result

    def start(self, *, replay: bool) -> None:
        """From the first result on."""
        self._next = iter(self._results) if replay else None


class _Within:
    """A context that can be entered several times."""

    def __init__(self, recording: Recording, *, replay: bool) -> None:
        self._recording, self._replay = recording, replay
        self._before: Recording | None = None

    def __enter__(self) -> Self:
        self._before = getattr(_here, "recording", None)
        self._recording.start(replay=self._replay)
        _here.recording = self._recording
        return self

    def __exit__(self, *_: object) -> None:
        _here.recording = self._before


def recorded(compute: Callable[[], T]) -> T:
    """``compute()``, but in a layer's recomputation what its forward pass computed here.

    For what has no gradient. Without a :class:`Recording` it is computed each time. A graph that is
    compiled is interrupted here; :class:`RecordedOperator` interrupts none.
    """
    if _may_be_repeated():
        # No result is to become a constant of the graph.
        return torch.compiler.disable(_recorded)(compute)  # type: ignore[no-any-return]
    return _recorded(compute)  # type: ignore[no-any-return]


class RecordedOperator:
    """A function of tensors and numbers that is :func:`recorded`, compiled or not.

    To torch.compile it is one operator, which asks for the recording when it runs.

    Args:
        name: the operator's, ``namespace::name``.
        function: with the operator's types; what it returns is new. Tensors reach it without
            gradient.
        fake: the same for fake tensors; None where nothing is returned.
        changes: names of the tensors that it changes in place.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any] | None = None,
        *,
        changes: tuple[str, ...] = (),
    ) -> None:
        self._function = function

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            result = _recorded(lambda: function(*arguments))
            # What is recorded is not for the graph, which may write over its own tensors.
            return tree_map_only(Tensor, Tensor.clone, result)

        self.operator = torch.library.custom_op(name, run, mutates_args=changes)
        self.operator.register_fake(fake or (lambda *_: None))

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        if _may_be_repeated():
            return self.operator(*arguments)
        return _recorded(lambda: self._function(*arguments))


def _may_be_repeated() -> bool:
    """In code that is compiled: without gradients nothing is recomputed, nor what is exported."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and not is_exporting()


@torch.no_grad()
def _recorded(compute: Callable[[], Any]) -> Any:
    recording: Recording | None = getattr(_here, "recording", None)
    return compute() if recording is None else recording.give(compute)
