"""A grown model against one from scratch: the same layout, the same data, equal tokens.

    motifarch data prepare --source stdlib --output data/stdlib_512 --seq-len 512
    python -m benchmarks.models.growth               # about ten minutes on two cores
    python -m benchmarks.models.growth --small-steps 20 --steps 20 --every 10

A small model (GDA 1:1) is trained, then grown as Motif-2-12.7B was grown from Motif-2.6B: hidden
and intermediate size doubled, signal heads multiplied by four (GDA 4:1), a quarter more layers, the
output projection untied. The grown model goes on training, on data that the small one has not seen.
A model of the large layout is trained from scratch for as many tokens as both together. All runs
use one recipe: AdamW at a constant rate after a warm-up, so that losses can be compared at any
number of tokens; each begins with a fresh optimizer.

The plot has the validation losses three times: against the large model's own tokens, against all
tokens (the small model's included), and against all FLOPs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from benchmarks.lib import cli, report
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.growth import Factors, Noise, grow
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.train.run_folder import METRICS, RECORD, read_metrics

RUNS = {"small": "small model", "grown": "grown from it", "scratch": "from scratch"}
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
# Matrices are drawn with a standard deviation of hidden_size ** -0.5.
SMALL = dict(zip(_FIELDS, (128, 384, 4, 2, True), strict=True)) | {"initializer_range": 0.088}
LARGE = dict(zip(_FIELDS, (256, 768, 5, 5, False), strict=True)) | {"initializer_range": 0.0625}
SHARED: dict[str, Any] = {"attention_type": "gda", "hidden_act": "poly_norm"}
SHARED |= {"num_noise_heads": 1, "num_key_value_heads": 2, "head_dim": 64}
BATCH = 4
GROWTH = Factors(hidden=2, feed_forward=2, signal_heads=4, layers=5, untie=True)
AXES = {
    "large tokens": (1e6, "million tokens, the large model's own"),
    "tokens": (1e6, "million tokens, the small model's included"),
    "flops": (1e12, "TFLOP of training, the small model's included"),
}


def check(options: argparse.Namespace) -> None:
    """Check what the command line says.

    Raises:
        UserError: a number that has no meaning, or data that is not there.
    """
    for name in ("small_steps", "steps", "every", "threads"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1")
        if name.endswith("steps") and value % options.every:
            raise UserError(
                f"{option} is {value}, no multiple of --every {options.every}: losses are compared where all runs have "
                "one"
            )
    if not (Path(options.data) / "data.json").is_file():
        raise UserError(
            f"--data {options.data} holds no prepared data; make it with `motifarch data prepare --source stdlib "
            f"--output {options.data} --seq-len 512`"
        )


def recipe(options: argparse.Namespace, run: str, folder: Path) -> dict[str, Any]:
    """The recipe of a run, for `motifarch train`."""
    own, small, every = options.steps, options.small_steps, options.every
    steps = {"small": small, "grown": own, "scratch": small + own}[run]
    return {
        # The seed chooses the data's order as well: the grown model reads another.
        "run": {"steps": steps, "seed": options.seed + (run == "grown"), "output": str(folder / run)}
        | ({"init_from": str(folder / "large")} if run == "grown" else {}),
        "model": SHARED | (SMALL if run == "small" else LARGE),
        "data": {"datasets": [{"path": options.data}]},
        "batch": {"size": BATCH, "micro_size": BATCH},
        "optim": {"lr": options.lr, "schedule": "constant", "warmup_steps": min(20, steps // 2), "z_loss": 1e-4},
        "precision": {"compute": "float32"},
        "checkpoint": {"every": steps, "keep_last": 1},
        "validation": {"every": every, "sequences": 32},
        "log": {"every": every, "tensorboard": False},
    }


def train(options: argparse.Namespace, run: str, folder: Path) -> dict[str, Any]:
    """Train a model.

    Returns:
        Its size, and its validation losses with the steps, tokens and FLOPs before each.

    Raises:
        UserError: the run failed; what it said is on the screen.
    """
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(recipe(options, run, folder)), encoding="utf-8")
    # A process of its own: a run opens a process group and ends with its process.
    command = [sys.executable, "-m", "motifarch.train", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if subprocess.run(command, env=environment, check=False).returncode:
        raise UserError(f"the run {run!r} failed; what it says is above")
    record = json.loads((folder / run / RECORD).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig(**record["model_config"]))
    seq_len = json.loads((Path(options.data) / "data.json").read_text(encoding="utf-8"))["seq_len"]
    tokens = BATCH * seq_len
    flops = tokens * model.flops_per_token(seq_len)
    rows = [row for row in read_metrics(folder / run / METRICS) if "validation_loss" in row]
    return {
        "parameters": model.num_parameters(),
        "steps": [row["step"] for row in rows],
        "tokens": [row["step"] * tokens for row in rows],
        "flops": [row["step"] * flops for row in rows],
        "loss": [row["validation_loss"] for row in rows],
    }


def print_table(content: dict[str, Any], console: Console) -> None:
    """Losses at equal tokens, counted both ways, and what each cost."""
    small, grown, scratch = (content["runs"][run] for run in RUNS)
    at = scratch["steps"].index(content["setup"]["steps"])
    fields = ("tokens", "flops", "loss")
    both = [small[f][-1] + grown[f][-1] for f in ("tokens", "flops")]
    found = {
        "small model": [small[f][-1] for f in fields],
        "grown from it, both counted": [*both, grown["loss"][-1]],
        "from scratch, the grown model's own tokens": [scratch[f][at] for f in fields],
        "from scratch, both models' tokens": [scratch[f][-1] for f in fields],
    }
    rows = [(label, f"{t / 1e6:.3f}", f"{f / 1e12:.1f}", f"{loss:.4f}") for label, (t, f, loss) in found.items()]
    sizes = [f"{model['parameters'] / 1e6:.2f}" for model in (small, grown)]
    title = f"{' -> '.join(sizes)} million parameters, {content['setup']['data']}"
    console.print(report.table(title, ["", "million\ntokens", "TFLOP\n", "validation\nloss"], rows))
    moved, spread = content["growth"]["logits"]["largest"], content["growth"]["logits"]["spread"]
    console.print(f"Logits moved by at most {moved:.1e} in growing (their standard deviation is {spread:.2g}).")


def draw(content: dict[str, Any], path: Path) -> None:
    """The validation losses against tokens and FLOPs."""
    figure, axes = report.figure(1, 3, size=(13, 4.4))
    colours = {"small": report.GREY, "grown": report.COLOURS[0], "scratch": report.COLOURS[4]}
    runs = content["runs"]
    for axis, (name, (unit, label)) in zip(axes[0], AXES.items(), strict=True):
        field = "flops" if name == "flops" else "tokens"
        # The grown model begins where the small one ended: growing keeps what it computes.
        before = 0 if name == "large tokens" else runs["small"][field][-1]
        grown = (
            [before, *(before + x for x in runs["grown"][field])],
            [runs["small"]["loss"][-1], *runs["grown"]["loss"]],
        )
        curves = {run: (runs[run][field], runs[run]["loss"]) for run in RUNS} | {"grown": grown}
        for run, (places, losses) in curves.items():
            if run != "small" or name != "large tokens":
                x = [place / unit for place in places]
                axis.plot(x, losses, color=colours[run], marker="o", markersize=3, label=RUNS[run])
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.sharey(axes[0][0])
    axes[0][0].set_ylabel("validation loss (nats/token)")
    axes[0][1].legend()
    small, large = (runs[run]["parameters"] / 1e6 for run in ("small", "grown"))
    title = f"{small:.2f} million parameters grown to {large:.2f} million"
    figure.suptitle(f"{title}\n{report.describe(content['environment'])}", fontsize=9)
    report.write_plot(path, figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser("benchmarks.models.growth", __doc__)
    add = made.add_argument
    add("--data", default="data/stdlib_512", help="prepared data; default: %(default)s")
    add("--small-steps", type=int, default=400, help="of the small model; default: %(default)s")
    add("--steps", type=int, default=200, help="of the grown model; default: %(default)s")
    add("--every", type=int, default=25, help="steps between validations; default: %(default)s")
    add("--noise", type=float, default=0.05, help="as `motifarch grow` takes it; default: %(default)s")
    add("--lr", type=float, default=3e-3, help="learning rate of all runs; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--threads", type=int, default=2, help="CPU threads; default: %(default)s")
    add("--work", type=Path, help="keep the runs in this folder; default: a temporary one")
    add("--output", type=Path, default=report.RESULTS / "growth_cpu.json", help="JSON file, a plot beside it")
    return made


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train, grow and report.

    Raises:
        UserError: an option has no meaning, or a run failed.
    """
    check(arguments)
    torch.set_num_threads(arguments.threads)
    packages = ("torch", "transformers", "motifarch")
    environment = report.environment("benchmarks.models.growth", torch.device("cpu"), packages)
    names = ("data", "small_steps", "steps", "every", "noise", "seed", "lr", "threads")
    setup = {name: getattr(arguments, name) for name in names} | {"batch": BATCH}
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for run_, label in RUNS.items():
            if run_ == "grown":
                export(folder / "small", folder / "exported")
                noise = Noise(arguments.noise, arguments.seed) if arguments.noise else None
                grow(folder / "exported", folder / "large", GROWTH, noise=noise)
            console.rule(label)
            runs[run_] = train(arguments, run_, folder)
        growth = json.loads((folder / "large" / "growth.json").read_text(encoding="utf-8"))
    content = {"benchmark": "growth", "environment": environment, "setup": setup, "runs": runs}
    content["growth"] = {name: growth[name] for name in ("steps", "logits")}
    print_table(content, console)
    report.write_json(arguments.output, content)
    draw(content, arguments.output.with_suffix(".png"))
    console.print(f"{arguments.output} and {arguments.output.with_suffix('.png').name}", soft_wrap=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: run(parser().parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
