"""Nothing that was saved is lost by going on, whatever has become of a run's folder."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.distributed import TO_REPORT, torchrun
from helpers.tiny import SHORT_RUN
from motifarch.commands.average import main as average
from motifarch.commands.export import main as export
from motifarch.errors import UserError
from motifarch.train.checkpoint import Checkpointer, TrainState
from motifarch.train.main import main
from motifarch.train.manifest import (
    MANIFEST,
    complete_checkpoints,
    find_newest,
    list_checkpoints,
    prune,
    read_manifest,
    write_manifest,
)
from motifarch.train.run_folder import cut_metrics, read_metrics


@pytest.fixture
def go_on(finished: tuple[Path, Path], run: Path) -> Callable[..., int]:
    return lambda *options: main([str(finished[0]), *SHORT_RUN, "--run.output", str(run), *options])


def content(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def change_manifest(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def replace_by_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("a file")


def newer_format(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr("motifarch.train.manifest.FORMAT", 3)
        write_manifest(checkpoint, **{name: manifest[name] for name in ("step", "about", "files")})


SPOILT = {
    "no manifest": drop_manifest,
    "another format": lambda c: change_manifest(c, format=99),
    "no object": lambda c: (c / MANIFEST).write_text("[]"),
    "empty": lambda c: (c / MANIFEST).write_text(""),
    "deep": lambda c: (c / MANIFEST).write_text("[" * 10**5),
    "a folder": lambda c: ((c / MANIFEST).unlink(), (c / MANIFEST).mkdir()),
    "a link to itself": lambda c: ((c / MANIFEST).unlink(), (c / MANIFEST).symlink_to(MANIFEST)),
    "a file for the folder": replace_by_file,
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_run_without_a_usable_checkpoint_does_not_start_over(
    run: Path, go_on: Callable[..., int], case: str, resume: str
) -> None:
    for number in (2, 4):
        SPOILT[case](step(run, number))
    before = content(run)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used .*step_00000004.*--run\.output.*remove"):
        go_on("--run.resume", resume)
    assert content(run) == before


def test_a_checkpoint_of_a_newer_version_is_not_replaced(
    run: Path, go_on: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    newer_format(step(run, 4), monkeypatch)
    before = content(run)
    with pytest.raises(UserError, match=r"step_00000004 can't be used: its manifest\.json is of format 3.*version"):
        go_on()
    assert content(run) == before


def test_what_a_cut_short_save_left_does_not_hinder_a_start(
    run: Path, go_on: Callable[..., int], finished: tuple[Path, Path]
) -> None:
    shutil.rmtree(step(run, 4))
    partial = step(run, 2).rename(step(run, 2).with_name("step_00000002.partial"))
    drop_manifest(partial)
    (partial / "folder").mkdir()  # whatever it is
    assert go_on() == 0
    assert [c.name for c in list_checkpoints(run)] == ["step_00000004", "step_00000002"]
    assert [r["loss"] for r in read_metrics(run / "metrics.jsonl")] == [
        r["loss"] for r in read_metrics(finished[1] / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"step": 2},
        {"step": "4"},
        {"about": None},
        {"about": {"seed": 1}},
        {"files": {}},
        {"files": {"../x": {"size": 1, "sha256": ""}}},
        {"files": {".metadata": 1}},
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_manifest_of_another_shape_is_passed_over(run: Path, change: dict[str, object], version: int) -> None:
    text = (step(run, 4) / MANIFEST).read_text()
    if version == 1:  # as they were written before they held a hash of themselves
        whole = {name: value for name, value in json.loads(text).items() if name != "sha256"}
        (step(run, 4) / MANIFEST).write_text(json.dumps(whole | {"format": 1}))
        assert find_newest(run, pytest.fail) == step(run, 4)
    change_manifest(step(run, 4), **change)
    said: list[str] = []
    assert find_newest(run, said.append) == step(run, 2)
    assert "passing over" in said[0]


def poison(monkeypatch: pytest.MonkeyPatch, value: float, at_step: int) -> None:
    """Sets a weight before a save, as arithmetic gone wrong would."""
    save = Checkpointer.save

    def spoil_and_save(checkpointer: Checkpointer, state: TrainState) -> None:
        if state.step == at_step:
            with torch.no_grad():
                weight = state.model.model.norm.weight  # type: ignore[union-attr]
                (weight.to_local() if hasattr(weight, "to_local") else weight)[1] = value  # type: ignore[operator, union-attr, index]
        save(checkpointer, state)

    monkeypatch.setattr(Checkpointer, "save", spoil_and_save)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poison(monkeypatch, value, at_step=4)
    with pytest.raises(
        UserError, match=r"model\.norm\.weight is not finite after step 4, so nothing is saved; .*step_0+2"
    ):
        main([str(recipe), *SHORT_RUN, "--run.steps", "6", "--checkpoint.keep_last", "1"])
    assert [c.name for c in list_checkpoints(tmp_path / "run")] == ["step_00000002"]
    monkeypatch.undo()
    assert main([str(recipe), *SHORT_RUN, "--run.steps", "6"]) == 0


def test_weights_that_are_not_finite_are_never_read(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version that did not look has saved them."""
    poison(monkeypatch, float("nan"), at_step=4)
    with monkeypatch.context() as patch:
        patch.setattr("motifarch.train.checkpoint.first_nonfinite", lambda *_: None)
        main([str(recipe), *SHORT_RUN])
    monkeypatch.undo()
    run, out = tmp_path / "run", tmp_path / "out"
    for read in (
        lambda: main([str(recipe), *SHORT_RUN, "--run.steps", "6"]),
        lambda: main(
            [str(recipe), *SHORT_RUN, "--run.init_from", str(step(run, 4)), "--run.output", str(tmp_path / "new")]
        ),
        lambda: export([str(run), "--output", str(out)]),
        lambda: average([str(run), "--last", "2", "--output", str(out)]),
    ):
        with pytest.raises(UserError, match=r"norm\.weight is not finite"):
            read()
    assert not out.exists()
    shutil.rmtree(step(run, 4))  # as the message says
    assert main([str(recipe), *SHORT_RUN]) == 0


