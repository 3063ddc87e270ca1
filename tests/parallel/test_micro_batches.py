"""What micro-batches send, and what a rank holds between them."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import on_ranks
from helpers.micro_batches import measure_step
from helpers.models import tiny_config
from motifarch.parallel import Layout

MICRO_BATCHES, LAYERS = 3, 4
UNITS = LAYERS + 1  # embedding, last norm and head are one more


def measured(folder: Path, ranks: int, layouts: dict[str, Layout]) -> dict[str, Any]:
    config = tiny_config("gda", num_hidden_layers=LAYERS, hidden_size=48).to_dict()
    on_ranks(ranks, measure_step, folder, config, layouts, MICRO_BATCHES)
    return json.loads((folder / "0.json").read_text())  # type: ignore[no-any-return]


def assert_only_shards_wait(found: dict[str, Any], shards: int) -> None:
    first, *later = found["held"]
    for held in later:
        # Gradients in float32, and metrics.
        assert 0.9 <= (held - first) / (found["whole"] / shards) <= 1.1


def test_gradients_are_sharded_after_each_micro_batch_and_averaged_over_copies_once(tmp_path: Path) -> None:
    found = measured(tmp_path, 2, {"fsdp": Layout(), "copies": Layout(replicate=2)})
    assert found["fsdp"]["calls"]["reduce-scatter over 2"] == MICRO_BATCHES * UNITS
    assert_only_shards_wait(found["fsdp"], shards=2)
    # Besides the units: losses, the gradient norm.
    assert found["copies"]["calls"]["all-reduce over 2"] == UNITS + found["fsdp"]["calls"]["all-reduce over 2"]


@pytest.mark.slow
def test_shards_and_copies(tmp_path: Path) -> None:
    found = measured(tmp_path, 4, {"hsdp": Layout(replicate=2)})["hsdp"]
    assert found["calls"]["reduce-scatter over 2"] == MICRO_BATCHES * UNITS
    assert found["calls"]["all-reduce over 2"] == UNITS
    assert_only_shards_wait(found, shards=2)
