"""Loads of the small Motif-3's experts, with the bias that balances them and without.

    motifarch data prepare --source stdlib --output data/stdlib --seq-len 128
    python -m benchmarks.models.expert_balance       # two runs of recipes/motif_3/tiny_cpu.yaml

Both runs have the recipe's other balancing, a loss of weight 1e-4. A run in `--work` that has
finished is not trained again. Other work on the machine changes no figure.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import cli, report
from motifarch.errors import UserError
from motifarch.files import read_json
from motifarch.train.run_folder import METRICS, RECORD, read_metrics

RECIPE = report.ROOT / "recipes" / "motif_3" / "tiny_cpu.yaml"
RUNS: dict[str, dict[str, Any]] = {"bias moves": {}, "bias stays 0": {"experts.bias_rate": 0}}
"""What each changes in the recipe."""
FIGURES = {
    "router_load_max_mean": "largest load / mean load",
    "router_load_min_median": "smallest load / median load",
}


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains, and reads what the run says of its experts.

    Raises:
        UserError: it failed; what it said is on the screen.
    """
    output = options.work / name.replace(" ", "_")
    fields = RUNS[name] | {"run.output": output, "log.tensorboard": "false"}
    if options.data:
        fields["data.datasets"] = f"[{{path: {options.data}}}]"
    words = [f"--{field}={value}" for field, value in fields.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "motifarch.train", str(RECIPE), *words, *options.changes]
    if subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
        raise UserError(f"the run {name!r} failed; what it says is above")
    rows = [row for row in read_metrics(output / METRICS) if "router_load_max_mean" in row]
    record = read_json(output / RECORD)
    last = rows[-options.last :]
    layers = [i for i, value in enumerate(rows[0]["router_load_max_mean"]) if value is not None]

    def of_layers(row: dict[str, Any], field: str) -> list[float]:
        return [row[field][i] for i in layers]

    return {
        "run": name,
        "changes": RUNS[name],
        "parameters": record["parameters"],
        "tokens": rows[-1]["targets"],
        "validation_loss": rows[-1].get("validation_loss"),
        "largest_over_mean_in_the_end": max(max(of_layers(row, "router_load_max_mean")) for row in last),
        "smallest_over_median_in_the_end": min(min(of_layers(row, "router_load_min_median")) for row in last),
        "layers": layers,
        "steps": [row["step"] for row in rows],
        **{field: [of_layers(row, field) for row in rows] for field in (*FIGURES, "router_bias_range")},
    }


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """A panel for each figure: a line for each layer, a colour for each run."""
    figure, axes = report.figure(1, 2, size=(10, 4))
    for axis, (field, label) in zip(axes[0], FIGURES.items(), strict=True):
        for run, colour in zip(runs, (report.COLOURS[0], report.COLOURS[4]), strict=False):
            for i, values in enumerate(zip(*run[field], strict=True)):
                style = ("-", "--", ":", "-.")[i % 4]
                name = f"{run['run']}, layer {run['layers'][i]}"
                axis.plot(run["steps"], values, style, color=colour, linewidth=1.2, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].axhline(1.5, color=report.GREY, linewidth=0.8)
    axes[0, 0].set_ylim(bottom=1)
    axes[0, 1].set_ylim(0, 1)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    report.write_plot(path, figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser("benchmarks.models.expert_balance", __doc__)
    add = made.add_argument
    add("--work", type=Path, default=report.ROOT / "runs" / "expert_balance", help="runs' folder; default: %(default)s")
    add("--data", type=Path, help="prepared data in place of the recipe's")
    add("--last", type=int, default=10, help="reports that are the end of a run; default: %(default)s")
    add(
        "--output",
        type=Path,
        default=report.RESULTS / "expert_balance_cpu.json",
        help="JSON file; default: %(default)s",
    )
    add("changes", nargs="*", metavar="--field=value", help="after --: recipe fields, for both runs")
    return made


def run(options: argparse.Namespace, console: Console) -> int:
    """Train both and report.

    Raises:
        UserError: a run failed.
    """
    content: dict[str, Any] = {"benchmark": "expert_balance", "runs": []}
    packages = ("torch", "transformers", "motifarch")
    content["environment"] = report.environment("benchmarks.models.expert_balance", torch.device("cpu"), packages)
    for name in RUNS:
        console.rule(name)
        content["runs"].append(train(name, options))
    report.write_json(options.output, content)
    plot(options.output.with_suffix(".png"), content["runs"])
    columns = ["", "validation\nloss", "largest load\n/ mean", "smallest load\n/ median"]
    rows = [
        (
            found["run"],
            f"{found['validation_loss'] or float('nan'):.3f}",
            f"{found['largest_over_mean_in_the_end']:.2f}",
            f"{found['smallest_over_median_in_the_end']:.2f}",
        )
        for found in content["runs"]
    ]
    console.print(report.table(f"Worst layer in the last {options.last} reports", columns, rows))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: run(parser().parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
