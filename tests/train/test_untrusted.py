"""A checkpoint is data: one with code is refused by every reader, and nothing is executed."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties

from helpers.tiny import write_recipe
from motifarch.checkpoint_reader import CheckpointReader
from motifarch.cli import run as command
from motifarch.commands.average import main as average
from motifarch.commands.export import main as export
from motifarch.errors import UserError
from motifarch.files import sha256
from motifarch.study.measure import measure
from motifarch.tokenizer.loading import load_tokenizer
from motifarch.train.main import main as train
from motifarch.train.manifest import damage, read_manifest, write_manifest

STEPS = ("--run.steps", "2", "--checkpoint.every", "2", "--optim.warmup_steps", "1", "--validation.every", "0")


class Executes:
    """Unpickled, runs a shell command that leaves a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """A recipe and the output folder of its run."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, data)
    assert train([str(recipe), *STEPS]) == 0
    return recipe, folder / "run"


def seal(checkpoint: Path) -> None:
    """Makes the manifest agree with the files, as who spoils a checkpoint on purpose would."""
    manifest = read_manifest(checkpoint)
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
        for name in manifest["files"]
    }
    write_manifest(checkpoint, step=manifest["step"], about=manifest["about"], files=files)
    assert damage(checkpoint) is None


def in_metadata(checkpoint: Path, proof: Path) -> None:
    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = Executes(proof)
    file.write_bytes(pickle.dumps(metadata))


def in_a_number(checkpoint: Path, proof: Path) -> None:
    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    saved = io.BytesIO()
    torch.save(Executes(proof), saved)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "progress.step")
    shard = checkpoint / place.relative_path
    place.offset, place.length = shard.stat().st_size, len(saved.getvalue())
    shard.write_bytes(shard.read_bytes() + saved.getvalue())
    file.write_bytes(pickle.dumps(metadata))


Reader = Callable[[Path, Path, Path, Path], Any]
READERS: dict[str, Reader] = {
    "auto-resume": lambda recipe, run, _, out: train([str(recipe), *STEPS, "--run.output", str(run)]),
    "run.resume": lambda recipe, _, checkpoint, out: train(
        [str(recipe), *STEPS, "--run.output", str(out), "--run.resume", str(checkpoint)]
    ),
    "run.init_from": lambda recipe, _, checkpoint, out: train(
        [str(recipe), *STEPS, "--run.output", str(out), "--run.init_from", str(checkpoint)]
    ),
    "export": lambda _, run, checkpoint, out: export([str(run), "--output", str(out)]),
    "average": lambda _, run, checkpoint, out: average([str(run), "--last", "1", "--output", str(out)]),
    "measure": lambda _, run, checkpoint, out: measure(run, seed=0),
}


@pytest.fixture
def spoilt(whole: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    run = shutil.copytree(whole[1], tmp_path / "copy")
    return whole[0], run, run / "checkpoints" / "step_00000002"


@pytest.mark.parametrize("reader", READERS)
def test_code_in_the_metadata_is_refused(spoilt: tuple[Path, Path, Path], tmp_path: Path, reader: str) -> None:
    in_metadata(spoilt[2], tmp_path / "proof")
    seal(spoilt[2])
    with pytest.raises(UserError, match=r"step_00000002 can't be used: its \.metadata.*system.*no part of"):
        READERS[reader](*spoilt, tmp_path / "out")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("reader", ["auto-resume", "run.resume"])  # the others read weights alone
def test_code_in_place_of_a_number_is_refused(spoilt: tuple[Path, Path, Path], tmp_path: Path, reader: str) -> None:
    in_a_number(spoilt[2], tmp_path / "proof")
    seal(spoilt[2])
    with pytest.raises(UserError, match="step_00000002 can't be read: Weights only load failed"):
        READERS[reader](*spoilt, tmp_path / "out")
    assert not (tmp_path / "proof").exists()


def test_the_command_exits_with_one_line(
    spoilt: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_metadata(spoilt[2], tmp_path / "proof")
    seal(spoilt[2])
    with pytest.raises(UserError) as caught:
        command(["export", str(spoilt[1]), "--output", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in "".join(capfd.readouterr())


def class_state(kind: type, attributes: dict[str, Any]) -> bytes:
    """A pickle that sets attributes on a class: its BUILD takes (None, {name: value})."""
    name = pickle.dumps(kind, protocol=4)[:-1]  # without STOP
    state = pickle.dumps((None, attributes), protocol=4)[2:-1]
    return name + state + pickle.BUILD + pickle.STOP


PICKLES = {
    "a function of the builtins": b"cbuiltins\neval\n(S'1'\ntR.",
    "an attribute of an allowed name": b"\x80\x04\x8c\x05torch\x8c\x0eSize.__class__\x93.",
    "a module of the same package": b"ctorch.distributed.checkpoint.filesystem\nos\n.",
    "a loader of files": b"ctorch.serialization\nload\n(S'x'\ntR.",
    "an extension": b"\x82\x01.",
    "an object by its number": b"Vx\nP.",
    "a change of a class": class_state(Metadata, {"__init__": StorageMeta}),
    "a change of a class's method": class_state(TensorProperties, {"__setstate__": torch.Size}),
    "another object": pickle.dumps({"a": 1}),
    "nothing": b"",
    "a part": pickle.dumps(Metadata({}))[:-5],
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_are_no_metadata(tmp_path: Path, case: str) -> None:
    before = {kind: dict(vars(kind)) for kind in (Metadata, TensorProperties)}
    (tmp_path / ".metadata").write_bytes(PICKLES[case])
    with pytest.raises(UserError, match=r"its \.metadata is damaged or no checkpoint's"):
        CheckpointReader(tmp_path)
    assert {kind: dict(vars(kind)) for kind in before} == before


def test_a_file_outside_the_folder_is_refused(spoilt: tuple[Path, Path, Path]) -> None:
    file = spoilt[2] / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../step_00000002/{place.relative_path}"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"names the file \.\./step_00000002"):
        CheckpointReader(spoilt[2])


def test_everything_that_torch_saves_is_read(spoilt: tuple[Path, Path, Path]) -> None:
    theirs = pickle.loads((spoilt[2] / ".metadata").read_bytes())
    ours = CheckpointReader(spoilt[2]).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_nobody_is_asked_whether_to_run_a_folders_code(
    whole: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    about = json.loads((tokenizer / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "code.Mine"]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(about))
    (tokenizer / "code.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at a terminal"))
    with pytest.raises(UserError, match=r"holds no tokenizer that loads.*contains custom code"):
        export([str(whole[1]), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)])
    with pytest.raises(UserError, match=r"cannot load tokenizer.*contains custom code"):
        load_tokenizer(tokenizer)
    assert not (tmp_path / "proof").exists()
