"""Short fine-tuning runs on conversations."""

from pathlib import Path
from typing import Any

from helpers.distributed import train
from motifarch.train.run_folder import read_metrics

SEQ_LEN = 64


def fine_tune(ranks: int, recipe: Path, output: Path, chats: Path, base: Path, *options: Any) -> list[dict[str, Any]]:
    """Eight steps on conversations, from a model's folder, with a checkpoint every four; gives the
    metrics.
    """
    output.parent.mkdir(exist_ok=True)
    own = ("--run.output", output, "--run.init_from", base, "--data.datasets", f"[{{path: {chats}}}]")
    steps = ("--run.steps", "8", "--checkpoint.every", "4", "--validation.every", "8", "--optim.warmup_steps", "1")
    train(ranks, output.parent, recipe, *own, *steps, *map(str, options))
    return read_metrics(output / "metrics.jsonl")
