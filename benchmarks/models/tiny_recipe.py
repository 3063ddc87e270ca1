"""How recipes/tiny_cpu.yaml was chosen: bits per byte after equal CPU time.

    python -m benchmarks.models.tiny_recipe --seconds 60 --output screen.json
    python -m benchmarks.models.tiny_recipe --seconds 300 --share 1 --only before narrow_128

A short run measures a candidate's tokens a CPU-second, which with `--seconds` gives its steps;
warm-up and decay are shares of them. All compute in float32, for a CPU without bfloat16
instructions, on one thread. Time is the process's own (`time.process_time`), without start,
validation and saving: other work on the machine takes little of it. `make train` has two
processes, which wait for each other besides.

Whatever their tokenizer and length of sequences, candidates have the same documents for
validation, which a hash of their text chooses, and a byte is a byte of that text. `--share 1`
takes all of it, a smaller share blocks from the same places. Shorter sequences give their tokens
less to go by.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import cli, report
from motifarch.errors import UserError

RECIPE = report.ROOT / "recipes" / "tiny_cpu.yaml"
PROBE_STEPS = 8
"""Steps that measure the speed; the first three are for warming up."""


def data(vocab: int, seq_len: int, batch: int) -> dict[str, Any]:
    """What a step reads: the tokenizer's size, a sequence's tokens, sequences."""
    return {"vocab_size": vocab, "seq_len": seq_len, "batch.size": batch, "batch.micro_size": batch}


def model(hidden: int, layers: int, head_dim: int) -> dict[str, Any]:
    """A GDA 4:1 model with one noise head."""
    fields = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    fields |= {"head_dim": head_dim, "initializer_range": round(hidden**-0.5, 3)}
    return {f"model.{name}": value for name, value in fields.items()}


def optim(name: str, lr: float, *, warmup: float = 0.04, decay: float = 0.5) -> dict[str, Any]:
    """An optimizer; warm-up and decay are shares of the steps."""
    return {"optim.name": name, "optim.lr": lr, "warmup": warmup, "decay": decay}


BEFORE = data(4096, 512, 4) | model(256, 4, 64) | optim("adamw", 4e-3, warmup=1 / 30, decay=1 / 3)
BEFORE |= {"model.initializer_range": 0.06, "batch.micro_size": 2}
SMALL_512 = data(4096, 512, 4) | model(128, 4, 32) | optim("muon", 1.2e-2)
SMALL_256 = data(4096, 256, 8) | model(128, 4, 32) | optim("muon", 1.2e-2, decay=0.7)
SMALL_128 = SMALL_256 | data(4096, 128, 16)
NARROW = {"model.intermediate_size": 256}
CANDIDATES: dict[str, dict[str, Any]] = {
    "before": BEFORE,
    "before_muon": BEFORE | {"optim.name": "muon", "optim.lr": 8e-3},
    "small_512_adamw": SMALL_512 | {"optim.name": "adamw", "optim.lr": 8e-3},
    "small_512": SMALL_512,
    "small_512_vocabulary_2048": SMALL_512 | {"vocab_size": 2048},
    "small_512_vocabulary_8192": SMALL_512 | {"vocab_size": 8192},
    "small_256": SMALL_256,
    "small_256_lr_20e-3": SMALL_256 | {"optim.lr": 2e-2},
    "small_256_batch_4": SMALL_256 | data(4096, 256, 4),
    "narrow_256": SMALL_256 | NARROW,
    "small_128": SMALL_128,
    "narrow_128": SMALL_128 | NARROW,
}
"""What each changes in the recipe, which was made of the best of them."""


def tokens_of(name: str) -> tuple[int, int]:
    """A candidate's vocabulary and length of sequences."""
    return CANDIDATES[name]["vocab_size"], CANDIDATES[name]["seq_len"]


def prepare(source: str, vocab: int, seq_len: int, folder: Path) -> None:
    """Prepares the data, where that is not done yet."""
    words = ["--source", source, "--vocab-size", str(vocab), "--seq-len", str(seq_len), "--output", str(folder)]
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
    vocab, seq_len = changes.pop("vocab_size"), changes.pop("seq_len")
    folder = work / f"data_{vocab}_{seq_len}"

    def run(output: Path, steps: int, sequences: int) -> list[dict[str, Any]]:
        fields = changes | {
            "run.output": output,
            "run.steps": steps,
            "data.datasets": f"[{{path: {folder}}}]",
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
    batch = seq_len * changes["batch.size"]
    steps = max(PROBE_STEPS, int(options.seconds * speed / batch))
    blocks = json.loads((folder / "data.json").read_text(encoding="utf-8"))["splits"]["validation"]["blocks"]
    rows = run(work / name, steps, max(1, round(options.share * blocks)))
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
    add("--share", type=float, default=0.25, help="of the validation blocks, evenly spread; default: %(default)g")
    add("--jobs", type=int, default=1, help="candidates trained at once; default: %(default)s")
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
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        work = options.work or Path(temporary)
        for vocab, seq_len in dict.fromkeys(tokens_of(name) for name in options.only):
            prepare(options.source, vocab, seq_len, work / f"data_{vocab}_{seq_len}")
        for model in pool.map(lambda name: measure(name, options, work), options.only):
            content["models"].append(model)
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
