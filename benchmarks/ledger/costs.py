"""What a ledger costs: hashing while a checkpoint is saved, and verifying a chain of many saves.

    python -m benchmarks.ledger.costs                     # 1 GB a save; 1,000 saves of a tiny run
    python -m benchmarks.ledger.costs --saves 20 --megabytes 64 --output runs/ledger_costs.json

Saves write float32 matrices of a model's widths, weights and two moments each, to the disk of
--work, with the hashes of their tensors and without by turns; both hash the files as checkpoints
have done before. The chain is a real run's that saves after each step and keeps all.
"""

import argparse
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
import yaml
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner

from benchmarks.lib import cli, report
from motifarch.data.prepare import main as prepare
from motifarch.train import checkpoint
from motifarch.train.main import main as train
from motifarch.train.saved_hashes import HashingPlanner
from motifarch.verify.links import chain_of, verify_links

_TINY = {
    "model": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 10,
        "num_noise_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "batch": {"size": 2, "micro_size": 2},
    "optim": {"warmup_steps": 5},
    "checkpoint": {"every": 1, "keep_last": 0},
    "validation": {"every": 0},
    "log": {"every": 100, "tensorboard": False},
}


class _WithoutHashes(HashingPlanner):
    """Gives what is to be written, and hashes nothing."""

    def __init__(self, planner: SavePlanner) -> None:
        super().__init__(planner)
        self.resolve_data = planner.resolve_data  # type: ignore[method-assign]


def matrices(megabytes: int) -> dict[str, Tensor]:
    """Attention's and the feed-forward's of layers of 2,048 channels, with moments."""
    shapes = {"q_proj": (2560, 2048), "o_proj": (2048, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192)}
    found: dict[str, Tensor] = {}
    while sum(t.nbytes for t in found.values()) < megabytes * 10**6:
        layer = len(found) // (3 * len(shapes))
        for name, shape in shapes.items():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                found[f"layers.{layer}.{name}.{kind}"] = torch.randn(shape)
    return found


def seconds_of_save(tensors: dict[str, Tensor], work: Path, planner: type[HashingPlanner]) -> float:
    """Seconds of a checkpoint's save, from the first byte to the folder's name."""
    final = work / "step_00000001"
    shutil.rmtree(final, ignore_errors=True)
    begin = time.perf_counter()
    with warnings.catch_warnings(), patch.object(checkpoint, "HashingPlanner", planner):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = checkpoint.CheckpointWriter(final, 1, {})
        dcp.save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(), no_dist=True)
    return time.perf_counter() - begin


def chain(saves: int, work: Path) -> Path:
    """The folder of a run with so many saves, made unless it is there."""
    if not (work / "run").exists():
        options = {"source": "stdlib", "max-documents": "300", "vocab-size": "512", "seq-len": "64", "num-proc": "1"}
        options["output"] = str(work / "data")
        prepare([word for name, value in options.items() for word in (f"--{name}", value)])
    recipe = _TINY | {
        "run": {"steps": saves, "output": str(work / "run")},
        "data": {"datasets": [{"path": str(work / "data")}]},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if train([str(work / "recipe.yaml")]):
        raise RuntimeError("the run was stopped; the same command goes on with it")
    return work / "run"


def taken(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measures, and writes the JSON file."""
    environment = cli.introduce("benchmarks.ledger.costs", torch.device("cpu"), ("torch", "blake3"), console)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tensors = matrices(arguments.megabytes)
    planners = {"with hashes": HashingPlanner, "without": _WithoutHashes}
    seconds: dict[str, list[float]] = {name: [] for name in planners}
    for i in range(arguments.rounds + 1):
        for name in sorted(planners, reverse=bool(i % 2)):
            took = seconds_of_save(tensors, arguments.work, planners[name])
            if i:  # the first warms up
                seconds[name].append(took)
    saved = {name: report.spread(values) for name, values in seconds.items()}
    size = sum(t.nbytes for t in tensors.values())
    folder = chain(arguments.saves, arguments.work)
    verified = [taken(lambda: verify_links(folder)) for _ in range(3)]
    entries, ledger = len(chain_of(folder)[1]), folder / "ledger" / "entries.jsonl"
    failed = len(verify_links(folder).failed)
    content = {
        "environment": environment,
        "save": {"bytes": size, "seconds": {name: value._asdict() for name, value in saved.items()}},
        "verify": {"entries": entries, "failed": failed, "seconds": min(verified), "bytes": ledger.stat().st_size},
    }
    report.write_json(arguments.output, content)
    rows = [[name, f"{s.median:.2f} ({s.lower:.2f} to {s.upper:.2f})"] for name, s in saved.items()]
    console.print(report.table(f"A save of {size / 1e9:.1f} GB", ["", "seconds"], rows))
    console.print(f"hashes add {saved['with hashes'].median / saved['without'].median - 1:+.1%}")
    console.print(f"{entries:,} entries verified in {min(verified):.1f} s; {failed} checks fail")
    console.print(f"wrote {arguments.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The benchmark's command line; returns the exit status."""
    parser = cli.bare_parser("benchmarks.ledger.costs", __doc__)
    add = parser.add_argument
    add("--megabytes", type=int, default=1000, help="of a save; default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--saves", type=int, default=1000, help="of the chain; default: %(default)s")
    add("--work", type=Path, default=report.ROOT / "runs" / "ledger_costs", help="folder for data, run and saves")
    add("--output", type=Path, default=report.RESULTS / "ledger_costs_cpu.json", help="JSON file")
    return cli.exit_status(lambda: run(parser.parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
