"""Export: the folder computes what the trained model computes, and carries its record."""

import json
import os
import shutil
import stat
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.hub import stand_in_hub
from helpers.python_process import run_python
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


def test_the_card_says_what_the_run_recorded(finished_run, exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"motifarch", "gda"} <= set(card.data.tags)
    model = trained_model(finished_run)
    record = json.loads((finished_run / "run.json").read_text())
    origin = json.loads((exported / "export.json").read_text())
    for fact in (
        f"{model.num_parameters():,} parameters",
        record["data"][0]["fingerprint"],
        origin["manifest_sha256"],
        f"torch {version('torch')}",
        "6 steps of 8 sequences",
        "has\nnot been trained on it",
        "None was recorded",  # the run had no validation
    ):
        assert fact in card.text
    assert str(finished_run.parent) not in card.content, "a path of this machine"


def test_the_card_gives_the_validation_loss_of_the_exported_step(finished_run, tmp_path):
    run_folder = shutil.copytree(finished_run, tmp_path / "copy")
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"validation_loss": 3.25, "validation_bits_per_byte": 1.5}
    later = rows[-1] | {"step": 7, "validation_loss": 9.75}
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, later]))
    text = (export(run_folder) / "README.md").read_text()
    assert "3.2500 nats a token, 1.5000 bits per byte" in text
    assert "9.75" not in text


def test_a_tokenizer_without_a_chat_template_gets_one(finished_run, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    messages = [
        {"role": "user", "content": "alpha"},
        {"role": "assistant", "content": "beta"},
        {"role": "user", "content": "gamma"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "User:\nalpha\nAssistant:\nbeta<|endoftext|>\nUser:\ngamma\nAssistant:\n"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answered = [i for i, of_answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if of_answer]
    assert tokenizer.decode(answered) == "beta<|endoftext|>"


def test_a_chat_template_of_the_tokenizers_own_stays(finished_run, exported, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = export(finished_run, tmp_path / "own", tokenizer=str(tmp_path / "tokenizer"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert "The tokenizer's own" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_permissions_that_the_umask_leaves(finished_run, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = export(finished_run, tmp_path / "model", with_code=True)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == dict.fromkeys(
        (file.name for file in files), oct(mode)
    )


PUSH = """
    import sys
    from motifarch.cli import main
    main(["export", *sys.argv[1:]])
"""


def test_push_to_hub(finished_run, exported, tmp_path, monkeypatch):
    with stand_in_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_made_up", "HF_HOME": str(tmp_path / "hf")}
        for name, value in (settings | {"HF_HUB_DISABLE_XET": "1"}).items():  # files in the commit itself
            monkeypatch.setenv(name, value)
        output = ["--output", tmp_path / "pushed", "--with-code", "--push-to-hub", "someone/tiny", "--private"]
        said = run_python(PUSH, finished_run, *output, offline=False)
        assert f"pushed to {hub.url}/someone/tiny" in said
        pushed = tmp_path / "pushed"
        files = [path for path in pushed.rglob("*") if path.is_file()]
        assert hub.repositories["someone/tiny"] == {str(p.relative_to(pushed)): p.read_bytes() for p in files}
        assert hub.visibility["someone/tiny"]
        assert hub.tokens == {"Bearer hf_made_up"}

        code = """
            import sys
            from motifarch.errors import UserError
            from motifarch.export.hub import push_folder
            from pathlib import Path
            try:
                push_folder(Path(sys.argv[1]), "refused/tiny")
            except UserError as error:
                print(error)
            from motifarch.models.motif import MotifForCausalLM
            MotifForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("someone/object")
        """
        said = run_python(code, exported, offline=False)
        assert "refused/tiny" in said
        assert "hf auth login" in said
        assert hub.repositories["someone/object"]["config.json"] == (exported / "config.json").read_bytes()


def test_a_name_that_is_no_repositorys_is_refused_before_any_work(finished_run, tmp_path):
    with pytest.raises(UserError, match="USER/MODEL"):
        run(["export", str(finished_run), "--output", str(tmp_path / "out"), "--push-to-hub", "a/b/c"])
    with pytest.raises(UserError, match="--push-to-hub"):
        run(["export", str(finished_run), "--output", str(tmp_path / "out"), "--private"])
    assert not (tmp_path / "out").exists()
