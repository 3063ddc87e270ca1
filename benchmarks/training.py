"""Training steps to measure: how every model is trained, one model's step, and several that take
turns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.contenders import Entry, Sizes
from motifarch.errors import UserError
from motifarch.optim import build_adamw, clip_gradients
from motifarch.parallel import Layout, Mesh, open_world, parallelize
from motifarch.parallel.compilation import apply_compile

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """How every model is trained; picklable, for the processes that train."""

    sizes: Sizes
    tokens_per_step: int
    device: str
    """"cpu" or "cuda"."""
    threads: int
    autocast: bool
    """Plain modules, and torch.autocast for bf16; else FSDP2 with float32 master weights."""
    compile: bool = False
    """Each decoder layer through torch.compile, as motifarch's own loop does with
    ``compile: true``.
    """

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
        self.setup, self.dtype, self.taken = setup, DTYPES[precision], 0
        if not setup.autocast:
            mesh = Mesh(setup.device, Layout().resolve(1))
            parallelize(self.model, mesh, compute_dtype=self.dtype, compile=setup.compile)
        elif setup.compile:
            apply_compile(self.model)
        self.optimizer = build_adamw(self.model, lr=1e-4)

    def __call__(self, batch: Tensor) -> float:
        """One step on token ids (B, S), finished when it returns: the loss.

        Raises:
            UserError: a loss that is not finite: the model no longer does the work it is timed for.
        """
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
        self.taken += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(f"the loss became {value} in step {self.taken}; its timing means nothing")
        return value


class Failed(Exception):
    """A contender could not go on; the message says why."""


class OutOfTime(Failed):
    """It was stopped, for the time was over."""


def take_turns(
    turns: Mapping[str, Callable[[], list[float]]],
    *,
    rounds: int,
    warmup: int,
    on_turn: Callable[[str], None],
    on_round: Callable[[dict[str, list[float]]], None],
    on_failure: Callable[[str, Failed], None],
    out_of_time: Callable[[], bool],
) -> None:
    """Take rounds of turns, in an order that rotates; who fails is left out of what follows.

    Args:
        turns: name -> takes a turn and says the seconds of its steps.
        rounds: timed rounds; the first is taken even if time is over.
        warmup: untimed rounds before them.
        on_turn: told whose turn comes next.
        on_round: told all seconds so far, by name, after each timed round.
        on_failure: told who failed and why.
        out_of_time: asked before each round but the first timed one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(-warmup, rounds):
        if i != 0 and out_of_time():
            if i > 0:
                return
            continue
        names = list(seconds)
        # Nobody always follows the same model, whose leavings in the caches it would inherit.
        first = i % len(names) if names else 0
        for name in names[first:] + names[:first]:
            on_turn(name)
            try:
                taken = turns[name]()
            except Failed as error:
                on_failure(name, error)
                del seconds[name]
                continue
            if i >= 0:
                seconds[name] += taken
        if i >= 0:
            on_round(seconds)
