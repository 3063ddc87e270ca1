"""Averages, exports, grown models and what is trained from them are links of the chain; what came
from outside stays named through them all.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.tiny import RECIPE, prepare_text, write_recipe
from motifarch.average import average
from motifarch.cli import run as command_line
from motifarch.export import export
from motifarch.integrations import patch
from motifarch.ledger.chain import FOLDER
from motifarch.train.main import main as train
from motifarch.train.manifest import find_newest
from motifarch.verify.first_weights import verify_first_weights
from motifarch.verify.links import chain_of, verify_links
from motifarch.verify.made_of import verify_made_of
from motifarch.verify.replay import intervals

SAVES: dict[str, Any] = {"every": 10, "keep_last": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps, saved each ten."""
    folder = tmp_path_factory.mktemp("first")
    assert train([str(write_recipe(folder, data, checkpoint=SAVES)), "--run.steps", "20"]) == 0
    return folder / "run"


def kinds(folder: Path) -> list[str]:
    return [entry.link["kind"] for entry in chain_of(folder)[1]]


def holds(folder: Path, made_of: Path) -> bool:
    found = verify_links(folder)
    found.found += verify_made_of(folder, made_of, *chain_of(folder)).found
    return not found.failed


def changed(folder: Path, copy: Path) -> Path:
    """A copy of a model's folder with one number changed."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_goes_back_to_the_seed(run: Path, tmp_path: Path, dtype: str) -> None:
    exported = export(run, tmp_path / "model", dtype=dtype)
    assert kinds(exported) == ["export", "checkpoint", "checkpoint", "first weights"]
    assert holds(exported, run)
    assert verify_first_weights(*chain_of(exported)).failed == []
    assert verify_links(changed(exported, tmp_path / "changed")).failed != []


def test_an_export_of_other_weights_is_found(run: Path, data: Path, tmp_path: Path) -> None:
    assert train([str(write_recipe(tmp_path, data)), "--run.steps", "10", "--run.seed", "1"]) == 0
    exported = export(run, tmp_path / "model")
    assert not holds(exported, tmp_path / "run")


def test_an_average_is_a_link_and_so_is_its_export(run: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean"
    checkpoint = average(run, mean, 2)
    assert kinds(mean) == ["average", "checkpoint", "checkpoint", "first weights"]
    assert holds(mean, run)
    exported = export(mean, tmp_path / "model")
    assert kinds(exported)[:2] == ["export", "average"]
    assert holds(exported, checkpoint)


def test_a_grown_model_and_its_training_go_back_to_the_first_seed(run: Path, data: Path, tmp_path: Path) -> None:
    small = export(run, tmp_path / "small")
    assert command_line(["grow", str(small), str(tmp_path / "grown"), "--layers", "4"]) == 0
    assert kinds(tmp_path / "grown")[:2] == ["growth", "export"]
    assert verify_links(tmp_path / "grown").failed == []
    model = RECIPE["model"] | {"num_hidden_layers": 4}
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES, model=model)
    assert train([str(recipe), "--run.init_from", str(tmp_path / "grown"), "--run.steps", "10"]) == 0
    large = tmp_path / "run"
    assert kinds(large)[:4] == ["checkpoint", "first weights", "growth", "export"]
    assert holds(large, tmp_path / "grown")
    assert verify_first_weights(*chain_of(large)).failed == []  # of the small model
    other = changed(tmp_path / "grown", tmp_path / "other")
    assert not holds(large, other)


def test_what_came_from_outside_stays_named(run: Path, data: Path, tmp_path: Path) -> None:
    theirs = export(run, tmp_path / "theirs")
    shutil.rmtree(theirs / FOLDER)
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    assert train([str(recipe), "--run.init_from", str(theirs), "--run.steps", "10"]) == 0
    exported = export(tmp_path / "run", tmp_path / "model")
    assert command_line(["grow", str(exported), str(tmp_path / "grown"), "--layers", "4"]) == 0
    for folder in (tmp_path / "run", exported, tmp_path / "grown"):
        (finding,) = verify_links(folder).failed
        assert "theirs" in finding.detail


def test_weights_that_changed_since_their_entry_count_as_from_outside(run: Path, data: Path, tmp_path: Path) -> None:
    given = changed(export(run, tmp_path / "model"), tmp_path / "changed")
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    assert train([str(recipe), "--run.init_from", str(given), "--run.steps", "10"]) == 0
    (finding,) = verify_links(tmp_path / "run").failed
    assert "changed" in finding.detail


def test_a_run_that_goes_on_from_another_holds(run: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    parent = find_newest(run)
    assert train([str(recipe), "--run.resume", str(parent), "--run.steps", "30"]) == 0
    assert kinds(tmp_path / "run") == ["checkpoint", "start", "checkpoint", "checkpoint", "first weights"]
    assert verify_links(tmp_path / "run").failed == []
    (interval,) = intervals(run, chain_of(run)[1])[:1]
    assert interval.end.step == 10


def test_a_run_of_before_the_ledger_goes_on_and_says_so(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "run"
    shutil.copytree(run, old)
    shutil.rmtree(old / FOLDER)
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES)
    assert train([str(recipe), "--run.steps", "30"]) == 0
    assert "is in no ledger" in capsys.readouterr().out
    assert any("run/step_00000020" in finding.detail for finding in verify_links(old).failed)


def test_an_export_of_adapters_has_an_entry(run: Path, data: Path, tmp_path: Path) -> None:
    exported = export(run, tmp_path / "base")
    recipe = write_recipe(tmp_path, data, checkpoint=SAVES, lora={"rank": 2})
    assert train([str(recipe), "--run.init_from", str(exported), "--run.steps", "10"]) == 0
    adapter = export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    assert verify_links(adapter).failed == []
    assert torch.is_tensor(next(iter(load_file(adapter / "adapter_model.safetensors").values())))


def test_a_patched_model_names_what_it_was_made_of(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "llama")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    patch(model, ratio=2)
    model.save_pretrained(tmp_path / "patched")
    (finding,) = verify_links(tmp_path / "patched").failed
    assert "llama" in finding.detail
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    again.save_pretrained(tmp_path / "again")
    assert kinds(tmp_path / "again") == ["patch", "patch"]
    assert "llama" in verify_links(tmp_path / "again").failed[0].detail
