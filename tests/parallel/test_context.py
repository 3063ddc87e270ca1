"""Context parallelism of Motif-3's parts, against one process."""

import pytest
import torch

from helpers.context_parallel import OMISSIONS, compare
from helpers.distributed import on_ranks
from motifarch.layers import IGNORE_INDEX
from motifarch.parallel import shard_sequence


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    output = tmp_path_factory.mktemp("context") / "differences.pt"
    on_ranks(2, compare, output)
    return torch.load(output)  # type: ignore[no-any-return]


def test_loss_and_gradients_are_those_of_one_process(differences: dict[str, dict[str, float]]) -> None:
    for name in ("nothing", "nothing, of one sequence"):
        assert len(differences[name]) > 100
        assert max(differences[name].values()) < 1e-12, differences[name]


@pytest.mark.parametrize("omission", OMISSIONS)
def test_every_exchange_is_needed(differences: dict[str, dict[str, float]], omission: str) -> None:
    assert max(differences[omission].values()) > 1e-3


def test_parts_have_the_targets_of_the_whole_row() -> None:
    bounds = torch.tensor([0, 4, 6, 8], dtype=torch.int32)
    none = IGNORE_INDEX
    labels = torch.tensor([[1, 2, 3, none, 5, none, 7, none]])
    batch = {"input_ids": torch.arange(8)[None], "position_ids": torch.zeros(1, 8), "shift_labels": labels}
    batch |= {"cu_seq_lens_q": bounds}
    parts = [shard_sequence(batch, rank, 4) for rank in range(4)]
    assert [p["shift_labels"].tolist() for p in parts] == [[[1, 2]], [[3, none]], [[5, none]], [[7, none]]]
    # The first document lies on two ranks: its second token's next but one is the other's.
    assert [p["mtp_labels"].tolist() for p in parts] == [[[2, 3]], [[none, none]], [[none, none]], [[none, none]]]
    assert [p["next_input_ids"].tolist() for p in parts] == [[[2]], [[]], [[]], [[]]]
    assert all(p["cu_seq_lens_q"] is bounds for p in parts)
    assert shard_sequence(batch, 0, 1) is batch
