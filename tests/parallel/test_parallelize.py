"""Sharded training against the same maths on one process, and against DDP."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.sharded_training import CLIP, LR, Z_LOSS, build_model, loader, skip_one_step, train_ddp, train_sharded
from motifarch.optim import build_adamw, clip_gradients


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """One process, no sharding library at all, the whole batch in one call."""
    model = build_model().train()
    optimizer = build_adamw(model, lr=LR)
    history = []
    for _, (batch,) in loader(data, 0, 1, 8):
        out = model(**batch, z_loss_weight=Z_LOSS)
        out.loss.backward()
        norm = clip_gradients(model.parameters(), CLIP)
        history.append([(out.loss - out.z_loss).item(), out.z_loss.item(), norm.item()])
        optimizer.step()
        optimizer.zero_grad()
    return history, model.state_dict()


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("ranks", "micro", "options"),
    [
        (1, 8, {}),
        (1, 2, {}),  # four micro-batches accumulated
        (1, 3, {}),  # the last one smaller
        (2, 2, {}),
        (2, 4, {"activation_checkpointing": "full"}),
    ],
)
def test_sharded_equals_one_process(
    data: Path, tmp_path: Path, reference: tuple[Any, Any], ranks: int, micro: int, options: dict[str, Any]
) -> None:
    train = partial(train_sharded, data, tmp_path / "sharded.pt", micro, options)
    on_ranks(ranks, train) if ranks > 1 else train()
    assert_same(torch.load(tmp_path / "sharded.pt"), reference)


def test_sharded_equals_ddp(data: Path, tmp_path: Path, reference: tuple[Any, Any]) -> None:
    on_ranks(2, train_ddp, data, tmp_path / "ddp.pt")
    assert_same(torch.load(tmp_path / "ddp.pt"), reference)


def test_untied_embeddings_and_bfloat16(data: Path, tmp_path: Path) -> None:
    train_sharded(data, tmp_path / "f.pt", 4, {"tied": False})
    train_sharded(data, tmp_path / "b.pt", 4, {"tied": False, "compute_dtype": torch.bfloat16})
    (exact, weights), (rounded, rounded_weights) = torch.load(tmp_path / "f.pt"), torch.load(tmp_path / "b.pt")
    assert "lm_head.weight" in weights
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert {v.dtype for v in rounded_weights.values()} == {torch.float32}
    assert exact != rounded
    # bfloat16 keeps 8 bits: losses of about 6 agree to a few hundredths.
    torch.testing.assert_close(torch.tensor(exact)[:, 0], torch.tensor(rounded)[:, 0], rtol=0, atol=0.05)


def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(data: Path) -> None:
    on_ranks(2, skip_one_step, data)
