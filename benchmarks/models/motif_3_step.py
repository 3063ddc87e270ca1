"""A training step of the tiny Motif-3 recipe beside the same model in plain PyTorch.

    python -m benchmarks.models.motif_3_step              # three minutes on one core
    python -m benchmarks.models.motif_3_step --quick      # a smoke test

A step is that of `recipes/motif_3/tiny_cpu.yaml` as `motifarch.train` takes it, in one process: two
micro-batches of 8 rows of 128 random tokens forward and backward, clipping, Muon, experts' biases;
FSDP2, float32. All models begin with the same weights, and their losses must agree.

- eager: `benchmarks.models.motif_3_plain`, rows as a batch, whose maps are 128 x 128.
- eager_packed: the same on rows end to end, as the recipe's loader packs them.
- motifarch: the recipe as it is.
- compiled: the same with `compile: true`.

Losses, optimizer and FSDP2 are the same in all, and in the time of a step.

Models take turns, a step each, in an order that rotates. Times are the process's own
(`time.process_time`), on one thread by default: other work on the machine takes little of them.
Memory is what the allocator gives out at most in a step, beyond what it had before.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.lib import cli, report
from benchmarks.lib.bench import peak_bytes
from benchmarks.models.motif_3_plain import make_plain
from motifarch.data import Block, collate
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel import Layout, Mesh, World, open_world
from motifarch.train.loop import build_state
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import Recipe
from motifarch.train.step import count_targets, train_step

MODULE = "benchmarks.models.motif_3_step"
RECIPE = report.ROOT / "recipes" / "motif_3" / "tiny_cpu.yaml"
MODELS = ("eager", "eager_packed", "motifarch", "compiled")
VOCABULARY, LENGTH = 4096, 128
AIM = 1.5
_QUICK = ("--model.num_hidden_layers=2", "--model.num_experts=4", "--model.hidden_size=64", "--batch.size=2")
_TOLERANCE = 1e-3


def micro_batches(recipe: Recipe, *, packed: bool) -> list[dict[str, Any]]:
    """Random rows, each one document: end to end, or below each other."""
    draw = np.random.default_rng(0)
    size, micro = recipe.batch.size, min(recipe.batch.micro_size, recipe.batch.size)
    rows = [
        Block(draw.integers(VOCABULARY, size=LENGTH + 1, dtype=np.int32), np.array([LENGTH + 1], dtype=np.int32))
        for _ in range(size)
    ]
    batches = [collate(rows[first : first + micro]) for first in range(0, size, micro)]
    if packed:
        return batches
    return [{name: batch[name].view(-1, LENGTH) for name in ("input_ids", "shift_labels")} for batch in batches]


class Trained:
    """A model in training; a call is a step, and gives its loss."""

    def __init__(self, name: str, changes: Sequence[str], world: World) -> None:
        compiled = [f"--compile={'true' if name == 'compiled' else 'false'}"]
        self.recipe, self.world = read_recipe([str(RECIPE), *changes, *compiled]), world
        fields = dataclasses.asdict(self.recipe.model) | {"vocab_size": VOCABULARY, "eos_token_id": 0}
        del fields["vocab_multiple"]
        self.layout = Layout().resolve(world.size)
        mesh = Mesh(world.device.type, self.layout)
        self.state, self.flops_per_token = build_state(
            self.recipe, MotifConfig(**fields), world, mesh, seq_len=LENGTH, compute="float32"
        )
        if name.startswith("eager"):
            model = self.state.model
            assert isinstance(model, MotifForCausalLM)
            make_plain(model)
        self.batches = micro_batches(self.recipe, packed=name != "eager")
        self.optimizer_seconds: list[float] = []
        self.state.optimizer.step = self._timed(self.state.optimizer.step)  # type: ignore[method-assign]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.recipe.batch.size * LENGTH

    def __call__(self) -> float:
        """One step."""
        found = train_step(
            self.state,
            self.batches,
            world=self.world,
            targets=count_targets(self.batches),
            lr=1e-3,
            clip=self.recipe.optim.clip,
            z_loss_weight=self.recipe.optim.z_loss,
            mtp_loss_weight=self.recipe.optim.mtp_loss,
            expert_bias_rate=self.recipe.experts.bias_rate,
            layout=self.layout,
        )
        return float(found.loss)

    def _timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.process_time()
            result = step(*arguments)
            self.optimizer_seconds.append(time.process_time() - began)
            return result

        return timed


def check(losses: dict[str, list[float]]) -> None:
    """Raise UserError unless all models compute the same."""
    first = next(iter(losses))
    for name, values in losses.items():
        for step, (value, expected) in enumerate(zip(values, losses[first], strict=True)):
            if not abs(value - expected) <= _TOLERANCE * abs(expected):
                raise UserError(
                    f"in step {step + 1} {name} has the loss {value} and {first} {expected}: they are to compute the "
                    "same, and their times mean nothing"
                )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measure, write and print."""
    arguments.device = "cpu"
    device = cli.resolve_device(arguments, ("rounds",))
    env = cli.introduce(MODULE, device, ("motifarch", "torch"), console)
    changes = [*(_QUICK if arguments.quick else ()), *arguments.changes]
    with open_world() as world:
        models = {name: Trained(name, changes, world) for name in dict.fromkeys(arguments.models)}
        losses = {name: [model() for _ in range(2)] for name, model in models.items()}  # what compiles, compiles
        check(losses)
        memory = {name: peak_bytes(model, device) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        names = list(models)
        for i in range(arguments.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                began = time.process_time()
                models[name]()
                seconds[name].append(time.process_time() - began)
    rows = [
        {
            "model": name,
            "tokens_per_step": model.tokens,
            "flops_per_token": model.flops_per_token,
            "parameters": sum(p.numel() for p in model.state.model.parameters()),
            "tokens_per_second": report.spread([model.tokens / s for s in seconds[name]])._asdict(),
            "seconds": seconds[name],
            "optimizer_seconds": model.optimizer_seconds[-arguments.rounds :],
            "peak_bytes": memory[name],
        }
        for name, model in models.items()
    ]
    content = {"benchmark": "motif_3_step", "environment": env, "clock": "process_time", "changes": changes}
    report.write_json(cli.results_path("motif_3_step", arguments, device), content | {"aim": AIM, "results": rows})
    console.print(_table(rows))
    return 0


def _table(rows: list[dict[str, Any]]) -> Any:
    speeds = [row["tokens_per_second"]["median"] for row in rows]
    cells = [
        (
            row["model"],
            f"{report.spread(row['seconds']).median:.3f}",
            f"{report.spread(row['optimizer_seconds']).median:.3f}",
            f"{speed:,.0f}",
            f"{speed / speeds[0]:.2f}",
            f"{row['peak_bytes'] / 2**20:,.1f}",
        )
        for row, speed in zip(rows, speeds, strict=True)
    ]
    columns = ["", "seconds\na step", "of them\noptimizer", "tokens/s", f"times\n{rows[0]['model']}", "MiB"]
    return report.table(f"A step of the tiny Motif-3 recipe (aim: {AIM} times eager)", columns, cells)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser(MODULE, __doc__)
    add = made.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add("--rounds", type=int, default=9, help="timed steps of each; default %(default)s")
    add("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    add("--output", type=Path, help="JSON file; default benchmarks/results/motif_3_step_cpu.json")
    add("--quick", action="store_true", help="a smaller model, a smoke test; writes to runs/ unless told otherwise")
    add("changes", nargs="*", metavar="--field=value", help="after --: recipe fields, for all models")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: run(parser().parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
