"""Experts that ranks share: uneven loads, a bad rank, and what each message is for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.distributed import on_ranks, torchrun, train
from helpers.expert_ranks import (
    choose_exchanges,
    compare_deep_ep,
    compare_layers,
    order_of_work,
    skip_a_step,
    train_without,
)
from helpers.layouts import Case, train_cases
from helpers.tiny import MOTIF_3, write_recipe
from motifarch.parallel import Layout
from motifarch.train.run_folder import read_metrics

KILLED = Path(__file__).with_name("killed_once.py")

SHARED = Layout(expert=2)
MODEL = MOTIF_3 | {"qk_norm": False, "num_experts": 4}


def case(layout: Layout, **options: Any) -> Case:
    return Case("", "gda", layout, model=MODEL, **{"steps": 2} | options)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_load_is_equal_to_one_process(ranks: int) -> None:
    on_ranks(ranks, compare_layers)


def test_the_shared_expert_works_while_tokens_are_on_their_way() -> None:
    on_ranks(2, order_of_work)


def test_deep_ep_is_called_as_it_is_documented() -> None:
    on_ranks(2, compare_deep_ep)


def test_deep_ep_serves_where_every_rank_has_it() -> None:
    on_ranks(2, choose_exchanges)


def test_a_nan_router_on_one_rank_skips_the_step_on_all(data: Path) -> None:
    on_ranks(2, skip_a_step, data, case(SHARED))


def weights_after(ranks: int, data: Path, output: Path, one: Case) -> dict[str, torch.Tensor]:
    on_ranks(ranks, train_cases, data, output, [one])
    return torch.load(output)[""][2]  # type: ignore[no-any-return]


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


@pytest.mark.slow
def test_an_uneven_last_micro_batch_changes_nothing(data: Path, tmp_path: Path) -> None:
    # One process has 3, 3 and 2 rows at once, two ranks 3 and 1.
    truth, found = (
        weights_after(ranks, data, tmp_path / "out.pt", case(layout, micro=3))
        for ranks, layout in ((1, Layout()), (2, SHARED))
    )
    assert largest_difference(found, truth) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "left_out"),
    [
        (Layout(shard=2, expert=2), "counts"),
        (Layout(shard=2, expert=2), "dispatch"),
        (Layout(shard=2, expert=2), "combine"),
        (Layout(shard=2, expert=2), "gradient of combine"),
        (Layout(shard=2, expert=2), "gradient of dispatch"),
        (Layout(shard=2, expert=2), "division by all ranks"),
        (Layout(shard=4, expert=2), "reduction over shards"),
        (Layout(replicate=2, shard=2, expert=2), "reduction over copies"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_can_be_left_out(data: Path, tmp_path: Path, layout: Layout, left_out: str) -> None:
    truth = weights_after(1, data, tmp_path / "out.pt", case(Layout()))
    on_ranks(layout.ranks, train_without, data, tmp_path / "_", {name: case(layout) for name in ("all", left_out)})
    found = {name: torch.load(tmp_path / f"{name}.pt")[""][2] for name in ("all", left_out)}
    assert largest_difference(found["all"], truth) < 1e-5
    assert largest_difference(found[left_out], truth) > 1e-4


FIGURES = ("loss", "grad_norm", "expert_loss", "router_load_max_mean", "router_weight_min_median", "router_entropy")
RECORDED = ("router_output_cosine", "router_output_peak")


@pytest.mark.nightly
def test_a_rank_killed_in_an_exchange_is_restarted_and_the_run_ends_the_same(data: Path, tmp_path: Path) -> None:
    length = ("--run.steps", "12", "--checkpoint.every", "4", "--log.every", "2", "--checkpoint.asynchronous", "false")
    rows = {}
    for name in ("killed", "undisturbed", "one process"):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        recipe = write_recipe(folder, data, model=MODEL, experts={"bias_rate": 0.01, "balance_loss": 0.01})
        if name == "killed":
            # A step is 10 messages a micro-batch: 3 forward and 2 backward in each of two layers.
            script = ("--max-restarts", "1", KILLED, folder, "93", recipe, *length, "--parallel.expert", "2")
            done = torchrun(2, *script)
            assert done.returncode == 0, done.stderr
            assert (folder / "was_killed").exists()
            assert "resuming after step 8" in done.stdout
        elif name == "undisturbed":
            train(2, folder, recipe, *length, "--parallel.expert", "2")
        else:
            train(1, folder, recipe, *length)
        rows[name] = read_metrics(folder / "run" / "metrics.jsonl")
    losses = {name: [row["loss"] for row in found] for name, found in rows.items()}
    assert len(losses["killed"]) == 12
    assert losses["killed"] == losses["undisturbed"]
    for found, expected in zip(rows["undisturbed"], rows["one process"], strict=True):
        assert found.keys() == expected.keys()
        for figure in {*FIGURES, *RECORDED} & found.keys():
            # By layer, None for those without experts, or a number.
            values = [[v for v in np.ravel(row[figure]) if v is not None] for row in (found, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-4), f"step {found['step']}, {figure}"
    assert {*FIGURES, *RECORDED} <= rows["undisturbed"][-1].keys()
