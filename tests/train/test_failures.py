"""What goes wrong ends in one message, and nothing saved before is lost."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from helpers.distributed import torchrun
from helpers.tiny import SHORT_RUN, prepare_text
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.train.main import main
from motifarch.train.manifest import find_newest, list_checkpoints, read_manifest, write_manifest
from motifarch.train.run_folder import read_metrics

FULL_DISK = Path(__file__).with_name("full_disk.py")


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_full_disk(recipe: Path, tmp_path: Path, asynchronous: str) -> None:
    done = torchrun(2, FULL_DISK, recipe, "--model.hidden_size", "64", "--checkpoint.asynchronous", asynchronous)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for part in ("step 20", str(tmp_path / "run"), "File too large", "step_00000010", "resume"):
        assert part in errors[0]
    # The only stack of frames is torchrun's own report, which ends with the same message.
    assert done.stderr.count("Traceback") == 1
    assert errors[0] in done.stderr.rpartition("Root Cause")[2]
    newest = find_newest(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step_00000010"


def _truncate(checkpoint: Path) -> str:
    shard = checkpoint / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    return "__0_0.distcp has"


def _flip(checkpoint: Path) -> str:
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return "has changed"


def _remove(checkpoint: Path) -> str:
    (checkpoint / ".metadata").unlink()
    return ".metadata is missing"


def _garble(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text('{"format": 1, "files"')
    return "manifest.json can't be read"


@pytest.mark.parametrize("spoil", [_truncate, _flip, _remove, _garble])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    run: Path, finished: tuple[Path, Path], capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], str]
) -> None:
    damaged = run / "checkpoints" / "step_00000004"
    reason = spoil(damaged)
    assert main([str(finished[0]), *SHORT_RUN, "--run.output", str(run)]) == 0
    printed = capfd.readouterr().out
    assert f"passing over the checkpoint {damaged}" in printed
    assert reason in printed
    assert "resuming after step 2" in printed
    # The step was saved again.
    assert find_newest(run, pytest.fail) == damaged
    assert read_metrics(run / "metrics.jsonl")[-1]["loss"] == read_metrics(finished[1] / "metrics.jsonl")[-1]["loss"]


def test_a_named_checkpoint_must_be_whole(run: Path, finished: tuple[Path, Path]) -> None:
    damaged = run / "checkpoints" / "step_00000004"
    _flip(damaged)
    with pytest.raises(UserError, match=r"run\.resume is .*step_00000004, which can't be used.*has changed"):
        main([str(finished[0]), "--run.resume", str(damaged), "--run.output", str(run)])
    with pytest.raises(UserError, match="no folder"):
        main([str(finished[0]), "--run.resume", str(run / "nothing"), "--run.output", str(run)])


def test_a_run_is_not_mixed_with_another(run: Path, finished: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"run\.resume is none, but .*step_00000004"):
        main([str(finished[0]), "--run.resume", "none", "--run.output", str(run)])
    with pytest.raises(UserError, match="branch off"):
        main([str(finished[0]), "--run.resume", str(run / "checkpoints/step_00000002"), "--run.output", str(run)])


def test_branching_off_into_another_folder(
    finished: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, output = finished
    parent = output / "checkpoints" / "step_00000002"
    assert main([str(recipe), *SHORT_RUN, "--run.resume", str(parent), "--run.output", str(tmp_path / "branch")]) == 0
    assert "resuming after step 2" in capfd.readouterr().out
    rows = read_metrics(tmp_path / "branch" / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in rows] == [
        (r["step"], r["loss"]) for r in read_metrics(output / "metrics.jsonl")[2:]
    ]


def test_other_data_is_refused(run: Path, finished: tuple[Path, Path], tmp_path: Path) -> None:
    other = prepare_text(tmp_path, seed=1)
    with pytest.raises(UserError, match="was prepared with another tokenizer"):
        main([str(finished[0]), "--data.datasets", f"[{{path: {other}}}]", "--run.output", str(run)])
    checkpoint = run / "checkpoints" / "step_00000004"
    content = read_manifest(checkpoint)
    content["about"]["data"][0]["fingerprint"] = "0" * 64
    write_manifest(checkpoint, **{name: content[name] for name in ("step", "about", "files")})
    with pytest.raises(UserError, match=r"data\.datasets is .*000000000000"):
        main([str(finished[0]), "--run.output", str(run)])


def test_another_model_is_refused(run: Path, finished: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="num_hidden_layers is 3, but 2"):
        main([str(finished[0]), "--run.output", str(run), "--model.num_hidden_layers", "3"])


def test_a_finished_run_is_left_as_it_is(run: Path, finished: tuple[Path, Path]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}
    metrics = (run / "metrics.jsonl").read_text()
    assert main([str(finished[0]), *SHORT_RUN, "--run.output", str(run)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")} == before
    assert (run / "metrics.jsonl").read_text() == metrics


def test_init_from_takes_weights_alone(
    finished: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, output = finished
    weights = str(output / "checkpoints" / "step_00000004")
    fresh = ["--run.output", str(tmp_path / "tuned"), "--run.init_from", weights]
    assert main([str(recipe), *SHORT_RUN, *fresh]) == 0
    assert f"with the weights of {weights}, into" in capfd.readouterr().out
    first = read_metrics(tmp_path / "tuned" / "metrics.jsonl")[0]
    assert first["step"] == 1
    assert first["loss"] < read_metrics(output / "metrics.jsonl")[0]["loss"]
    assert json.loads((tmp_path / "tuned" / "run.json").read_text())["parent"]["checkpoint"] == weights


def test_init_from_says_what_the_folder_computed_otherwise(
    finished: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, output = finished
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    fields = json.loads((output / "run.json").read_text())["model_config"]
    fields = {k: v for k, v in fields.items() if k != "rope_parameters"} | {"rope_scaling": scaling}
    MotifForCausalLM(MotifConfig(**fields | {"rms_norm_eps": 1e-3})).save_pretrained(tmp_path / "folder")
    begin = ["--run.init_from", str(tmp_path / "folder"), "--run.output", str(tmp_path / "tuned")]
    assert main([str(recipe), *SHORT_RUN, *begin, "--model.rope_scaling", json.dumps(scaling)]) == 0
    warnings = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "folder, whose model has rms_norm_eps 0.001, but the recipe's 1e-06" in warnings[0]
    assert json.loads((tmp_path / "tuned" / "run.json").read_text())["model_config"]["rope_scaling"] == scaling


def test_the_run_stops_after_too_many_nonfinite_steps(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, 1.0])

    def overflow_later(parameters: Iterable[torch.Tensor], clip: float | None) -> torch.Tensor:
        return torch.tensor(next(norms, math.inf))

    monkeypatch.setattr("motifarch.train.step.clip_gradients", overflow_later)
    with pytest.raises(UserError, match=r"skipped 3 steps in a row, with a non-finite.*run\.max_nonfinite_in_row is 3"):
        main([str(recipe), "--run.max_nonfinite_in_row", "3", "--log.every", "1"])
    newest = find_newest(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step_00000005"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[-1]["skipped_total"] == 3
    assert rows[-1]["grad_norm"] is None


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [6]), (2, [6, 4]), (0, [6, 4, 2])])
def test_keep_last(recipe: Path, tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    every = ["--run.steps", "6", "--checkpoint.every", "2", "--optim.warmup_steps", "1", "--validation.every", "0"]
    assert main([str(recipe), *every, "--checkpoint.keep_last", str(keep_last)]) == 0
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == [f"step_{step:08d}" for step in kept]


def test_a_missing_folder_and_a_small_vocabulary(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        main([str(recipe), "--data.datasets", f"[{{path: {tmp_path / 'nowhere'}}}]"])
    with pytest.raises(UserError, match=r"model\.vocab_size is 10, but the tokenizer of .* has 300"):
        main([str(recipe), "--model.vocab_size", "10"])
    with pytest.raises(UserError, match="max_position_embeddings is 16"):
        main([str(recipe), "--model.max_position_embeddings", "16"])
    with pytest.raises(UserError, match="the model section of the recipe"):
        main([str(recipe), "--model.num_attention_heads", "7"])


def test_one_message_for_all_ranks(recipe: Path) -> None:
    done = torchrun(2, "-m", "motifarch.train", recipe, "--optim.lr_ratio", "1")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: unknown recipe field 'optim.lr_ratio' on the command line; did you mean 'optim.min_lr_ratio'?"
    ]
    assert errors[0] in done.stderr.rpartition("Root Cause")[2]


def test_cpu_kernels_that_are_not_known(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTIF_CPU_KERNELS", "fast")
    with pytest.raises(UserError, match="MOTIF_CPU_KERNELS is 'fast'"):
        main([str(recipe)])
