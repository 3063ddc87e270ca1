"""Adapters: what peft computes and trains, resumed, exported and shared by ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.fine_tuning import fine_tune
from helpers.tiny import write_recipe
from motifarch.checkpoint_reader import CheckpointReader
from motifarch.data import BatchSchedule, Mixture, MixtureComponent, PackedDataset, collate
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.models.motif import MotifForCausalLM
from motifarch.train.lora import init_adapters
from motifarch.train.main import main
from motifarch.train.manifest import find_newest
from motifarch.weight_files import WeightFiles

LORA = ("--lora.rank", "4", "--lora.alpha", "8", "--optim.lr", "1e-2", "--optim.weight_decay", "0")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles(folder)
    return {name: files.read(name) for name in files.names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, chats: Path, base: Path, data: Path) -> tuple[Path, Any]:
    """The output of a LoRA run on two ranks, never interrupted, and its metrics."""
    folder = tmp_path_factory.mktemp("lora")
    return folder / "run", fine_tune(2, write_recipe(folder, data), folder / "run", chats, base, *LORA)


@pytest.mark.slow
def test_it_trains_as_peft_does(whole: tuple[Path, Any], chats: Path, base: Path) -> None:
    # peft's own model and torch's AdamW, one process, a row at a time.
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(MotifForCausalLM.from_pretrained(base), config)
    init_adapters(model.base_model.model, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    mixture = Mixture([MixtureComponent(PackedDataset.open(chats))], seed=0, batch_schedule=BatchSchedule(8))
    for step, row in enumerate(whole[1]):
        batches = [collate([mixture.components[0].dataset[i]]) for _, i in mixture.global_batch(step)]
        targets = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
        outputs = [model(**batch, num_items_in_batch=targets, z_loss_weight=1e-4) for batch in batches]
        loss = torch.stack([out.loss for out in outputs]).sum()
        loss.backward()
        z_loss = sum(float(out.z_loss) for out in outputs)
        assert loss.item() - z_loss == pytest.approx(row["loss"], abs=2e-4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_only_adapters_are_trained_and_have_moments(whole: tuple[Path, Any], base: Path) -> None:
    checkpoint = find_newest(whole[0])
    assert checkpoint is not None
    names = CheckpointReader(checkpoint).tensors
    moments = [name for name in names if name.startswith("optimizer.") and name.endswith("exp_avg")]
    assert moments
    assert all(".lora_A." in name or ".lora_B." in name for name in moments)
    before, after = tensors(base), tensors(export(whole[0]))
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name.split(".")[-2] in TARGETS), name
    assert whole[1][-1]["validation_loss"] < whole[1][0]["loss"]


@pytest.mark.slow
def test_the_two_exports_are_one_model(whole: tuple[Path, Any], base: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(export(whole[0]))
    folder = export(whole[0], adapter=True)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(1, 41).view(1, -1)
    with torch.no_grad():
        before, ours = plain(input_ids=ids).logits, merged(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, folder)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 1e-3


@pytest.mark.slow
def test_it_resumes_bitwise_with_dropout_and_recomputation(chats: Path, base: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, data)
    options = (*LORA, "--lora.dropout", "0.2", "--activation_checkpointing", "full")
    kept = fine_tune(2, recipe, tmp_path / "a" / "run", chats, base, *options)
    fine_tune(2, recipe, tmp_path / "b" / "run", chats, base, *options, "--run.steps", "4")
    resumed = fine_tune(2, recipe, tmp_path / "b" / "run", chats, base, *options)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in kept]
    stored = fine_tune(2, recipe, tmp_path / "c" / "run", chats, base, *options, "--activation_checkpointing", "none")
    assert [row["grad_norm"] for row in stored] == pytest.approx([row["grad_norm"] for row in kept], rel=1e-4)
    changed = ["--run.output", str(tmp_path / "a" / "run"), "--run.steps", "9", "--lora.rank", "2"]
    with pytest.raises(UserError, match="the recipe's lora section"):
        main([str(recipe), *changed, "--data.datasets", f"[{{path: {chats}}}]", "--run.init_from", str(base)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, {}), (2, {"context": 2}), (4, {"replicate": 2, "shard": 2})], ids=str
)
def test_layouts_are_equal(
    whole: tuple[Path, Any], chats: Path, base: Path, data: Path, tmp_path: Path, ranks: int, layout: dict[str, int]
) -> None:
    options = [text for name, value in layout.items() for text in (f"--parallel.{name}", value)]
    rows = fine_tune(ranks, write_recipe(tmp_path, data), tmp_path / "run", chats, base, *LORA, *options)
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in whole[1]], abs=1e-4), name
    assert [row["targets"] for row in rows] == [row["targets"] for row in whole[1]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--run.init_from", "null"], "run.init_from is empty"),
        (["--parallel.tensor", "2"], "parallel.tensor is 2"),
        (["--precision.matmul", "fp8"], "precision.matmul is fp8"),
        (["--optim.qk_clip", "100"], "optim.qk_clip is 100"),
        (["--lora.targets", "[]"], "lora.targets is empty"),
        (["--lora.targets", "[c_attn]"], "lora.targets names c_attn, but the model's linear layers are down_proj"),
    ],
)
def test_what_does_not_go_together(recipe: Path, options: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        main([str(recipe), "--lora.rank", "4", "--run.init_from", "a_model", *options])


@pytest.mark.slow
def test_a_run_without_adapters_exports_none(finished_run: Path) -> None:
    with pytest.raises(UserError, match="holds no adapters"):
        export(finished_run, adapter=True)


@pytest.mark.slow
def test_adapters_are_merged_before_they_are_gone_on_from(whole: tuple[Path, Any], recipe: Path) -> None:
    checkpoint = find_newest(whole[0])
    with pytest.raises(UserError, match="a checkpoint with adapters"):
        main([str(recipe), "--run.init_from", str(checkpoint)])
