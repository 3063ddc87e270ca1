"""One model's training step, and the process that takes it.

A model that fails, dies or has not finished when its time is over ends alone. Its memory is its
own, and so is what torch.compile keeps.
"""

import contextlib
import dataclasses
import gc
import importlib
import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.bench import DTYPES, reason_of
from benchmarks.models.providers import MatchedModel, Sizes, match_parameters
from motifarch.errors import UserError
from motifarch.optim import build_adamw, clip_gradients
from motifarch.parallel import Layout, Mesh, open_world, parallelize
from motifarch.parallel.compilation import apply_compile


@dataclasses.dataclass(frozen=True)
class Setup:
    """How every model is trained; picklable."""

    sizes: Sizes
    tokens_per_step: int
    device: str
    """"cpu" or "cuda"."""
    threads: int
    autocast: bool
    """Plain modules, and torch.autocast for bf16; else FSDP2 with float32 master weights."""
    compile: bool = False
    """Each decoder layer through torch.compile, as a recipe's ``compile: true`` does it."""

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


class TrainStep:
    """A model with its optimizer; a call is one step. Make it inside ``setup.world()``."""

    def __init__(self, matched: MatchedModel, setup: Setup, precision: str):
        torch.manual_seed(0)
        with torch.device(setup.device):
            self.model: torch.nn.Module = matched.build(setup.sizes)
        self.setup, self.dtype = setup, DTYPES[precision]
        if not setup.autocast:
            mesh = Mesh(setup.device, Layout().resolve(1))
            parallelize(self.model, mesh, compute_dtype=self.dtype, compile=setup.compile)
        elif setup.compile:
            apply_compile(self.model)
        self.optimizer = build_adamw(self.model, lr=1e-4)

    def __call__(self, batch: Tensor) -> float:
        """One step on token ids (B, S), finished when it returns: its seconds.

        Raises:
            UserError: the loss is not finite: the model no longer does the work it is timed for.
        """
        began = time.perf_counter()
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.setup.autocast and self.dtype != torch.float32:
            context = torch.autocast(self.setup.device, self.dtype)
        with context:
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        clip_gradients(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss became {loss.item()}; the step's timing means nothing")
        return seconds


class Failed(Exception):
    """A model could not go on; the message says why."""


class OutOfTime(Failed):
    """It was stopped, for the time was over."""


class Worker:
    """A model's process. It begins to start at once, and builds when it is asked to."""

    def __init__(self, matched: MatchedModel, setup: Setup, precision: str, seq_len: int):
        context: Any = multiprocessing.get_context("spawn")
        # The fork server imports torch and transformers once. CUDA does not survive a fork.
        if setup.device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, matched, setup, precision, seq_len)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: str, steps: int, timeout: float | None) -> Any:
        """What a method of :class:`_Session` returns.

        Args:
            request: "prepare", "time" or "profile".
            steps: how many to take.
            timeout: seconds until the process is killed; None waits for ever.

        Raises:
            OutOfTime: no answer came in time.
            Failed: the request failed, or the process ended.
        """
        try:
            self._pipe.send((request, steps))
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


