"""Export: the folder computes what the trained model computes, and carries its record."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.train.checkpoint import find_newest, load_model_state
from motifarch.train.manifest import read_manifest, write_manifest


def trained_model(run_folder: Path) -> MotifForCausalLM:
    record = json.loads((run_folder / "run.json").read_text())
    model = MotifForCausalLM(MotifConfig(**record["model_config"]))
    load_model_state(find_newest(run_folder), model)
    return model.eval()


@pytest.fixture
def exported(finished_run, tmp_path) -> Path:
    return export(finished_run, tmp_path / "model")


def test_logits_are_the_trained_models(finished_run, exported):
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained_model(finished_run)(ids).logits, atol=0, rtol=0)


def test_the_trained_weights_are_not_the_first_ones(finished_run):
    trained = trained_model(finished_run)
    torch.manual_seed(0)
    fresh = MotifForCausalLM(trained.config)
    assert (trained.model.embed_tokens.weight - fresh.model.embed_tokens.weight).abs().max() > 1e-3


def test_the_folder_carries_tokenizer_record_and_origin(finished_run, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "alpha beta = gamma"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (exported / "run.json").read_bytes() == (finished_run / "run.json").read_bytes()
    origin = json.loads((exported / "export.json").read_text())
    assert origin["step"] == 6
    assert Path(origin["checkpoint"]).name == "step_00000006"
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["MotifForCausalLM"]
    assert config["rope_theta"] == 10000.0
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_bfloat16_halves_the_weights(finished_run, exported, tmp_path):
    half = export(finished_run, tmp_path / "half", dtype="bfloat16")
    size = [(folder / "model.safetensors").stat().st_size for folder in (half, exported)]
    assert size[0] < 0.6 * size[1]
    assert AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16


def test_one_checkpoint_by_name_and_an_earlier_export_replaced(finished_run, exported):
    (exported / "stale.txt").write_text("from an earlier export")
    assert export(find_newest(finished_run), exported) == exported
    assert not (exported / "stale.txt").exists()
    assert (exported / "model.safetensors").exists()


def test_refuses_with_a_reason(finished_run, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        export(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(tmp_path / "empty")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no exported model"):
        export(finished_run, tmp_path / "letters")
    assert (tmp_path / "letters" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="holds no tokenizer that loads"):
        export(finished_run, tmp_path / "out", tokenizer=str(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_a_run_whose_data_is_gone_asks_for_the_tokenizer(finished_run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished_run, moved)
    checkpoint = find_newest(moved)
    content = read_manifest(checkpoint)
    content["about"]["data"][0]["path"] = str(tmp_path / "gone")
    write_manifest(checkpoint, **{name: content[name] for name in ("step", "about", "files")})
    with pytest.raises(UserError, match="name one with --tokenizer"):
        export(moved)


def test_a_damaged_checkpoint_is_refused(finished_run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(finished_run, broken)
    shard = next(find_newest(broken).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(broken)
    with pytest.raises(UserError, match="bytes instead of"):
        export(next((broken / "checkpoints").iterdir()))


def test_command_line(finished_run, tmp_path, capsys):
    assert run(["export", str(finished_run), "--output", str(tmp_path / "cli"), "--dtype", "bfloat16"]) == 0
    assert f"exported to {tmp_path / 'cli'}" in capsys.readouterr().out
