"""Training steps to measure: one model's step, the seconds of several in turns, and the peak memory of one."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.contenders import Entry, Sizes, match_parameters
from motifarch.errors import UserError
from motifarch.optim import build_adamw, clip_gradients
from motifarch.parallel import Layout, Mesh, open_world, parallelize

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """How every model is trained; picklable, for the processes that measure memory."""

    sizes: Sizes
    tokens_per_step: int
    device: str
    """"cpu" or "cuda"."""
    threads: int
    autocast: bool
    """Plain modules, and torch.autocast for bf16; else FSDP2 with float32 master weights."""

    def batch(self, seq_len: int) -> Tensor:
        """Random token ids (tokens_per_step / seq_len, seq_len), the same for every model."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.tokens_per_step // seq_len, seq_len)
        return torch.randint(self.sizes.vocab_size, shape, generator=generator).to(self.device)

    @contextlib.contextmanager
    def world(self) -> Iterator[None]:
        """The process group that FSDP2 needs, of this process alone."""
        with contextlib.nullcontext() if self.autocast else open_world():
            yield

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class TrainStep:
    """A model with its optimizer; a call is one step. Make it inside ``setup.world()``."""

    def __init__(self, entry: Entry, setup: Setup, precision: str):
        torch.manual_seed(0)
        with torch.device(setup.device):
            self.model: torch.nn.Module = entry.build(setup.sizes)
        self.setup, self.dtype = setup, DTYPES[precision]
        if not setup.autocast:
            parallelize(self.model, Mesh(setup.device, Layout().resolve(1)), compute_dtype=self.dtype)
        self.optimizer = build_adamw(self.model, lr=1e-4)

    def __call__(self, batch: Tensor) -> float:
        """One step on token ids (B, S), finished when it returns: the loss."""
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.setup.autocast and self.dtype != torch.float32:
            context = torch.autocast(self.setup.device, self.dtype)
        with record_function("step: forward and loss"), context:
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        with record_function("step: backward"):
            loss.backward()
        with record_function("step: clip and AdamW"):
            clip_gradients(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.setup.synchronize()
        return float(loss.detach())


def time_rounds(
    steps: Mapping[str, TrainStep], batch: Tensor, *, rounds: int, warmup: int, on_step: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each model's step in each round, the models taking turns.

    Args:
        steps: name -> step.
        batch: token ids (B, S).
        rounds: timed steps of each.
        warmup: untimed steps of each, before them.
        on_step: told whose step comes next.

    Raises:
        UserError: a loss that is not finite: the model no longer does the work it is timed for.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        # Nobody always follows the same model, whose leavings in the caches and the allocator it would inherit.
        first = i % len(names)
        for name in names[first:] + names[:first]:
            on_step(name)
            gc.collect()
            gc.disable()
            steps[name].setup.synchronize()
            start = time.perf_counter()
            loss = steps[name](batch)
            elapsed = time.perf_counter() - start
            gc.enable()
            if not math.isfinite(loss):
                raise UserError(f"{name}: the loss became {loss} in step {warmup + i + 1}; its timing means nothing")
            if i >= 0:
                seconds[name].append(elapsed)
    return seconds


def peak_memory(entry: Entry, setup: Setup, precision: str, seq_len: int, steps: int) -> int:
    """Bytes that building and training a model takes at most, measured in a process of its own.

    Args:
        entry: the model.
        setup: how it is trained.
        precision: "float32" or "bf16".
        seq_len: tokens of a row.
        steps: steps to take; at least two, for the first step's activations come before the optimizer's states.

    Raises:
        UserError: the process died.
    """
    # The fork server imports torch and transformers once; every process forked from it starts from there.
    context: Any = multiprocessing.get_context("spawn")
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (entry, setup, precision, seq_len, steps)
    process = context.Process(target=_send_peak_memory, args=(sender, *arguments), daemon=True)
    process.start()
    sender.close()
    with receiver:
        try:
            peak: int = receiver.recv()
        except EOFError:
            process.join()
            raise UserError(
                f"the process that measured {entry.contender.label} ({precision}, {seq_len} tokens) ended with exit "
                f"code {process.exitcode}; -9 usually means that memory ran out: choose smaller sizes or fewer --models"
            ) from None
    process.join()
    return peak


def _send_peak_memory(sender: Connection, *arguments: Any) -> None:
    with sender:
        sender.send(_peak_memory_here(*arguments))


def _peak_memory_here(entry: Entry, setup: Setup, precision: str, seq_len: int, steps: int) -> int:
    torch.set_num_threads(setup.threads)
    with setup.world():
        _load_libraries(entry, setup, precision)
        batch = setup.batch(seq_len)
        if setup.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            # Without the right to do this, the mark still holds the start-up's peak, far below any real model's.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = _resident("VmRSS")
        step = TrainStep(entry, setup, precision)
        for _ in range(steps):
            step(batch)
        return (torch.cuda.max_memory_allocated() if setup.device == "cuda" else _resident("VmHWM")) - before


def _load_libraries(entry: Entry, setup: Setup, precision: str) -> None:
    """Take a step of a tiny model of the same kind, so that what is loaded on first use is not counted."""
    tiny = Sizes(128, num_layers=1, head_dim=16, vocab_size=64, intermediate_size=512, intermediate_multiple=8)
    small = dataclasses.replace(setup, sizes=tiny, tokens_per_step=16)
    TrainStep(match_parameters([entry.name], tiny)[entry.name], small, precision)(small.batch(16))
    gc.collect()


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; without /proc, the highest resident set for either."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
