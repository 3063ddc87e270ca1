"""Many runs: which are started, side by side or not, again or not, and what is known of each in the
end.

Processes that write what a run leaves stand in for training; `test_study.py` trains.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tiny import prepare_text
from helpers.tiny_study import GRID, write_grid
from motifarch.errors import UserError
from motifarch.study import plan, run
from motifarch.study.main import main
from motifarch.study.pool import Pool, Slots
from motifarch.study.run import locked

STAND_IN = Path(__file__).with_name("stand_in_run.py")
SOFTMAX, GDA = "softmax_gqa_poly_norm", "gda_2to1_poly_norm"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(self: Pool, run: Any, stage: str) -> list[str]:
        return [sys.executable, str(STAND_IN), str(run.folder), stage]

    monkeypatch.setattr(Pool, "command", command)
    monkeypatch.setattr(run, "write_report", lambda results, folder: None)
    monkeypatch.setattr(plan, "fastest_attention", lambda *arguments: "sdpa")
    monkeypatch.setattr(plan, "step_seconds", lambda recipes, *arguments: dict.fromkeys(recipes, 0.5))


def behave(folder: Path, **by_variant: str) -> None:
    (folder / "behaviour.json").write_text(json.dumps(by_variant))


def started(folder: Path) -> list[tuple[str, str]]:
    """(run, stage) of every process so far; forgets them."""
    path = folder / "starts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return [(row["run"], row["stage"]) for row in rows]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def states(folder: Path) -> dict[str, tuple[str, str | None]]:
    return {run["variant"]: (run["status"], run["error"]) for run in results(folder)["runs"]}


def study(folder: Path, data: Path, *options: str, **changes: Any) -> int:
    return main([str(write_grid(folder, data, **changes)), "--output", str(folder / "out"), *options])


def test_every_variant_runs_with_every_seed_and_never_twice(tmp_path: Path, data: Path) -> None:
    assert study(tmp_path, data, seeds=[3, 5]) == 0
    both = [f"runs/tiny/{v}/seed_{s}" for s in (3, 5) for v in (SOFTMAX, GDA)]
    assert started(tmp_path) == [(run, stage) for run in both for stage in ("train", "measure")]
    found = results(tmp_path)
    assert [(r["variant"], r["seed"], r["status"]) for r in found["runs"]] == [
        (v, s, "finished") for s in (3, 5) for v in ("softmax gqa poly_norm", "gda 2:1 poly_norm")
    ]
    run = found["runs"][0]
    assert run["tokens"] == 2560
    assert run["validation"] == [[2560, 25.6, pytest.approx(3.1)]]
    assert run["curve"][0] == [128, 1.28, pytest.approx(3.1), 1.0]
    recipes = [yaml.safe_load((tmp_path / "out" / run / "recipe.yaml").read_text()) for run in both]
    assert [recipe["run"]["seed"] for recipe in recipes] == [3, 3, 5, 5]
    # What decides the order of the data, the validation rows and the scale of the first weights is
    # the same for all.
    shared = [
        {k: r[k] for k in ("data", "batch", "validation")} | {"s": r["model"]["initializer_range"]} for r in recipes
    ]
    assert all(other == shared[0] for other in shared)

    assert study(tmp_path, data, seeds=[3, 5]) == 0
    assert started(tmp_path) == []


def test_a_variant_may_have_fewer_seeds(tmp_path: Path, data: Path) -> None:
    variants = [GRID["variants"][0], GRID["variants"][1] | {"seeds": [5]}]
    assert study(tmp_path, data, seeds=[3, 5], variants=variants) == 0
    assert [run for run, stage in started(tmp_path) if stage == "train"] == [
        f"runs/tiny/{run}" for run in (f"{SOFTMAX}/seed_3", f"{SOFTMAX}/seed_5", f"{GDA}/seed_5")
    ]
    assert len(results(tmp_path)["runs"]) == 3


@pytest.mark.parametrize("rate", [{"given": 1e-3}, {"sweep": [2e-3, 4e-3]}], ids=["given", "swept"])
def test_the_results_alone_carry_a_study_to_another_machine(
    tmp_path: Path, data: Path, rate: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "out"):
        folder.mkdir(parents=True)
    behave(here, **{GDA: "error"})
    assert study(here, data, learning_rate=rate, seeds=[3, 5]) == 1
    shutil.copy(here / "out" / "results.json", there / "out")
    monkeypatch.setattr(plan, "fastest_attention", lambda *arguments: "eager")
    behave(here)
    assert study(here, data, "--retry-failed", learning_rate=rate, seeds=[3, 5]) == 0
    assert study(there, data, learning_rate=rate, seeds=[3, 5]) == 0
    # What was finished is not run again, what had failed is.
    assert {Path(run).parent.name for run, _ in started(there)} == {GDA}
    ours, theirs = results(here), results(there)
    for name in ("runs", "sweep", "variants", "softmax_attention", "step_seconds", "data"):
        assert ours[name] == theirs[name], name
    # A run whose folder is deleted on purpose is run again.
    shutil.rmtree(there / "out" / "runs" / "tiny" / SOFTMAX)
    assert study(there, data, learning_rate=rate, seeds=[3, 5]) == 0
    assert {Path(run).parent.name for run, _ in started(there)} == {SOFTMAX}


def test_damaged_results_are_not_taken_up(tmp_path: Path, data: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"grid": {}, "runs"')
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        study(tmp_path, data)
    assert started(tmp_path) == []


def test_runs_go_side_by_side(tmp_path: Path, data: Path) -> None:
    behave(tmp_path, **{SOFTMAX: "together", GDA: "together"})
    assert study(tmp_path, data, "--jobs", "2", "--threads", "1") == 0
    assert results(tmp_path)["environment"]["jobs"] == 2


def test_failed_runs_are_told_and_the_rest_go_on(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [{"attention": "diff_v1"}, {"attention": "diff_v2"}, {"attention": "diff_v2", "activation": "silu"}]
    grid: dict[str, Any] = {"variants": [*variants, *GRID["variants"]]}
    behave(tmp_path, diff_v1_poly_norm="error", diff_v2_poly_norm="out of memory", diff_v2_silu="diverge")
    assert study(tmp_path, data, **grid) == 1
    found = states(tmp_path)
    assert found["diff_v1 poly_norm"] == ("failed", "the disk is full")
    assert found["diff_v2 poly_norm"][0] == "failed"
    assert "memory" in str(found["diff_v2 poly_norm"][1])
    assert "not finite" in str(found["diff_v2 silu"][1])
    assert found["softmax gqa poly_norm"] == found["gda 2:1 poly_norm"] == ("finished", None)
    printed = capsys.readouterr().out
    assert "diff_v1 poly_norm · tiny · seed 0: failed: the disk is full" in printed
    started(tmp_path)

    # Again without being asked to: nothing. Asked to: those that failed, and no other.
    behave(tmp_path)
    assert study(tmp_path, data, **grid) == 1
    assert started(tmp_path) == []
    assert study(tmp_path, data, "--retry-failed", **grid) == 0
    assert {run.split("/")[2] for run, _ in started(tmp_path)} == {
        "diff_v1_poly_norm",
        "diff_v2_poly_norm",
        "diff_v2_silu",
    }
    assert all(state == ("finished", None) for state in states(tmp_path).values())


def test_a_run_that_hung_is_told_as_such(tmp_path: Path, data: Path) -> None:
    """Its log ends with the stacks of its threads, the last line of which says nothing."""
    behave(tmp_path, **{GDA: "hang"})
    assert study(tmp_path, data) == 1
    status, error = states(tmp_path)["gda 2:1 poly_norm"]
    assert status == "failed"
    assert "no step came to its end" in str(error)
    # Logs are kept; what a former try wrote into them is no reason of the next.
    for does, told in (("out of memory", "memory"), ("quit", "exit status 1")):
        behave(tmp_path, **{GDA: does})
        assert study(tmp_path, data, "--retry-failed") == 1
        assert told in str(states(tmp_path)["gda 2:1 poly_norm"][1])


def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(tmp_path: Path, data: Path) -> None:
    behave(tmp_path, **{GDA: "interrupt"})
    assert study(tmp_path, data) == 130
    assert states(tmp_path) == {"softmax gqa poly_norm": ("finished", None), "gda 2:1 poly_norm": ("missing", None)}
    started(tmp_path)
    behave(tmp_path)
    assert study(tmp_path, data) == 0
    assert started(tmp_path) == [(f"runs/tiny/{GDA}/seed_0", "train"), (f"runs/tiny/{GDA}/seed_0", "measure")]


def test_the_best_rate_of_the_sweep_is_taken_and_carried_to_larger_sizes(tmp_path: Path, data: Path) -> None:
    sizes = [GRID["sizes"][0] | {"name": "wide", "hidden_size": 64, "num_query_heads": 4}, GRID["sizes"][0]]
    rates = {"sweep": [1e-3, 4e-3, 9e-3], "tokens": 640, "transfer": "inverse_width"}
    assert study(tmp_path, data, sizes=sizes, learning_rate=rates) == 0
    found = results(tmp_path)
    chosen = {(v["size"], v["name"]): (v["learning_rate"], v["learning_rate_from"]) for v in found["variants"]}
    for name in ("softmax gqa poly_norm", "gda 2:1 poly_norm"):
        assert chosen["tiny", name] == (4e-3, "swept")
        assert chosen["wide", name] == (2e-3, "transferred")
    assert not any(v["learning_rate_at_edge"] for v in found["variants"])
    assert [(s["learning_rate"], s["steps"]) for s in found["sweep"]] == [(r, 5) for r in rates["sweep"]] * 2
    recipe = yaml.safe_load((tmp_path / "out" / "runs" / "wide" / GDA / "seed_0" / "recipe.yaml").read_text())
    assert recipe["optim"]["lr"] == 2e-3
    assert not [1 for run, stage in started(tmp_path) if run.startswith("sweep") and stage == "measure"]


def test_a_variant_that_no_rate_trains_fails_and_the_rest_go_on(tmp_path: Path, data: Path) -> None:
    behave(tmp_path, **{GDA: "diverge"})
    assert study(tmp_path, data, learning_rate={"sweep": [4e-3, 8e-3]}) == 1
    assert states(tmp_path)["softmax gqa poly_norm"][0] == "finished"
    assert "no learning rate" in str(states(tmp_path)["gda 2:1 poly_norm"][1])
    behave(tmp_path)
    assert study(tmp_path, data, "--retry-failed", learning_rate={"sweep": [4e-3, 8e-3]}) == 0


def test_each_run_has_gpus_of_its_own(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: the processes only look at what they were given."""
    monkeypatch.setattr(run, "find_slots", lambda *_: Slots(["0", "3", "5"], jobs=3, threads=1))
    monkeypatch.setattr(plan, "environment", lambda command, *_: {"command": command})
    behave(tmp_path, **{SOFTMAX: "together", GDA: "together"})
    size = GRID["sizes"][0]
    assert study(tmp_path, data, sizes=[size], seeds=[0]) == 0
    rows = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    trained = {row["run"]: row["gpus"] for row in rows if row["stage"] == "train"}
    assert sorted(trained.values()) == ["0", "3"]
    assert all(row["gpus"] == trained[row["run"]] for row in rows)