def _serve(pipe: Connection, matched: MatchedModel, setup: Setup, precision: str, seq_len: int) -> None:
    """The process: answers requests until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes this process
    torch.set_num_threads(setup.threads)
    session = _Session(matched, setup, precision, seq_len)
    with pipe, setup.world(), contextlib.suppress(EOFError):
        while True:
            request, steps = pipe.recv()
            try:
                answer = True, getattr(session, request)(steps)
            except Exception as error:  # of the model, a library or a compiler: this model's end
                answer = False, reason_of(getattr(error, "inner_exception", error))
            if setup.device == "cuda":
                torch.cuda.empty_cache()  # for the next model
            pipe.send(answer)


class _Session:
    """The requests, by name."""

    def __init__(self, matched: MatchedModel, setup: Setup, precision: str, seq_len: int):
        self.matched, self.setup, self.precision = matched, setup, precision
        self.batch, self.cuda = setup.batch(seq_len), setup.device == "cuda"

    def prepare(self, steps: int) -> dict[str, Any]:
        """Build the model and take at least two steps: Adam's states come after the first.

        Returns:
            The most memory that this took, the first step's seconds (compiling is in them), and the
            attention operators that a layer calls.
        """
        if not self.cuda:
            self._load_libraries()
            # Without the right to do this, the mark still holds the start-up's peak, far below any
            # real model's.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")
        self.step = TrainStep(self.matched, self.setup, self.precision)
        first, *_ = [self.step(self.batch) for _ in range(steps)]
        peak = (torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")) - before
        operators = attention_operators(self.matched, self.setup, self.precision, self.batch)
        return {"peak_memory_bytes": peak, "first_step_seconds": first, "attention_operators": operators}

    def time(self, steps: int) -> list[float]:
        """Seconds of each step; on a GPU after one that allocates what they need."""
        if self.cuda:
            self.step(self.batch)
        seconds = []
        for _ in range(steps):
            gc.collect()
            gc.disable()
            seconds.append(self.step(self.batch))
            gc.enable()
        return seconds

    def profile(self, steps: int) -> dict[str, Any]:
        """Where warm steps spend their time."""
        self.step(self.batch)
        with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as profiler:
            wall = sum(self.step(self.batch) for _ in range(steps))
        return costs(profiler.key_averages(), steps, wall, cuda=self.cuda)

    def _load_libraries(self) -> None:
        """Take a step of a tiny model: libraries loaded on first use are not weighed."""
        tiny = Sizes(128, num_layers=1, head_dim=16, vocab_size=64, intermediate_size=512, intermediate_multiple=8)
        small = dataclasses.replace(self.setup, sizes=tiny, tokens_per_step=16, compile=False)
        name = self.matched.name
        TrainStep(match_parameters([name], tiny)[name], small, self.precision)(small.batch(16))
        if self.setup.compile:
            importlib.import_module("torch._inductor.compile_fx")
        gc.collect()


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; without /proc, the latter for either."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, which has no /proc


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


def attention_operators(matched: MatchedModel, setup: Setup, precision: str, batch: Tensor) -> tuple[str, ...]:
    """The attention operators that one layer calls on rows of a batch (B, S).

    This is what dispatch has taken, whatever was asked for: "motif::diff_attention" is the fused
    kernel, "aten::_scaled_dot_product_cudnn_attention" cuDNN's. A formula whose maps lie in memory
    has none.
    """
    sizes = dataclasses.replace(setup.sizes, num_layers=1, vocab_size=64)
    with torch.device(setup.device):
        model: torch.nn.Module = matched.provider.build(sizes, matched.intermediate_size)
    model.to(DTYPES[precision])
    with _Operators() as operators:
        model(input_ids=batch[:1] % sizes.vocab_size, use_cache=False)
    return tuple(operators.seen)


def costs(averages: Iterable[Any], steps: int, wall_seconds: float, *, cuda: bool) -> dict[str, Any]:
    """What a profile says of one step, for JSON.

    Args:
        averages: as torch's profiler gives them, one for each operator and for each kernel.
        steps: how many were profiled.
        wall_seconds: what they took by the clock, slowed by the profiler.
        cuda: whether kernels are wanted, else operators.

    Returns:
        "largest" are those with the most time of their own, without what they call.
    """
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    found = []
    for event in averages:
        # On a GPU a named range lasts as long as the kernels in it, which are listed themselves.
        if event.device_type == wanted and not (cuda and event.is_user_annotation):
            seconds = 1e-6 * (event.self_device_time_total if cuda else event.self_cpu_time_total) / steps
            found.append({"name": event.key, "seconds": seconds, "calls": event.count / steps})
    total = sum(cost["seconds"] for cost in found)
    largest = sorted(found, key=lambda cost: -cost["seconds"])[:25]
    return {
        "kind": "GPU kernels" if cuda else "CPU operators",
        "seconds": total,
        "wall_seconds": wall_seconds / steps,
        "largest": [cost | {"share": cost["seconds"] / total} for cost in largest],
    }
