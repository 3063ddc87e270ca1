"""Moments in CPU memory: the same bits, checkpoints and skipped steps."""

import math
from typing import Any

import pytest
import torch

from helpers.models import random_ids, tiny_model
from motifarch.models.motif import MotifForCausalLM
from motifarch.optim import build_optimizer, offload_state, step_if_finite

# Of two matrices of these models at most.
PIECE = 2 * 2 * 32 * 48 * 4
STEPS, BAD = 6, 3


class Run:
    """A few training steps, of which one is not finite."""

    def __init__(self, name: Any, device: str = "cpu") -> None:
        self.model: MotifForCausalLM = tiny_model("gda").to(device).train()
        self.optimizer = build_optimizer(self.model, name=name, lr=1e-2)
        self.device = device

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            ids = random_ids(2, 16, seed=step).to(self.device)
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            skipped = step_if_finite(self.optimizer, loss.detach() * (math.inf if step == BAD else 1), norm)
            assert int(skipped) == (step == BAD)
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, check_device=False)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_results_are_bitwise_those_without(name: str) -> None:
    plain, offloaded = Run(name), Run(name)
    offload_state(offloaded.optimizer, piece_bytes=PIECE)
    losses = plain.steps(0, STEPS)
    assert offloaded.steps(0, STEPS) == losses
    assert len(set(losses)) == STEPS
    assert_same(offloaded.state(), plain.state())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_goes_on_with_and_without(name: str) -> None:
    straight = Run(name)
    straight.steps(0, STEPS)
    for before, after in ((True, False), (False, True), (True, True)):
        first, second = Run(name), Run(name)
        for run, offloaded in ((first, before), (second, after)):
            if offloaded:
                offload_state(run.optimizer, piece_bytes=PIECE)
        first.steps(0, 2)
        second.steps(7, 8)  # moments that the load must replace
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.steps(2, STEPS)
        assert_same(second.state(), straight.state())


def test_a_step_holds_the_moments_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("adamw")
    inner = run.optimizer.step
    pieces: list[list[torch.nn.Parameter]] = []

    def counted() -> None:
        pieces.append([p for group in run.optimizer.param_groups for p in group["params"]])
        inner()

    monkeypatch.setattr(run.optimizer, "step", counted)
    offload_state(run.optimizer, piece_bytes=PIECE)
    homes = []
    for step in range(2):
        pieces.clear()
        run.steps(step, step + 1)
        homes.append({id(p): run.optimizer.state[p]["exp_avg"].data_ptr() for p in run.model.parameters()})
    # The same memory in every step, and every parameter in one piece.
    assert homes[0] == homes[1]
    assert sorted(id(p) for piece in pieces for p in piece) == sorted(id(p) for p in run.model.parameters())
    assert len(pieces) > 5
    for piece in pieces:
        assert len(piece) == 1 or 2 * sum(p.nbytes for p in piece) <= PIECE


def test_a_piece_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="piece_bytes is 0; it must be at least 1"):
        offload_state(Run("adamw").optimizer, piece_bytes=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_a_gpu_moments_are_pinned_on_the_cpu(name: str) -> None:
    plain, offloaded = Run(name, "cuda"), Run(name, "cuda")
    offload_state(offloaded.optimizer, piece_bytes=PIECE)
    assert offloaded.steps(0, STEPS) == plain.steps(0, STEPS)
    assert_same(offloaded.state(), plain.state())
    for parameter in offloaded.model.parameters():
        for key, value in offloaded.optimizer.state[parameter].items():
            if key != "step":
                assert value.device.type == "cpu"
                assert value.is_pinned()