def test_pruning_never_follows_a_link(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    for number in (2, 4):
        shutil.rmtree(step(run, number))
        step(run, number).symlink_to(step(other, number))
    newest = step(run, 6)
    newest.mkdir()
    before = content(other)
    prune(run, 1, newest)
    assert os.listdir(run / "checkpoints") == ["step_00000006"]
    assert content(other) == before


def test_a_run_whose_checkpoints_are_links_goes_on(
    run: Path, tmp_path: Path, go_on: Callable[..., int], finished: tuple[Path, Path]
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(run / "checkpoints")
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    step(run, 2).symlink_to(step(other, 2))
    step(run, 4).with_name("step_00000004.partial").symlink_to(step(other, 4))
    drop_manifest(step(other, 4))
    before = content(other)
    assert go_on("--checkpoint.keep_last", "1") == 0
    assert os.listdir(tmp_path / "disk") == ["step_00000004"]
    assert not step(run, 4).is_symlink()
    assert content(other) == before


def test_pruning_keeps_what_it_does_not_understand(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer_format(step(run, 2), monkeypatch)
    prune(run, 1, step(run, 4))
    assert [c.name for c in list_checkpoints(run)] == ["step_00000004", "step_00000002"]


ROWS = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": None, "lambda": [0.5]}, {"step": 3, "loss": 0.5}]


@pytest.mark.parametrize(
    "broken",
    [
        b'{"step": 2, "lo', b"\xff\xfe\x00", b"null", b"[]", b"7", b'{"step": "2"}', b'{"loss": 1}', b"",
        b'{"step": 2.0}', b'{"step": 2, "loss": "high"}', b'{"step": 2, "loss": {}}', b"[" * 10**5,
    ],
)  # fmt: skip
def test_a_broken_line_costs_no_other(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([lines[0], broken, *lines[1:], b'{"step": 4, "l']))
    whole = path.read_bytes()
    assert read_metrics(path) == ROWS
    (said,) = cut_metrics(path, 2)
    assert "line 2" in said
    assert "line 5" not in said  # the crash's
    assert path.read_bytes() == lines[0] + b"\n" + lines[1] + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == whole
    assert cut_metrics(path, 2) == []


def test_missing_rows_are_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": number}) + "\n" for number in (3, 4, 7)))
    (said,) = cut_metrics(path, 8)
    assert "lacks the rows of 3 of the steps 3 to 8" in said


def test_a_link_to_nowhere_is_one_message(run: Path, go_on: Callable[..., int], tmp_path: Path) -> None:
    metrics = run / "metrics.jsonl"
    kept = metrics.rename(tmp_path / "kept")
    metrics.symlink_to(tmp_path / "nowhere" / "metrics.jsonl")
    with pytest.raises(UserError, match=r"can't write .*metrics\.jsonl: No such file"):
        go_on()
    metrics.unlink()
    metrics.symlink_to(kept)
    assert go_on() == 0
    assert metrics.is_symlink()


def test_broken_metrics_and_records_are_told_and_kept(
    run: Path, go_on: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(step(run, 4))
    rows = read_metrics(run / "metrics.jsonl")
    metrics, record = run / "metrics.jsonl", run / "run.json"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + "[1, 2]\n" + "".join(lines[1:]))
    record.write_text('["not a record"]')
    assert go_on() == 0
    said = capfd.readouterr().out
    assert "metrics.jsonl has broken lines (line 2)" in said
    assert "run.json can't be read, and is kept as run.json.damaged" in said
    assert [(r["step"], r["loss"]) for r in read_metrics(metrics)] == [(r["step"], r["loss"]) for r in rows]
    assert (run / "run.json.damaged").read_text() == '["not a record"]'
    assert json.loads(record.read_text())["step"] == 2


def test_rows_that_are_gone_are_told(run: Path, go_on: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(step(run, 4))
    (run / "metrics.jsonl").unlink()
    assert go_on() == 0
    assert "metrics.jsonl is missing, and with it the rows of the steps to 2" in capfd.readouterr().out
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [3, 4]


def test_export_takes_the_model_from_the_checkpoint(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["model_config"]["rms_norm_eps"] = 0.5
    (run / "run.json").write_text(json.dumps(record))
    assert export([str(run), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6


def test_every_damage_of_a_manifest_is_found(run: Path) -> None:
    path = step(run, 4) / MANIFEST
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 7
        path.write_bytes(changed)
        assert complete_checkpoints(run / "checkpoints", hashes=False) == [step(run, 2)]


COMMANDS = {
    "export": lambda run, out: export([str(run), "--output", str(out)]),
    "average": lambda run, out: average([str(run), "--last", "2", "--output", str(out)]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_named_and_changes_nothing(run: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    assert COMMANDS[command](run, out) == 0
    before = content(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (0, 4096, 20_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(UserError, match=r"out can't be written \(File too large\): free some space"):
                COMMANDS[command](run, out)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert content(tmp_path) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shutil.rmtree(out)
    out.symlink_to(tmp_path / "disk")
    assert COMMANDS[command](run, out) == 0
    assert out.is_symlink()
    assert (tmp_path / "disk").is_dir()


def test_a_rank_lost_while_loading_is_no_misfit(run: Path, finished: tuple[Path, Path]) -> None:
    shutil.rmtree(step(run, 4))
    script = Path(__file__).with_name("lost_while_loading.py")
    done = torchrun(2, *TO_REPORT, script, finished[0], *SHORT_RUN, "--run.output", str(run))
    assert done.returncode != 0
    assert "does not fit" not in done.stderr
    assert "error: rank 0 lost another rank" in done.stderr
    assert find_newest(run, pytest.fail) == step(run, 2)
