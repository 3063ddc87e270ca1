"""The mean of checkpoints against a plain mean of their tensors."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from motifarch.errors import UserError
from motifarch.optim import CheckpointMean


@pytest.fixture
def saved(tmp_path: Path) -> tuple[list[Path], list[dict[str, torch.Tensor]]]:
    """Three checkpoints of the same names, with values of very different size."""
    torch.manual_seed(0)
    folders, contents = [], []
    for i in range(3):
        weights = {"layer.weight": torch.randn(7, 5) * 10.0 ** (4 * i), "layer.bias": torch.randn(5)}
        dcp.save(
            {"model": weights, "optimizer": {"moment": torch.ones(3)}}, checkpoint_id=tmp_path / str(i), no_dist=True
        )
        folders.append(tmp_path / str(i))
        contents.append(weights)
    return folders, contents


def test_it_is_the_mean(saved: tuple[list[Path], list[dict[str, torch.Tensor]]]) -> None:
    folders, contents = saved
    mean = CheckpointMean(folders)
    assert {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in mean.weights().items()} == {
        "layer.weight": ((7, 5), torch.float32, "meta"),
        "layer.bias": ((5,), torch.float32, "meta"),
    }
    expected = {name: torch.stack([c[name].double() for c in contents]).mean(0).float() for name in contents[0]}
    like = {name: torch.zeros_like(value) for name, value in expected.items()}
    for name, value in mean.mean(like).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=0)
        assert not like[name].any()
    backwards = CheckpointMean(folders[::-1]).mean(like)
    assert all(torch.equal(value, backwards[name]) for name, value in mean.mean(like).items())


@pytest.mark.parametrize("budget", [1, 10**9])
def test_filling_in_small_and_large_pieces(
    saved: tuple[list[Path], list[dict[str, torch.Tensor]]], budget: int
) -> None:
    folders, contents = saved
    model = {name: torch.zeros_like(value) for name, value in contents[0].items()}
    mean = CheckpointMean(folders[:2])
    mean.fill(model, budget)
    for name, value in mean.mean(contents[0]).items():
        assert torch.equal(model[name], value)
        assert model[name].any()


def test_a_checkpoint_of_another_model_is_refused(
    saved: tuple[list[Path], list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    dcp.save({"model": {"layer.weight": torch.ones(7, 5)}}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(UserError, match=r"layer\.bias"):
        CheckpointMean([saved[0][0], tmp_path / "other"]).mean({"layer.bias": torch.zeros(5)})
