"""Honest runs hold, and forged ones are found: by their record where it was not made up as a whole,
else when their first weights or an interval are made again.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.verify.disguises import disguised, same_function
from helpers.distributed import train as train_on
from helpers.tiny import prepare_text, write_recipe
from motifarch.cli import run as command_line
from motifarch.export import export
from motifarch.files import read_json, sha256, write_sealed_json
from motifarch.ledger.chain import ENTRIES, FOLDER, Ledger, digest, make_entry
from motifarch.models.motif import MotifForCausalLM
from motifarch.train.lineage import LINK, manifest_seal
from motifarch.train.main import main as train
from motifarch.train.manifest import MANIFEST, list_checkpoints
from motifarch.train.run_folder import METRICS, read_metrics
from motifarch.train.saved_hashes import HASHES, roots
from motifarch.verify.first_weights import verify_first_weights
from motifarch.verify.links import chain_of, verify_links
from motifarch.verify.replay import Interval, intervals, replay
from motifarch.verify.similarity.compare import Comparer
from motifarch.verify.similarity.parts import Model

SAVES: dict[str, Any] = {"every": 10, "keep_last": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return prepare_text(folder)


@pytest.fixture(scope="module")
def honest(folder: Path, data: Path) -> Path:
    """A run of 40 steps, saved each ten."""
    assert train([str(write_recipe(folder, data, checkpoint=SAVES))]) == 0
    return folder / "run"


def failing(run: Path) -> list[str]:
    return [finding.check for finding in verify_links(run).failed]


def again(run: Path, work: Path, place: int, **options: Any) -> list[str]:
    """What fails when an interval, by its place in the run, is trained again."""
    ledger, chain = chain_of(run)
    found: list[Interval] = intervals(run, chain)
    return [finding.check for finding in replay(found[place], ledger, work / "again", **options).failed]


def forge(run: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    """Changes links by their step, and makes the whole record hold together again."""
    ledger, parent, kept = Ledger.read(run), None, []
    checkpoints = {read_json(path / MANIFEST)["step"]: path for path in list_checkpoints(run)}
    for entry in ledger.entries:
        link, seal = dict(entry.link) | {"parent": parent}, None
        change(entry.step, link)
        if entry.step in checkpoints:
            content = read_json(checkpoints[entry.step] / MANIFEST)
            content.pop("sha256")
            content["about"][LINK] = link
            for name in content["files"]:
                content["files"][name] = _described(checkpoints[entry.step] / name)
            write_sealed_json(checkpoints[entry.step] / MANIFEST, content)
            seal = manifest_seal(checkpoints[entry.step])
        kept.append(make_entry(entry.step, seal, link))
        parent = kept[-1].hash
    (run / FOLDER / ENTRIES).write_bytes(b"".join(entry.line() for entry in kept))
    assert failing(run) == []  # the forgery is as good as one can be


def _described(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def take(link: dict[str, Any], checkpoint: Path) -> None:
    """Lets an entry speak of another checkpoint's tensors."""
    link |= roots(json.loads((checkpoint / HASHES).read_text()))


def test_an_honest_run_holds_and_is_bit_by_bit_the_same_again(honest: Path, tmp_path: Path) -> None:
    assert failing(honest) == []
    assert verify_first_weights(*chain_of(honest)).failed == []
    for place in (0, 2):
        assert again(honest, tmp_path / str(place), place) == []


