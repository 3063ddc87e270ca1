"""The spike guard against the same rule written as plain Python, and what it does to a step."""

import math
import random
import statistics

import pytest
import torch

from motifarch.optim import SpikeGuard


class Plain:
    """The rule on lists of floats."""

    def __init__(self, sigma: float, window: int, max_in_row: int) -> None:
        self.sigma, self.window, self.max_in_row = sigma, window, max_in_row
        self.accepted: list[tuple[float, float]] = []
        self.row = self.total = 0

    def check(self, *measured: float) -> int:
        if not all(map(math.isfinite, measured)):
            return 0
        if len(self.accepted) >= self.window:
            columns = list(zip(*self.accepted[-self.window :], strict=True))
            limits = [statistics.mean(c) + self.sigma * statistics.stdev(c) for c in columns]
            if any(m > limit for m, limit in zip(measured, limits, strict=True)):
                if self.row < self.max_in_row:
                    self.row, self.total = self.row + 1, self.total + 1
                    return 1
                self.accepted.clear()
        self.row = 0
        self.accepted.append(measured)  # type: ignore[arg-type]
        return 0


def run(guard: SpikeGuard, losses: list[float], norms: list[float] | None = None) -> list[int]:
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [int(guard.check(torch.tensor(a), torch.tensor(b))) for a, b in pairs]


@pytest.mark.parametrize(("sigma", "window", "limit"), [(2.0, 4, 2), (1.0, 7, 3), (3.0, 16, 1)])
def test_it_follows_the_rule(sigma: float, window: int, limit: int) -> None:
    draw = random.Random(window)
    guard, plain = SpikeGuard(sigma, window, max_in_row=limit), Plain(sigma, window, limit)
    spikes = 0
    for step in range(300):
        level = 5.0 if step < 150 else 9.0
        loss = draw.gauss(level, 0.3) + (6.0 if draw.random() < 0.05 else 0.0)
        norm = math.inf if draw.random() < 0.03 else draw.lognormvariate(0.0, 0.5)
        # What the guard sees is float32.
        loss, norm = torch.tensor(loss).item(), torch.tensor(norm).item()
        found = int(guard.check(torch.tensor(loss), torch.tensor(norm)))
        assert found == plain.check(loss, norm), step
        spikes += found
    assert spikes > 5
    assert guard.counts.tolist()[1:] == [plain.row, plain.total]
    assert plain.total == spikes


def test_a_saved_guard_goes_on_as_the_first() -> None:
    torch.manual_seed(0)
    losses = (torch.rand(60) ** 4).tolist()
    one, two = SpikeGuard(1.0, 8), SpikeGuard(1.0, 8)
    whole = run(one, losses)
    half = run(two, losses[:30])
    other = SpikeGuard(1.0, 8)
    other.load_state_dict(two.state_dict())
    assert half + run(other, losses[30:]) == whole
    assert 0 < sum(whole[30:]) < 30
    for name, value in other.state_dict().items():
        assert torch.equal(value, one.state_dict()[name])


def test_nothing_waits_for_the_device() -> None:
    # A meta tensor has no value, so whatever asked for one would raise.
    guard = SpikeGuard(3.0, 4, device="meta")
    assert guard.check(torch.ones((), device="meta"), torch.ones((), device="meta")).is_meta
    assert all(value.is_meta for value in guard.state_dict().values())


@pytest.mark.parametrize("bad", [{"sigma": 0.0}, {"sigma": math.nan}, {"window": 1}, {"max_in_row": 0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sigma must be above 0"):
        SpikeGuard(**({"sigma": 3.0, "window": 4} | bad))  # type: ignore[arg-type]
