"""Rows dealt by their attention work: a run's losses stay the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.distributed import train
from helpers.tiny import MOTIF_3, SHORT_RUN, write_recipe
from motifarch.data import AttentionWork, BatchSchedule, Mixture, MixtureComponent, PackedDataset
from motifarch.data.balance import deal
from motifarch.train.run_folder import read_metrics


@pytest.mark.parametrize(
    ("ranks", "layout", "model"),
    [
        (2, {}, {}),
        pytest.param(2, {}, MOTIF_3, marks=pytest.mark.slow),
        pytest.param(4, {"context": 2}, {}, marks=pytest.mark.slow),
    ],
)
def test_losses_are_the_same_but_for_rounding(
    tmp_path: Path, data: Path, ranks: int, layout: dict[str, int], model: dict[str, Any]
) -> None:
    found = {}
    for balance in ("false", "true"):
        folder = tmp_path / balance
        folder.mkdir()
        sections = {"model": model} if model else {}
        # Three rows a rank, two at once: the last micro-batch is a smaller one.
        batch = {"size": 3 * ranks // layout.get("context", 1), "micro_size": 2}
        recipe = write_recipe(folder, data, parallel=layout, batch=batch, **sections)
        train(ranks, folder, recipe, *SHORT_RUN, "--batch.balance", balance)
        found[balance] = [(row["loss"], row["grad_norm"]) for row in read_metrics(folder / "run/metrics.jsonl")]
    assert len(found["true"]) == 4
    np.testing.assert_allclose(found["true"], found["false"], rtol=0, atol=1e-5)
    # Rows were dealt another way, though sums of so few may round to the same.
    rows = Mixture(
        [MixtureComponent(dataset := PackedDataset.open(data))], seed=0, batch_schedule=BatchSchedule(batch["size"])
    ).global_batch(0)
    work = AttentionWork([(-1, -1)])
    assert deal([work(dataset.document_lengths(row)) for _, row in rows], 2, 2) != [[0, 1, 2], [3, 4, 5]]
