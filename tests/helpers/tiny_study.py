"""A head-ratio study small enough to run in seconds, and its command in a process of its own."""

import copy
import sys
from pathlib import Path
from typing import Any

import yaml

GRID: dict[str, Any] = {
    "sizes": [
        {
            "name": "tiny",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "num_noise_heads": 1,
            "intermediate_size": 128,
            "intermediate_multiple": 1,
        }
    ],
    "variants": [{"attention": "softmax_gqa"}, {"attention": "gda", "ratio": 2}],
    "seeds": [0],
    "tokens": 2560,
    "learning_rate": {"given": 3e-3},
    "recipe": {
        "batch": {"size": 4, "micro_size": 4},
        "optim": {"warmup_steps": 2},
        "precision": {"compute": "float32"},
        "checkpoint": {"every": 5},
        "validation": {"every": 10, "sequences": 4},
        "log": {"every": 1, "tensorboard": False},
    },
    "measure": {"samples": 4, "attention_rows": 1, "new_tokens": 2, "repeats": 1},
}


def write_grid(folder: Path, data: Path | str, **changes: Any) -> Path:
    """Writes a grid of two variants, 20 steps each, on prepared data."""
    path = folder / "study.yaml"
    content = copy.deepcopy(GRID) | {"data": {"path": str(data), "seq_len": 32}} | changes
    path.write_text(yaml.safe_dump(content))
    return path


def command(grid: Path, output: Path, *options: str) -> list[str]:
    """The study's command line, for a process."""
    code = "import sys; from motifarch.study.main import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, str(grid), "--output", str(output), *options]
