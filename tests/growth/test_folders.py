"""Model folders: what is damaged is named, what is written is whole or not there."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.models import tiny_model
from motifarch.errors import UserError
from motifarch.growth import FolderWriter, SourceFolder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder as transformers writes it, in several files."""
    folder = tmp_path / "sharded"
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_reads_what_transformers_wrote(sharded):
    source, state = SourceFolder(sharded), tiny_model().state_dict()
    assert sorted(source.names) == sorted(state)
    for name, tensor in state.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(source.read(name), tensor)
    assert len(source.files) == len(list(sharded.glob("*.safetensors")))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


DAMAGE = {
    "no folder": (lambda f: os.rename(f, f.with_name("elsewhere")), "sharded is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "sharded has no config.json; give a folder with"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type":'), "config.json can't be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list, no object"),
    "no weights": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "a truncated shard": (
        lambda f: os.truncate(shard(f), shard(f).stat().st_size - 100),
        "model-00002.*safetensors is truncated or damaged .*; copy or export it anew",
    ),
    "quantised weights": (
        lambda f: save_file({n: t.to(torch.int8) for n, t in load_file(shard(f)).items()}, shard(f)),
        "model-00002.*safetensors holds .* as I8; weights are read as F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(sharded, kind):
    damage, message = DAMAGE[kind]
    damage(sharded)
    with pytest.raises(UserError, match=message):
        SourceFolder(sharded)


def test_a_file_that_goes_while_it_is_read(sharded):
    source = SourceFolder(sharded)
    path = shard(sharded)
    name = next(iter(load_file(path)))
    path.unlink()
    with pytest.raises(UserError, match=r"model-00002.*safetensors can't be read any more"):
        source.read(name)


@pytest.mark.parametrize("max_shard_bytes", [1, 30_000, 2**30])
def test_writes_what_transformers_reads(tmp_path, max_shard_bytes):
    model = tiny_model()
    tiny_model().save_pretrained(tmp_path / "small")
    with FolderWriter(tmp_path / "new", SourceFolder(tmp_path / "small").config, max_shard_bytes=max_shard_bytes) as w:
        for name, tensor in model.state_dict().items():
            w.write(name, tensor)
        assert not (tmp_path / "new").exists()
    files = list((tmp_path / "new").glob("*.safetensors"))
    largest = max(t.numel() * 4 for t in model.state_dict().values())
    assert all(f.stat().st_size < max(max_shard_bytes, largest) + 5_000 for f in files)
    assert (len(files) == 1) == (max_shard_bytes == 2**30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "small"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_failure_leaves_nothing(tmp_path):
    def fail() -> None:
        with FolderWriter(tmp_path / "new", {}, max_shard_bytes=1) as writer:
            writer.write("first", torch.zeros(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("mine")
    with pytest.raises(UserError, match="new exists already; remove it, or give another output folder"):
        FolderWriter(tmp_path / "new", {}).__enter__()
    assert (tmp_path / "new" / "mine").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("motifarch.growth.folders.save_file", full)

    def write() -> None:
        with FolderWriter(tmp_path / "new", {}) as writer:
            writer.write("first", torch.zeros(3))

    with pytest.raises(UserError, match=r"new can't be written: .*No space left"):
        write()
    assert list(tmp_path.iterdir()) == []
