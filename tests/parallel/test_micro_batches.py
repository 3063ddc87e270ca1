"""What micro-batches send, and what a rank holds between them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.micro_batches import measure_step
from helpers.models import tiny_config
from helpers.tiny import MOTIF_3
from motifarch.parallel import Layout

MICRO_BATCHES, LAYERS = 3, 4
UNITS = LAYERS + 1  # embedding, last norm and head are one more


def measured(
    folder: Path,
    ranks: int,
    layouts: dict[str, Layout],
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    config = config or tiny_config("gda", num_hidden_layers=LAYERS, hidden_size=48).to_dict()
    on_ranks(ranks, measure_step, folder, config, layouts, MICRO_BATCHES, dtype)
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


@pytest.mark.slow
def test_what_is_not_freed_is_gathered_less_often(tmp_path: Path) -> None:
    # Four layers (one of multi-token prediction), of which the second and third have experts.
    layouts = {
        "all freed": Layout(),
        "first half freed": Layout(reshard_after_forward=0.5),
        "none freed": Layout(reshard_after_forward=0.0),
        "experts wait": Layout(reshard_experts=False),
        "once a step": Layout(reshard_after_forward=0.0, reshard_experts=False),
    }
    found = measured(tmp_path, 2, layouts, {"vocab_size": 97, **MOTIF_3})
    gathered = {name: case["calls"]["all-gather over 2"] for name, case in found.items()}
    # The root once a micro-batch; others once each way.
    assert gathered["all freed"] == MICRO_BATCHES * (1 + 2 * (4 + 2))
    assert gathered["first half freed"] == MICRO_BATCHES * (1 + 2 * (2 + 1) + (2 + 1))
    assert gathered["none freed"] == MICRO_BATCHES * (1 + (4 + 2))
    assert gathered["experts wait"] == MICRO_BATCHES * (1 + 2 * 4) + 2 * (MICRO_BATCHES + 1)
    assert gathered["once a step"] == MICRO_BATCHES * (1 + 4) + 2
    for case in found.values():
        assert case["calls"]["reduce-scatter over 2"] == MICRO_BATCHES * (1 + 4 + 2)


def test_what_stays_float32_is_one_message_more_a_layer(tmp_path: Path) -> None:
    found = measured(tmp_path, 2, {"": Layout()}, {"vocab_size": 97, **MOTIF_3}, torch.bfloat16)[""]
    exact = 4 + 2 + 1  # layers, experts, the last norm
    assert found["calls"]["all-gather over 2"] == MICRO_BATCHES * (1 + 2 * (4 + 2 + exact))
    assert found["calls"]["reduce-scatter over 2"] == MICRO_BATCHES * (1 + 4 + 2 + exact)
