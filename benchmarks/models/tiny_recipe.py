"""How recipes/tiny_cpu.yaml was chosen: bits per byte after equal CPU time.

    python -m benchmarks.models.tiny_recipe --seconds 60        # to screen
    python -m benchmarks.models.tiny_recipe --seconds 300 --only before recipe

A short run measures a candidate's tokens a CPU-second, which with `--seconds` gives its steps;
warm-up and decay are shares of them. All compute in float32, for a CPU without bfloat16
instructions, on one thread. Time is the process's own (`time.process_time`), without start,
validation and saving: other work on the machine takes little of it. `make train` has two
processes, which wait for each other besides.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import cli, report
from motifarch.errors import UserError

RECIPE = report.ROOT / "recipes" / "tiny_cpu.yaml"
PROBE_STEPS = 8
"""Steps that measure the speed; the first three are for warming up."""


def model(hidden: int, layers: int, head_dim: int) -> dict[str, Any]:
    """A GDA 4:1 model with one noise head."""
    fields = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    fields |= {"head_dim": head_dim, "initializer_range": round(hidden**-0.5, 3)}
    return {f"model.{name}": value for name, value in fields.items()}


def optim(name: str, lr: float, batch: int, *, warmup: float = 1 / 30, decay: float = 1 / 3) -> dict[str, Any]:
    """An optimizer; warm-up and decay are shares of the steps."""
    sizes = {"batch.size": batch, "batch.micro_size": min(batch, 4), "warmup": warmup, "decay": decay}
    return {"optim.name": name, "optim.lr": lr} | sizes


BEFORE = model(256, 4, 64) | optim("adamw", 4e-3, 4) | {"model.initializer_range": 0.06, "batch.micro_size": 2}
SMALL = model(128, 4, 32)
CANDIDATES: dict[str, dict[str, Any]] = {
    "before": BEFORE,
    "before_muon": BEFORE | {"optim.name": "muon", "optim.lr": 8e-3},
    "small_adamw": SMALL | optim("adamw", 8e-3, 8),
    "small_muon": SMALL | optim("muon", 8e-3, 8),
    "small_muon_lr_16e-3": SMALL | optim("muon", 1.6e-2, 8),
    "small_muon_batch_4": SMALL | optim("muon", 8e-3, 4),
    "recipe": {"warmup": 0.04, "decay": 0.5},
}
"""What each changes in the recipe."""


def prepare(source: str, folder: Path) -> None:
    """Prepares the data, where that is not done yet."""
    words = ["--source", source, "--seq-len", "512", "--output", str(folder)]
    execute([sys.executable, "-m", "motifarch.data.prepare", *words])


def execute(command: list[str]) -> None:
    """Runs a command in a process of its own.

    Raises:
        UserError: it failed; what it said is on the screen.
    """
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"{' '.join(command[:4])} ... failed; what it says is above")


def measure(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trains a candidate for so many CPU-seconds."""
    changes = dict(CANDIDATES[name])
    warmup, decay = changes.pop("warmup"), changes.pop("decay")
    prepare(options.source, work / "data")

    def run(output: Path, steps: int, sequences: int) -> list[dict[str, Any]]:
        fields = changes | {
            "run.output": output,
            "run.steps": steps,
            "data.datasets": f"[{{path: {work / 'data'}}}]",
            "optim.warmup_steps": max(1, round(warmup * steps)),
            "optim.decay_steps": round(decay * steps),
            "precision.compute": "float32",
            "checkpoint.every": steps,
            "validation.every": steps,
            "validation.sequences": sequences,
            "log.every": 1,
            "log.tensorboard": "false",
        }
        words = [str(RECIPE), *(f"--{field}={value}" for field, value in fields.items())]
        # This file, as the process whose clock is its CPU time.
        execute([sys.executable, "-m", "benchmarks.models.tiny_recipe", "--train", *words])
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    probe = run(work / f"{name}_probe", PROBE_STEPS, 1)
    speed = statistics.median(row["tokens_per_second"] for row in probe[3:])
    batch = 512 * int(changes.get("batch.size", 4))
    steps = max(PROBE_STEPS, int(options.seconds * speed / batch))
    rows = run(work / name, steps, options.sequences)
    record = json.loads((work / name / "run.json").read_text(encoding="utf-8"))
    return {
        "model": name,
        "seconds": options.seconds,
        "changes": CANDIDATES[name],
        "parameters": record["parameters"],
        "tokens_per_cpu_second": speed,
        "cpu_seconds": sum(batch / row["tokens_per_second"] for row in rows),
        "steps": steps,
        "tokens": steps * batch,
        "validation_loss": rows[-1]["validation_loss"],
        "bits_per_byte": rows[-1]["validation_bits_per_byte"],
    }


def train(words: list[str]) -> int:
    """`motifarch train` on one thread, with the process's CPU time for a clock."""
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # the clock of the run's metrics
    from motifarch.train.main import main as motifarch_train

    return motifarch_train(words)


def print_table(models: list[dict[str, Any]], console: Console) -> None:
    """What each candidate reached, in how many steps of which speed."""
    fields = ("parameters", "tokens_per_cpu_second", "cpu_seconds", "steps", "tokens")
    rows = [
        (row["model"], *(f"{row[field]:,.0f}" for field in fields), f"{row['bits_per_byte']:.4f}") for row in models
    ]
    names = ["", "parameters", "tokens a\nCPU-second", "CPU-\nseconds", "steps", "tokens", "bits per\nbyte"]
    console.print(report.table("Candidates for the tiny recipe", names, rows))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser("benchmarks.models.tiny_recipe", __doc__)
    add = made.add_argument
    add("--seconds", type=float, default=60, help="CPU-seconds of training for each; default: %(default)g")
    add("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME", help=", ".join(CANDIDATES))
    add("--source", default="stdlib", help="as `motifarch data prepare` takes it; default: %(default)s")
    add("--sequences", type=int, default=160, help="validation sequences; default: %(default)s")
    add("--work", type=Path, help="keep data and runs in this folder; default: a temporary one")
    add("--output", type=Path, default=report.RESULTS / "tiny_recipe_cpu.json", help="JSON file; default: %(default)s")
    return made


def run(options: argparse.Namespace, console: Console) -> int:
    """Train all candidates and report.

    Raises:
        UserError: a run failed.
    """
    content: dict[str, Any] = {"benchmark": "tiny_recipe", "models": []}
    packages = ("torch", "transformers", "motifarch")
    content["environment"] = report.environment("benchmarks.models.tiny_recipe", torch.device("cpu"), packages)
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            console.rule(name)
            content["models"].append(measure(name, options, options.work or Path(temporary)))
            report.write_json(options.output, content)
    print_table(content["models"], console)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--train"]:
        return cli.exit_status(lambda: train(words[1:]))
    return cli.exit_status(lambda: run(parser().parse_args(words), Console()))


if __name__ == "__main__":
    sys.exit(main())
