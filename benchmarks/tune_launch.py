"""Launching candidates for `benchmarks.tune`: with their entry in force, watched for spills, or
only compiled.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor

from benchmarks.tune_candidates import BACKEND, Entry
from benchmarks.tune_problems import Attention, Problem
from motif_kernels.tuning import overriding

Table = Mapping[str, Sequence[Entry]]
"""Kernel -> its entries."""


class OutOfTimeError(Exception):
    """The limit was reached while candidates were still compiling."""


def entry_at(entries: Sequence[Entry], size: int | None) -> Entry:
    """The entry that serves a size, without its bound; None is beyond every bound."""
    found = next(e for e in entries if e["up_to"] is None or (size is not None and size <= e["up_to"]))
    return {name: value for name, value in found.items() if name != "up_to"}


def launcher(kernel: str, problem: Problem, device: torch.device, table: Table) -> Callable[[Entry], dict[str, Tensor]]:
    """Launches the kernel on the problem's inputs with the entry that it is given.

    Kernels that run before it or beside it take the table's entries.
    """
    beside = {name: entry_at(entries, problem.size(name)) for name, entries in table.items() if name != BACKEND}
    if kernel == BACKEND:
        assert isinstance(problem, Attention)
        by_backend = problem.backend(device)

        def run(entry: Entry) -> dict[str, Tensor]:
            with overriding(**beside):
                return by_backend(entry["backend"])

        return run
    with overriding(**beside):
        launch = problem.launches(kernel, device)

    def apply(entry: Entry) -> dict[str, Tensor]:
        with overriding(**{**beside, kernel: entry}):
            return launch()

    return apply


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, new tensors hold NaN until they are written: what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills new memory in this mode alone
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _running(run: Callable[..., Any]) -> Iterator[None]:
    """Within, Triton's launches go through ``run(original, *args, **kwargs)``."""
    import triton

    original = triton.JITFunction.run
    triton.JITFunction.run = lambda *args, **kwargs: run(original, *args, **kwargs)
    try:
        yield
    finally:
        triton.JITFunction.run = original


@contextlib.contextmanager
def watched() -> Iterator[list[Any]]:
    """Within, the compiled kernels that are launched are listed; interpreted ones are not."""
    launched: list[Any] = []

    def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kernel = original(*args, **kwargs)
        launched.append(kernel)
        return kernel

    with _running(run):
        yield launched


def spilled_bytes(launched: Sequence[Any]) -> int:
    """The most local memory that a thread of these kernels uses; the driver counts it, Triton in
    words of 4 bytes.
    """
    return max((4 * (getattr(kernel, "n_spills", 0) or 0) for kernel in launched), default=0)


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Within, a launch compiles, fills Triton's cache on disk, and launches nothing."""
    with _running(lambda original, *args, **kwargs: original(*args, **{**kwargs, "warmup": True})):
        yield


def reason_of(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, torch.OutOfMemoryError):
        return "it ran out of memory"
    return f"it failed with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def compile_candidate(kernel: str, problem: Problem, entry: Entry, table: Table, device: str) -> str | None:
    """Compile what a launch will need, for whoever launches it later; why it cannot be compiled, or
    None.
    """
    try:
        with compiling_only():
            launcher(kernel, problem, torch.device(device), table)(entry)
    except Exception as error:
        return reason_of(error)
    return None


Task = tuple[str, Problem, Entry, Table, str]
"""Arguments of :func:`compile_candidate`."""


class Compilers:
    """Processes that compile candidates side by side: one alone takes several seconds for each."""

    def __init__(self, jobs: int, work: Callable[..., str | None] = compile_candidate):
        self._jobs, self._work = jobs, work
        self._pool = self._start(jobs)

    @staticmethod
    def _start(jobs: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def compile(self, tasks: Sequence[Task], seconds: float | None) -> list[str | None]:
        """Why each task cannot be compiled, or None.

        Raises:
            OutOfTimeError: they were not done within so many seconds.
        """
        futures = [self._pool.submit(self._work, *task) for task in tasks]
        if wait(futures, timeout=seconds).not_done:
            self.close()
            raise OutOfTimeError
        reasons: list[str | None] = []
        for task, future in zip(tasks, futures, strict=True):
            try:
                reasons.append(future.result())
            except BrokenProcessPool:  # this one, or one beside it, took its process down
                reasons.append(self._compile_alone(task))
        if any(isinstance(future.exception(), BrokenProcessPool) for future in futures):
            self._pool = self._start(self._jobs)
        return reasons

    def _compile_alone(self, task: Task) -> str | None:
        with self._start(1) as pool:
            try:
                return pool.submit(self._work, *task).result()
            except BrokenProcessPool:
                return "the compiler crashed"

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