def test_a_folder_belongs_to_one_grid(tmp_path: Path, data: Path) -> None:
    assert study(tmp_path, data) == 0
    with pytest.raises(UserError, match=r"tokens is 1280, was 2560"):
        study(tmp_path, data, tokens=1280)
    with pytest.raises(UserError, match=r"seeds is \[0, 1\], was \[0\]"):
        study(tmp_path, data, seeds=[0, 1])


def test_a_study_begun_with_the_former_name_of_flops_goes_on(tmp_path: Path, data: Path) -> None:
    assert study(tmp_path, data, match="flops") == 0
    path = tmp_path / "out" / "study.json"
    path.write_text(path.read_text().replace('"match": "flops"', '"match": "operations"'))
    with pytest.warns(FutureWarning):
        assert study(tmp_path, data, match="operations") == 0
    assert results(tmp_path)["matching"]["by"] == results(tmp_path)["grid"]["match"] == "flops"


def test_other_data_are_refused(tmp_path: Path, data: Path) -> None:
    moving = tmp_path / "data"
    moving.symlink_to(data)
    assert study(tmp_path, moving) == 0
    moving.unlink()
    moving.symlink_to(prepare_text(tmp_path, seed=1))
    with pytest.raises(UserError, match="holds other data"):
        study(tmp_path, moving)


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        locked(tmp_path / "out", said.append),
        pytest.raises(UserError, match="another process"),
        locked(tmp_path / "out", said.append, patience_s=0.3),
    ):
        pass
    assert said == [f"waiting for the processes that are still at work in {tmp_path / 'out'}"]


def test_missing_data_is_prepared_when_the_grid_says_from_what(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} one two three\n" for i in range(3000)))
    (tmp_path / "more.txt").write_text("".join(f"{i} four five six\n" for i in range(3000)))
    made = {"path": str(tmp_path / "made"), "seq_len": 32}
    with pytest.raises(UserError, match="does not exist"):
        study(tmp_path, tmp_path / "made")
    source = {"source": [f"files:{tmp_path}/*.txt"], "vocab_size": 300, "validation_fraction": 0.5}
    path = write_grid(tmp_path, "")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"data": made | source}))
    assert main([str(path), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "made" / "data.json").is_file()
