"""The scripts of examples/ run, and what they train learns."""

import json
import re
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers.chats import CHATS
from helpers.python_process import run_python
from helpers.released import SMALL, random_tensors, write_folder
from helpers.tiny import prepare_text, write_recipe
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.train.main import main as train

EXAMPLES = Path(__file__).parent.parent / "examples"

RUN_SCRIPT = """
import runpy, sys

script, tests, *arguments = sys.argv[1:]
if "from timm" in open(script).read():
    sys.path.insert(0, tests)
    from helpers.timm_models import make_timm_importable
    make_timm_importable()
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


EXPORT = """
import os, sys
from motifarch.cli import run
from motifarch.errors import UserError

source, folder, path = sys.argv[1:]
try:
    run(["export", source, "--output", f"{folder}1"])
except UserError as error:
    print(error)
os.environ["MOTIF_ATTENTION"] = path
run(["export", source, "--output", f"{folder}2"])
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM
from motifarch.models import register_attention

folder, path = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    print(error)
register_attention(path)
print(AutoModelForCausalLM.from_pretrained(folder))
"""


def run_example(name: str, *arguments: object) -> str:
    return run_python(RUN_SCRIPT, EXAMPLES / name, EXAMPLES.parent / "tests", *arguments)


def losses(printed: str) -> list[float]:
    return [float(x) for x in re.findall(r"loss'?:? '?([\d.]+)", printed)]


def test_every_example_is_short_and_run_by_a_test_below():
    tests = Path(__file__).read_text(encoding="utf-8")
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lines
    assert all(f'"{name}"' in tests for name in lines)
    assert max(lines.values()) <= 60, lines


def test_a_gpt_of_your_own_learns_text():
    first, *_, last = losses(run_example("nanogpt.py"))
    assert last < first / 2


def test_an_attention_of_your_own_trains_by_its_import_path_and_is_exported(tmp_path, capsys):
    assert (EXAMPLES / "gated_softmax.py").is_file()
    path = "examples.gated_softmax:GatedSoftmax"
    model = {"attention_type": path, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_noise_heads": None}
    recipe = write_recipe(tmp_path, prepare_text(tmp_path), model=model)
    assert train([str(recipe)]) == 0
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first
    folder = export(tmp_path / "run", tmp_path / "export")
    # Another process: a checkpoint is data, and imports nothing by itself.
    assert f"set MOTIF_ATTENTION={path}" in run_python(EXPORT, tmp_path / "run", tmp_path / "again", path)
    assert not (tmp_path / "again1").exists()
    assert (tmp_path / "again2" / "config.json").is_file()
    assert f'register_attention("{path}")' in (folder / "README.md").read_text()
    loaded = run_python(LOAD, folder, path)
    assert "not imported; if you trust it" in loaded
    assert "GatedSoftmax" in loaded
    with pytest.raises(UserError, match="--with-code: the model's attention is code of your own"):
        export(tmp_path / "run", tmp_path / "portable", with_code=True)


def test_a_patched_qwen3_starts_as_the_same_function_and_trains():
    printed = run_example("patch_qwen3.py")
    assert float(re.findall(r"logits moved by (\S+)", printed)[0]) < 1e-5
    first, *_, last = losses(printed)
    assert last < first
    assert "loaded: PatchedQwen3ForCausalLM" in printed


@pytest.mark.nightly
def test_a_study_of_a_layer_of_your_own_compares_equal_models():
    printed = run_example("head_ratio_study.py")
    sizes = [int(n) for n in re.findall(r"(\d+) parameters", printed)]
    assert len(sizes) == 3
    assert max(sizes) < 1.01 * min(sizes)
    baseline, *others = losses(printed)
    assert all(loss < 3.5 for loss in (baseline, *others))  # 5.5 before training
    for loss, difference in zip(others, re.findall(r"\(([+-][\d.]+), p = [01]\.", printed), strict=True):
        assert loss - baseline == pytest.approx(float(difference), abs=2e-3)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_a_vision_transformer_learns():
    printed = run_example("vision_transformer.py")
    assert "signal_heads=8, noise_heads=2" in printed
    first, *_, last = losses(printed)
    assert last < first / 2


@pytest.mark.slow
def test_a_diffusion_transformer_starts_as_the_same_function_trains_and_loads(tmp_path):
    printed = run_example("dit_block.py", tmp_path)
    assert float(re.findall(r"outputs moved by (\S+)", printed)[0]) < 1e-5
    first, *_, last = losses(printed)
    assert last < first
    assert "loaded: differs by 0.0e+00" in printed


def test_an_exported_model_trains_on_under_trainer(finished_run, tmp_path):
    folder = export(finished_run, tmp_path / "export")
    text = Path(sysconfig.get_path("stdlib")) / "textwrap.py"
    first, *_, last = losses(run_example("continue_with_trainer.py", folder, text, tmp_path / "out"))
    assert last < first
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_folder_laid_out_like_motif_2_6b_trains_on(finished_run, tmp_path):
    exported = export(finished_run, tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    config = SMALL["2.6B"] | {"vocab_size": len(tokenizer)}
    tensors = {name: t if t.ndim < 2 else t / 10 for name, t in random_tensors(config).items()}
    folder = write_folder(tmp_path / "Motif-2.6B", config, tensors, shards=2)
    tokenizer.save_pretrained(folder)
    text = Path(sysconfig.get_path("stdlib")) / "textwrap.py"
    first, *_, last = losses(run_example("continue_with_trainer.py", folder, text, tmp_path / "out"))
    assert last < first
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.slow
def test_an_exported_model_learns_from_conversations(finished_run, tmp_path):
    folder, chats = export(finished_run, tmp_path / "export"), tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    first, *_, last = losses(run_example("sft_trl.py", folder, chats, tmp_path / "out"))
    assert last < first
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


@pytest.mark.slow
def test_an_adapter_of_an_exported_model_learns_and_is_merged(finished_run, tmp_path):
    folder = export(finished_run, tmp_path / "export")
    text = Path(sysconfig.get_path("stdlib")) / "textwrap.py"
    first, *_, last = losses(run_example("lora_peft.py", folder, text, tmp_path / "out"))
    assert last < first
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
