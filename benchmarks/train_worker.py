"""One model's training step in a process of its own: built, weighed, timed and profiled on request.

A contender that fails, dies or has not finished when its time is over thus ends alone, its memory
is its own, and so is what torch.compile keeps. On a GPU its unused memory goes back to the device
after each request, for the next contender.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.attention import reason_of
from benchmarks.contenders import Entry, Sizes, match_parameters
from benchmarks.train_profile import Costs, largest_costs
from benchmarks.training import DTYPES, Failed, OutOfTime, Setup, TrainStep


@dataclass(frozen=True)
class Prepared:
    """What is known of a contender once it has taken its first steps."""

    peak_memory_bytes: int
    """The most that building it and those steps took."""
    first_step_seconds: float
    """Of the first step; compiling is in it."""
    attention_operators: tuple[str, ...]
    """The attention operators that a layer calls in its forward pass; none for a formula with its
    maps in memory.
    """


class Worker:
    """A contender's process, as the benchmark sees it. It begins to start at once, and builds when
    it is asked to.
    """

    def __init__(self, entry: Entry, setup: Setup, precision: str, seq_len: int):
        context: Any = multiprocessing.get_context("spawn")
        # The fork server imports torch and transformers once. CUDA does not survive a fork.
        if setup.device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, entry, setup, precision, seq_len)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def prepare(self, steps: int, timeout: float | None) -> Prepared:
        """Build the model and take steps, at least two, for the first one's activations come before
        Adam's states.
        """
        return self._ask("prepare", steps, timeout)  # type: ignore[no-any-return]

    def time(self, steps: int, timeout: float | None) -> list[float]:
        """Seconds of each of some steps; on a GPU one more comes before them, which allocates what
        they need.
        """
        return self._ask("time", steps, timeout)  # type: ignore[no-any-return]

    def profile(self, steps: int, timeout: float | None) -> Costs:
        """What some steps spend their time in."""
        return self._ask("profile", steps, timeout)  # type: ignore[no-any-return]

    def _ask(self, request: str, argument: int, timeout: float | None) -> Any:
        """Send a request and wait for its answer.

        Raises:
            OutOfTime: no answer came in ``timeout`` seconds; the process is killed.
            Failed: the request failed, or the process ended.
        """
        try:
            self._pipe.send((request, argument))
            if not self._pipe.poll(timeout):
                self.process.kill()  # a compiler that hangs may not listen
                self.process.join()  # until then it keeps its memory from the others
                raise OutOfTime("the time was over")
            fine, answer = self._pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            hint = ", which mostly means that memory ran out" if code == -signal.SIGKILL else ""
            raise Failed(f"its process ended with exit code {code}{hint}") from None
        if not fine:
            self.close()
            raise Failed(answer)
        return answer

    def close(self) -> None:
        """End the process: it leaves when its pipe is closed, or it is killed."""
        self._pipe.close()
        self.process.join(1)
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, entry: Entry, setup: Setup, precision: str, seq_len: int) -> None:
    """The process: answers requests until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the parent too, which closes this process
    torch.set_num_threads(setup.threads)
    session = _Session(entry, setup, precision, seq_len)
    with pipe, setup.world(), contextlib.suppress(EOFError):
        while True:
            request, argument = pipe.recv()
            try:
                answer = True, getattr(session, request)(argument)
            except Exception as error:  # whatever a model, a library or a compiler raises is this contender's end
                answer = False, reason_of(getattr(error, "inner_exception", error))
            if setup.device == "cuda":
                torch.cuda.empty_cache()
            pipe.send(answer)


class _Session:
    """The requests, by name."""

    def __init__(self, entry: Entry, setup: Setup, precision: str, seq_len: int):
        self.entry, self.setup, self.precision = entry, setup, precision
        self.batch = setup.batch(seq_len)

    def prepare(self, steps: int) -> Prepared:
        cuda = self.setup.device == "cuda"
        if cuda:
            before = torch.cuda.memory_allocated()
        else:
            self._load_libraries()
            # Without the right to do this, the mark still holds the start-up's peak, far below any
            # real model's.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = _resident("VmRSS")
        self.step = TrainStep(self.entry, self.setup, self.precision)
        began = time.perf_counter()
        self.step(self.batch)
        first = time.perf_counter() - began
        for _ in range(steps - 1):
            self.step(self.batch)
        peak = (torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")) - before
        return Prepared(peak, first, attention_operators(self.entry, self.setup, self.precision, self.batch))

    def time(self, steps: int) -> list[float]:
        if self.setup.device == "cuda":
            self.step(self.batch)
        seconds = []
        for _ in range(steps):
            gc.collect()
            gc.disable()
            self.setup.synchronize()
            began = time.perf_counter()
            self.step(self.batch)
            seconds.append(time.perf_counter() - began)
            gc.enable()
        return seconds

    def profile(self, steps: int) -> Costs:
        self.step(self.batch)
        return largest_costs(lambda: self.step(self.batch), steps, self.setup.device)

    def _load_libraries(self) -> None:
        """Take a step of a tiny model of the same kind, so that what is loaded on first use is not
        weighed.
        """
        tiny = Sizes(128, num_layers=1, head_dim=16, vocab_size=64, intermediate_size=512, intermediate_multiple=8)
        small = replace(self.setup, sizes=tiny, tokens_per_step=16, compile=False)
        TrainStep(match_parameters([self.entry.name], tiny)[self.entry.name], small, self.precision)(small.batch(16))
        if self.setup.compile:
            importlib.import_module("torch._inductor.compile_fx")
        gc.collect()


class _Operators(TorchDispatchMode):
    """Notes the attention operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if "attention" in name or "attn" in name:
            self.seen[name] = None
        return func(*args, **(kwargs or {}))


def attention_operators(entry: Entry, setup: Setup, precision: str, batch: torch.Tensor) -> tuple[str, ...]:
    """The attention operators that one layer of a contender calls, with its heads, on rows of a
    batch (B, S).

    This is what dispatch has taken, whatever was asked for: "motif::diff_attention" is the fused
    kernel, "aten::_scaled_dot_product_cudnn_attention" cuDNN's.
    """
    sizes = replace(setup.sizes, num_layers=1, vocab_size=64)
    with torch.device(setup.device):
        model: torch.nn.Module = entry.contender.build(sizes, entry.intermediate_size)
    model.to(DTYPES[precision])
    with _Operators() as operators:
        model(input_ids=batch[:1] % sizes.vocab_size, use_cache=False)
    return tuple(operators.seen)


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; without /proc, the highest resident set for
    either.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
