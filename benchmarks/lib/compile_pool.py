"""Processes that compile kernels side by side, by launches on CPU tensors: none uses a GPU."""

import contextlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.pool import Pool
from typing import Any

import torch
from torch import Tensor

PROCESSORS = {90: 132, 100: 148, 103: 148}
"""Of an H100, a B200 and a B300: decoding cuts caches into parts for them."""


@contextlib.contextmanager
def compile_pool(jobs: int, processors: int) -> Iterator[Pool]:
    """So many processes; what they still do at the end is given up.

    Args:
        jobs: how many.
        processors: of the GPU that is compiled for.
    """
    # Whether kernels are interpreted is decided when triton is imported.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        # Spawned: the parent may hold a GPU. The processes are started here, and inherit this.
        with multiprocessing.get_context("spawn").Pool(jobs, _begin, (processors,)) as pool:
            yield pool
    finally:
        os.environ["TRITON_INTERPRET"] = before or ""
        if before is None:
            del os.environ["TRITON_INTERPRET"]


def _begin(processors: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends this
    torch.set_num_threads(1)
    launch_from_cpu_tensors(processors)


def launch_from_cpu_tensors(processors: int) -> None:
    """From here on, CPU tensors are taken to the kernels of GPUs with so many multiprocessors."""
    from motif_kernels.impl.triton import decoding, decoding_latent

    families = "poly_norm", "grouped_poly_norm", "combine", "hyper_connections"
    for family in families:  # the others go there by their backend's name
        operators: Any = importlib.import_module(f"motif_kernels.ops.{family}")
        operators.implementation = lambda family, device: importlib.import_module(f"motif_kernels.impl.triton.{family}")
    decoding.processors = decoding_latent.processors = lambda device: processors


def draw_nothing(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros in memory that nobody touches, which costs nothing."""
    return torch.zeros(shape, dtype=dtype or torch.bfloat16)


def differentiated(function: Callable[[Any], Tensor], inputs: Mapping[str, Tensor]) -> None:
    """A call and its backward, as a benchmark runs them."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = function(leaves)
    torch.autograd.grad(out, list(leaves.values()), torch.zeros_like(out), allow_unused=True)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within, in a process's main thread, what takes longer is broken off.

    Raises:
        TimeoutError: it took longer.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"compiling takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
