"""Tensor parallelism of Motif-3's parts, against one process."""

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.tensor_parallel import OMISSIONS, compare


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    output = tmp_path_factory.mktemp("tensor") / "differences.pt"
    on_ranks(2, compare, output)
    return torch.load(output)  # type: ignore[no-any-return]


def test_loss_and_gradients_are_those_of_one_process(differences: dict[str, dict[str, float]]) -> None:
    assert len(differences["nothing"]) > 100
    assert max(differences["nothing"].values()) < 1e-12, differences["nothing"]


@pytest.mark.parametrize("omission", OMISSIONS)
def test_every_sum_over_the_ranks_is_needed(differences: dict[str, dict[str, float]], omission: str) -> None:
    assert max(differences[omission].values()) > 1e-3
