import pytest

from motifarch.train.learning_rate import about_learning_rate, learning_rate_change, learning_rates
from motifarch.train.recipe import DataSection, OptimSection, Recipe, RunSection


def recipe(steps: int, **optim: object) -> Recipe:
    fields = {"lr": 1.0, "warmup_steps": 10, "min_lr_ratio": 0.1, **optim}
    return Recipe(run=RunSection(steps=steps), optim=OptimSection(**fields), data=DataSection([{"path": "d"}]))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_made_longer_after_its_decay_is_told_of_its_rate(schedule: str) -> None:
    before, after = recipe(100, schedule=schedule), recipe(200, schedule=schedule)
    line = learning_rate_change(about_learning_rate(before), after, 100)
    assert line is not None
    assert f"step 101 is {learning_rates(after)(100):.3g}, after 0.1 at step 100" in line
    assert "up again" in line
    assert "run.steps was 100, is 200" in line


def test_what_does_not_change_the_next_rate_is_not_told() -> None:
    before = about_learning_rate(recipe(100, schedule="wsd", decay_steps=20))
    assert learning_rate_change(before, recipe(100, schedule="wsd", decay_steps=20), 100) is None
    assert learning_rate_change(before, recipe(200, schedule="wsd", decay_steps=20), 50) is None
    line = learning_rate_change(before, recipe(100, schedule="wsd", decay_steps=20, lr=2.0), 50)
    assert line is not None
    assert "optim.lr was 1.0, is 2.0" in line
    assert "up again" not in line
