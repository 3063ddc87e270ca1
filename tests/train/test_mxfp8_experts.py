"""Runs with experts in emulated MXFP8: they train, and what is not finite reaches no checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.emulated_experts import MODEL, run
from helpers.tiny import write_recipe
from motifarch.train.manifest import checkpoint_name, list_checkpoints
from motifarch.train.run_folder import read_metrics

pytest.importorskip("torchao", reason="needs torchao (pip install 'motifarch[low-precision]')")

PRECISION = {"compute": "bfloat16", "matmul": "mxfp8"}


def train(folder: Path, data: Path, steps: int, *troubles: str, **sections: Any) -> tuple[list[dict[str, Any]], str]:
    """The metrics of a run on two ranks with a checkpoint a step, and what rank 0 printed."""
    folder.mkdir()
    sections = {"model": MODEL, "precision": PRECISION, "checkpoint": {"every": 1, "keep_last": 0}} | sections
    optim = {"lr": 3e-3, "schedule": "constant", "warmup_steps": 2}
    recipe = write_recipe(folder, data, optim=optim, log={"every": 1, "tensorboard": False}, **sections)
    options = ["--run.steps", str(steps), "--validation.every", "0"]
    on_ranks(2, run, folder, [str(recipe), *options], list(troubles))
    rows = read_metrics(folder / "run/metrics.jsonl")
    return rows, (folder / "printed_by_0").read_text()


def saved(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint's files hold, whole, by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "run/checkpoints" / checkpoint_name(step), folder / f"{step}.pt")
    return torch.load(folder / f"{step}.pt")  # type: ignore[no-any-return]


def tensors(content: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All in nested dictionaries."""
    if isinstance(content, dict):
        return {n: t for key, value in content.items() for n, t in tensors(value, f"{name}.{key}").items()}
    return {name: content} if isinstance(content, torch.Tensor) else {}


def assert_finite(folder: Path, steps: range) -> None:
    assert sorted(path.name for path in list_checkpoints(folder / "run")) == [checkpoint_name(step) for step in steps]
    for step in steps:
        found = tensors(saved(folder, step))
        assert len(found) > 100
        for name, tensor in found.items():
            assert tensor.isfinite().all(), (step, name)


@pytest.mark.nightly
def test_training_is_near_bfloat16(tmp_path: Path, data: Path) -> None:
    few: dict[str, Any] = {"checkpoint": {"every": 20}}
    exact, _ = train(tmp_path / "bf16", data, 20, precision=PRECISION | {"matmul": "compute"}, **few)
    rounded, _ = train(tmp_path / "mxfp8", data, 20, **few)
    before, after = ([row["loss"] for row in rows] for rows in (exact, rounded))
    assert before != after
    assert before[0] - before[-1] > 0.5
    # Losses of 4 to 6 nats; two layers of four round to three bits.
    assert after == pytest.approx(before, abs=0.03)


@pytest.mark.nightly
def test_experts_on_other_ranks_train_alike(tmp_path: Path, data: Path) -> None:
    few: dict[str, Any] = {"checkpoint": {"every": 20}}
    whole, _ = train(tmp_path / "whole", data, 6, **few)
    spread, _ = train(tmp_path / "spread", data, 6, parallel={"expert": 2}, **few)
    # Blocks of 32 rows are others, for rows of both ranks come together.
    assert [row["loss"] for row in spread] == pytest.approx([row["loss"] for row in whole], abs=0.01)


def test_a_block_that_is_not_finite_is_skipped_on_all_ranks(tmp_path: Path, data: Path) -> None:
    rows, said = train(tmp_path / "run", data, 4, "nan in w2:2")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0]
    assert "1 step skipped" in said
    assert "status 0" in said
    assert_finite(tmp_path / "run", range(1, 5))
    before, after = (tensors({k: saved(tmp_path / "run", step)[k] for k in ("model", "optimizer")}) for step in (2, 3))
    assert before.keys() == after.keys()
    for wanted in ("experts.down_proj", "exp_avg_sq", "expert_bias"):
        assert any(wanted in name for name in before), wanted
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    last = tensors(saved(tmp_path / "run", 4)["model"])
    assert not all(
        torch.equal(tensor, last[name]) for name, tensor in tensors(saved(tmp_path / "run", 3)["model"]).items()
    )


@pytest.mark.nightly
def test_without_the_guard_nothing_of_it_is_saved(tmp_path: Path, data: Path) -> None:
    _, said = train(tmp_path / "run", data, 4, "nan in w2:2", "no guard")
    assert "is not finite after step 3, so nothing is saved" in said
    assert_finite(tmp_path / "run", range(1, 3))


@pytest.mark.nightly
def test_rows_that_no_product_writes_enter_nothing(tmp_path: Path, data: Path) -> None:
    clean, _ = train(tmp_path / "clean", data, 3)
    unwritten, said = train(tmp_path / "unwritten", data, 3, "unwritten rows")
    assert "skipped" not in said
    for name in ("loss", "grad_norm", "skipped"):
        assert [row[name] for row in unwritten] == [row[name] for row in clean]
    assert_finite(tmp_path / "unwritten", range(1, 4))
    found, expected = tensors(saved(tmp_path / "unwritten", 3)), tensors(saved(tmp_path / "clean", 3))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
