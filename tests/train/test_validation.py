"""The validation loss is the same mean for any number of ranks."""

from pathlib import Path

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.sharded_training import build_model, validate
from motifarch.data import PackedDataset, collate


@pytest.mark.parametrize(("ranks", "sequences"), [(1, 5), (1, 1000), (2, 5)])
def test_it_is_the_mean_over_targets(data: Path, tmp_path: Path, ranks: int, sequences: int) -> None:
    # Five rows in micro-batches of two leave one of two ranks without rows at the end.
    arguments = (data, tmp_path / "loss.pt", sequences)
    on_ranks(ranks, validate, *arguments) if ranks > 1 else validate(*arguments)
    dataset = PackedDataset.open(data, "validation")
    count = min(len(dataset), sequences)
    rows = [dataset[i * len(dataset) // count] for i in range(count)]
    with torch.no_grad():
        expected = build_model().eval()(**collate(rows)).loss
    assert torch.load(tmp_path / "loss.pt") == pytest.approx(expected.item(), abs=1e-5)
