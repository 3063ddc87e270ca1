"""Averages of checkpoints: written by the command, and fed back into training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from helpers.distributed import train
from helpers.tiny import write_recipe
from motifarch.commands.average import main as average
from motifarch.commands.export import main as export
from motifarch.errors import UserError
from motifarch.train.main import main
from motifarch.train.manifest import damage
from motifarch.train.run_folder import read_metrics

KEEP_ALL = ("--checkpoint.every", "2", "--checkpoint.keep_last", "0")
EVERY_TWO = (*KEEP_ALL, "--validation.every", "0", "--optim.warmup_steps", "1")
FEEDBACK = ("--average.every", "4", "--average.last", "3")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model, whole, by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = checkpoint.parent.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    return torch.load(file)["model"]  # type: ignore[no-any-return]


def plain_mean(run: Path, *steps: int) -> dict[str, torch.Tensor]:
    contents = [weights(run / "checkpoints" / f"step_{step:08d}") for step in steps]
    return {name: torch.stack([c[name].double() for c in contents]).mean(0).float() for name in contents[0]}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """A recipe and the run of 6 steps on two ranks that keeps every second one."""
    folder = tmp_path_factory.mktemp("sharded")
    recipe = write_recipe(folder, data)
    train(2, folder, recipe, *EVERY_TWO, "--run.steps", "6")
    return recipe, folder / "run"


def test_the_command_writes_the_mean_of_sharded_checkpoints(
    sharded: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, run = sharded
    output = tmp_path / "mean"
    assert average([str(run), "--last", "2", "--output", str(output)]) == 0
    checkpoint = output / "checkpoints" / "step_00000006"
    assert f"the mean of steps 6, 4 is in {checkpoint}" in capfd.readouterr().out
    assert damage(checkpoint) is None
    found, expected = weights(checkpoint), plain_mean(run, 6, 4)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-12)
    last = weights(run / "checkpoints" / "step_00000006")
    assert not torch.equal(found["model.norm.weight"], last["model.norm.weight"])

    # Exported, and taken as first weights.
    assert export([str(output)]) == 0
    from motifarch.models.motif import MotifForCausalLM

    loaded = MotifForCausalLM.from_pretrained(output / "export").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in found.items())
    begin = ("--run.init_from", str(checkpoint), "--run.output", str(tmp_path / "next"), "--optim.lr", "0")
    assert main([str(recipe), *EVERY_TWO, *begin, "--run.steps", "2"]) == 0
    kept = weights(tmp_path / "next" / "checkpoints" / "step_00000002")
    assert all(torch.equal(kept[name], value) for name, value in found.items())

    # A newer average takes its place; a run's own folder is never overwritten.
    assert average([str(run), "--last", "3", "--output", str(output)]) == 0
    assert json.loads((output / "run.json").read_text())["average_of"] == [6, 4, 2]
    with pytest.raises(UserError, match="exists and is no average"):
        average([str(run), "--last", "2", "--output", str(run)])
    with pytest.raises(UserError, match=r"--last is 4, but .* holds 3 complete checkpoints; use fewer"):
        average([str(run), "--last", "4", "--output", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"is an average and holds weights alone.*--run\.init_from"):
        main([str(recipe), "--run.output", str(output)])


def test_a_damaged_checkpoint_has_no_part_in_the_mean(
    sharded: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(sharded[1], tmp_path / "copy")
    shard = run / "checkpoints" / "step_00000006" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert average([str(run), "--last", "2", "--output", str(tmp_path / "mean")]) == 0
    printed = capfd.readouterr().out
    assert "the mean of steps 4, 2" in printed
    assert "passing over the checkpoint" in printed


def test_a_mean_is_written_a_tensor_at_a_time(
    sharded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    load = dcp.load

    def watched(state_dict: dict[str, dict[str, torch.Tensor]], **options: object) -> None:
        sizes.append(len(state_dict["model"]))
        load(state_dict, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(dcp, "load", watched)
    average([str(sharded[1]), "--last", "3", "--output", str(tmp_path / "mean")])
    tensors = len(weights(tmp_path / "mean" / "checkpoints" / "step_00000006"))
    assert sizes == [1] * (3 * tensors)


def test_a_changed_bit_has_no_part_in_what_training_goes_on_from(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(recipe), *EVERY_TWO, "--average.every", "6", "--average.last", "3")
    assert main([*arguments, "--run.steps", "4"]) == 0
    shard = tmp_path / "run" / "checkpoints" / "step_00000002" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main([*arguments, "--run.steps", "8"]) == 0
    printed = capfd.readouterr().out
    assert "step_00000002: its file __0_0.distcp has changed" in printed
    assert "the mean of the checkpoints of steps 6, 4" in printed


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


def test_training_goes_on_from_the_mean(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(name: str, steps: int, *options: str) -> Path:
        arguments = ("--run.output", str(tmp_path / name), "--run.steps", str(steps), *EVERY_TWO)
        assert main([str(recipe), *arguments, *options]) == 0
        return tmp_path / name

    plain, fed = run("plain", 8), run("fed", 10, *FEEDBACK)
    printed = capfd.readouterr().out
    assert "the mean of the checkpoints of steps 4, 2" in printed
    assert "the mean of the checkpoints of steps 8, 6, 4" in printed
    # The checkpoint of step 4 holds what was trained; the step after it starts from the mean.
    assert losses(fed)[:4] == losses(plain)[:4]
    assert losses(fed)[4] != losses(plain)[4]
    assert all(torch.equal(value, plain_mean(plain, 4)[name]) for name, value in plain_mean(fed, 4).items())
    still = run("still", 6, *FEEDBACK, "--run.resume", str(fed / "checkpoints" / "step_00000004"), "--optim.lr", "0")
    for name, value in weights(still / "checkpoints" / "step_00000006").items():
        torch.testing.assert_close(value, plain_mean(fed, 4, 2)[name], rtol=1e-6, atol=1e-9)

    # Stopped right at an average, and between two: bitwise the same run.
    for stop in (4, 6):
        run(f"stop{stop}", stop, *FEEDBACK)
        assert losses(run(f"stop{stop}", 10, *FEEDBACK)) == losses(fed)


def test_two_ranks_take_the_same_mean(sharded: tuple[Path, Path], tmp_path: Path, data: Path) -> None:
    recipe, run = sharded
    two = tmp_path / "two"
    options = (*EVERY_TWO, *FEEDBACK, "--run.steps", "6", "--run.output", str(two), "--optim.lr", "0")
    shutil.copytree(run, two, ignore=shutil.ignore_patterns("step_00000006*"))
    printed = train(2, tmp_path, recipe, *options)
    assert printed.count("the mean of the checkpoints of steps 4, 2") == 1
    expected = plain_mean(run, 4, 2)
    for name, value in weights(two / "checkpoints" / "step_00000006").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--average.every", "15"), r"average\.every is 15, which is no multiple of checkpoint\.every \(10\)"),
        (("--average.every", "20"), r"checkpoint\.keep_last is 2, but average\.last needs 6"),
    ],
)
def test_bad_settings_are_refused(recipe: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(recipe), *options])