def test_the_command_says_what_was_shown(honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(honest), "--init", "--replay", "1", "--seed", "a", "--report", str(tmp_path / "r.md")]
    assert command_line(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 intervals between saves, drawn with the seed 'a'" in printed
    assert (tmp_path / "r.md").read_text() in printed
    checks = json.loads((tmp_path / "r.json").read_text())["checks"]
    assert {check["verdict"] for check in checks} == {"holds", "unknown"}
    row = (honest / METRICS).read_text().splitlines()[12]
    changed = shutil.copytree(honest, tmp_path / "changed")
    (changed / METRICS).write_text((honest / METRICS).read_text().replace(row, row.replace('"loss": ', '"loss": 1')))
    assert command_line(["verify", str(changed)]) == 1
    assert "rows of steps 11 to 20 have changed" in capsys.readouterr().out


def test_a_row_is_shown_to_be_in_the_data_without_the_rest(honest: Path, data: Path, tmp_path: Path) -> None:
    proof = tmp_path / "row.json"
    assert command_line(["data", "prove", str(data), "--row", "3", "--output", str(proof)]) == 0
    assert command_line(["verify", str(honest), "--row", str(proof)]) == 0
    content = json.loads(proof.read_text())
    proof.write_text(json.dumps(content | {"input_ids": [*content["input_ids"][1:], 5]}))
    assert command_line(["verify", str(honest), "--row", str(proof)]) == 1


def test_a_resumed_run_holds(folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    assert train([str(recipe), "--run.stop_at", "15"]) == 0
    assert train([str(recipe)]) == 0
    run = tmp_path / "run"
    assert [entry.step for entry in chain_of(run)[1]] == [40, 30, 20, 15, 10, 0]
    assert failing(run) == []
    assert again(run, tmp_path, 2) == []  # steps 16 to 20, across the resume


def test_a_broken_chain_is_named_when_the_run_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    assert train([str(recipe), "--run.stop_at", "20"]) == 0
    entries = tmp_path / "run" / FOLDER / ENTRIES
    lines = entries.read_bytes().splitlines(keepends=True)
    entries.write_bytes(b"".join([lines[0], lines[1].replace(b'"step":10', b'"step":11'), *lines[2:]]))
    capsys.readouterr()
    assert train([str(recipe), "--run.stop_at", "30"]) == 0
    assert "line 2 (step 11) has changed since it was written" in capsys.readouterr().out
    assert verify_links(tmp_path / "run").failed
    assert entries.read_bytes().startswith(lines[0])  # nothing of it is removed


@pytest.mark.slow
def test_a_run_of_two_ranks_with_averages_holds_on_one_rank_within_the_bound(data: Path, tmp_path: Path) -> None:
    average = {"every": 20, "last": 2}
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES, average=average)
    train_on(2, tmp_path, recipe)
    run = tmp_path / "run"
    assert failing(run) == []
    assert again(run, tmp_path / "two", 2) == []  # the one that begins with the mean
    ledger, chain = chain_of(run)
    found = replay(intervals(run, chain)[2], ledger, tmp_path / "one", ranks=1)
    assert not found.failed
    assert "Not bit by bit" in found.found[0].check


def test_the_data_may_have_moved(honest: Path, data: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(data, tmp_path / "moved")
    hidden = data.rename(data.with_name("hidden"))
    try:
        ledger, chain = chain_of(honest)
        interval = intervals(honest, chain)[1]
        (finding,) = replay(interval, ledger, tmp_path / "lost").found
        assert finding.verdict == "unknown"
        assert not replay(interval, ledger, tmp_path / "again", data=[moved]).failed
    finally:
        hidden.rename(data)


def test_on_the_same_machine_every_bit_counts(honest: Path, tmp_path: Path) -> None:
    ledger, chain = chain_of(honest)
    first = intervals(honest, chain)[2]
    other = make_entry(first.end.step, first.end.manifest, dict(first.end.link) | {"weights": "0" * 64})
    interval = Interval(first.start, other, first.parent, first.saved)
    assert replay(interval, ledger, tmp_path / "again").failed


HOSTILE: list[tuple[str, Any]] = [
    ("recipe", []),
    ("recipe", {"model": {"attention_type": "antigravity:geohash"}}),
    ("environment", {"ranks": 10**6, "code": {"sources": "x"}}),
    ("environment", {"ranks": "2; reboot", "code": {"sources": "x"}}),
    ("environment", 7),
]


@pytest.mark.parametrize(("name", "content"), HOSTILE)
def test_what_a_ledger_asks_for_is_not_done_blindly(honest: Path, name: str, content: Any, tmp_path: Path) -> None:
    run = shutil.copytree(honest, tmp_path / "run")
    ledger, chain = chain_of(run)
    first = intervals(run, chain)[1]
    other = make_entry(first.end.step, first.end.manifest, dict(first.end.link) | {name: ledger.keep(content)})
    (finding,) = replay(Interval(first.start, other, first.parent, first.saved), ledger, tmp_path / "again").found
    assert finding.verdict == "unknown"
    assert "antigravity" not in sys.modules
    assert not (tmp_path / "again").exists()


def test_a_model_that_is_none_is_not_made(honest: Path, tmp_path: Path) -> None:
    run = shutil.copytree(honest, tmp_path / "run")
    ledger, chain = chain_of(run)
    for content in ([], {"attention_type": "antigravity:geohash"}, {"hidden_size": "wide"}, {"no_such": 1}):
        first = make_entry(0, None, dict(chain[-1].link) | {"model": ledger.keep(content)})
        (finding,) = verify_first_weights(ledger, [first]).found
        assert finding.verdict != "holds"


def test_what_was_changed_in_the_record_is_named(honest: Path, tmp_path: Path) -> None:
    other = shutil.copytree(honest, tmp_path / "swapped")
    shutil.rmtree(other / "checkpoints" / "step_00000020")
    shutil.copytree(honest / "checkpoints" / "step_00000030", other / "checkpoints" / "step_00000020")
    assert "Each checkpoint that is there is the one of its entry." in failing(other)
    lines = (honest / FOLDER / ENTRIES).read_bytes().splitlines(keepends=True)
    skipped = shutil.copytree(honest, tmp_path / "skipped")
    (skipped / FOLDER / ENTRIES).write_bytes(b"".join(lines[:2] + lines[3:]))
    assert "The ledger is as it was written, each entry with the hash of the one before it." in failing(skipped)
    without = shutil.copytree(honest, tmp_path / "without")
    for path in (without / FOLDER).glob("*.json"):
        path.write_text(path.read_text().replace("3", "4"))
    assert "Recipe, code and machine of each save are on record, and have not changed." in failing(without)


@pytest.fixture(scope="module")
def other_seed(folder: Path, data: Path) -> Path:
    """Another run, on the same data."""
    (folder / "other").mkdir()
    assert train([str(write_recipe(folder / "other", data, checkpoint=SAVES)), "--run.seed", "1"]) == 0
    return folder / "other" / "run"


def test_weights_of_another_run_in_an_interval_are_found(honest: Path, other_seed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(honest, tmp_path / "run")
    theirs = other_seed / "checkpoints" / "step_00000030"
    shutil.rmtree(run / "checkpoints" / "step_00000030")
    shutil.copytree(theirs, run / "checkpoints" / "step_00000030")
    forge(run, lambda step, link: take(link, theirs) if step == 30 else None)
    assert again(run, tmp_path / "before", 2) != []
    assert again(run, tmp_path / "after", 3) != []
    assert again(run, tmp_path / "elsewhere", 1) == []


def test_a_skipped_interval_is_found(honest: Path, tmp_path: Path) -> None:
    run = shutil.copytree(honest, tmp_path / "run")
    before = run / "checkpoints" / "step_00000020"
    hashes = run / "checkpoints" / "step_00000030" / HASHES
    shutil.copyfile(before / HASHES, hashes)
    forge(run, lambda step, link: take(link, before) if step == 30 else None)
    assert again(run, tmp_path, 2) != []


def test_an_edited_loss_is_found_though_the_record_was_made_up_anew(honest: Path, tmp_path: Path) -> None:
    run = shutil.copytree(honest, tmp_path / "run")
    rows = read_metrics(run / METRICS)
    rows[24]["loss"] -= 0.5
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def change(step: int, link: dict[str, Any]) -> None:
        if step == 30:
            link["metrics"] = link["metrics"] | {"sha256": digest(rows[20:30])}

    forge(run, change)
    assert any("metrics.jsonl has what" in check for check in again(run, tmp_path, 2))


def test_another_seed_is_found(other_seed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(other_seed, tmp_path / "run")
    record = read_json(run / "run.json")
    (run / "run.json").write_text(json.dumps(record | {"seed": 0}))

    def change(step: int, link: dict[str, Any]) -> None:
        if step == 0:
            link["seed"] = 0

    forge(run, change)
    assert [f.check for f in verify_first_weights(*chain_of(run)).failed] != []


def test_other_data_is_found(folder: Path, honest: Path, data: Path, tmp_path: Path) -> None:
    other = prepare_text(tmp_path, seed=5)
    recipe = write_recipe(tmp_path, other, checkpoint=SAVES)
    assert train([str(recipe), "--data.datasets", json.dumps([{"path": str(other)}])]) == 0
    run = tmp_path / "run"
    said = chain_of(honest)[1][0].link
    record = read_json(run / "run.json")
    (run / "run.json").write_text(json.dumps(record | {"data": read_json(honest / "run.json")["data"]}))

    def change(step: int, link: dict[str, Any]) -> None:
        link |= {"data": said["data"], "tokenizer": said["tokenizer"], "recipe": said["recipe"]}

    kept = honest / FOLDER / f"{said['recipe']}.json"
    shutil.copyfile(kept, run / FOLDER / kept.name)
    forge(run, change)
    ledger, chain = chain_of(run)
    found = replay(intervals(run, chain)[0], ledger, tmp_path / "again")
    assert found.failed


def test_weights_that_came_from_elsewhere_are_named_and_found(honest: Path, data: Path, tmp_path: Path) -> None:
    outside = shutil.copytree(honest / "checkpoints" / "step_00000040", tmp_path / "theirs")
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    assert train([str(recipe), "--run.init_from", str(outside), "--run.stop_at", "10"]) == 0
    run = tmp_path / "run"
    (finding,) = verify_links(run).failed
    assert finding.detail == "what it was made from came from outside: theirs"

    def change(step: int, link: dict[str, Any]) -> None:
        if step == 0:
            link["origin"] = None

    forge(run, change)
    assert verify_first_weights(*chain_of(run)).failed


def test_anothers_weights_fine_tuned_in_disguise_are_found(honest: Path, data: Path, tmp_path: Path) -> None:
    """Heads, channels and neurons permuted and rescaled, trained on, the record made up anew."""
    theirs = export(honest, tmp_path / "theirs")
    model = MotifForCausalLM.from_pretrained(theirs)
    hidden = disguised(model.state_dict(), model.config, seed=1)
    assert same_function(model, hidden, torch.arange(40)[None]) < 1e-4
    model.load_state_dict(hidden)
    model.save_pretrained(tmp_path / "hidden")
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    given = ["--run.init_from", str(tmp_path / "hidden"), "--run.seed", "7", "--run.steps", "20"]
    assert train([str(recipe), *given]) == 0
    run = tmp_path / "run"

    def change(step: int, link: dict[str, Any]) -> None:
        if step == 0:
            link["origin"] = None

    forge(run, change)
    assert verify_first_weights(*chain_of(run)).failed
    assert command_line(["verify", str(run), "--against", str(theirs)]) == 1
    assert Comparer(Model(run)).compare(Model(theirs)).alarms
    (tmp_path / "other").mkdir()
    assert train([str(write_recipe(tmp_path / "other", data)), "--run.seed", "9", "--run.steps", "20"]) == 0
    assert not Comparer(Model(tmp_path / "other" / "run")).compare(Model(theirs)).alarms
