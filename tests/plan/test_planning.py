"""Plans as users make them: the command, its errors, its suggestions and its files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.planned import SEQ_LEN, config_of, small_recipe
from helpers.tiny import prepare_text
from motifarch.commands.plan import main
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
from motifarch.plan import GPUS, find_gpu, make_plan
from motifarch.plan.report import plain, render
from motifarch.plan.suggestions import changed, find_faster, find_suggestions

LARGE: dict[str, Any] = {
    "run": {"steps": 1000},
    "model": {
        "vocab_size": 219520,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_noise_heads": 8,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "data": {"datasets": [{"path": "data/elsewhere"}]},
    "batch": {"size": 768, "micro_size": 1},
    "optim": {"name": "muon"},
    "parallel": {"replicate": 96, "shard": 8},
    "activation_checkpointing": "selective",
}
SMALL = LARGE | {
    "model": LARGE["model"] | {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "batch": {"size": 32, "micro_size": 2},
    "parallel": {},
}


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_motif_2_12_7b_on_768_b200(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(write(tmp_path, LARGE)), "--gpus", "768", "--gpu", "b200", "--seq-len", "4096"]
    assert main([*command, "--tokens", "5.5e12", "--output", str(tmp_path / "plan")]) == 0
    printed = capsys.readouterr().out
    assert "12,703,860,896 parameters" in printed
    assert (tmp_path / "plan" / "plan.txt").read_text().splitlines()[0] == printed.splitlines()[0]
    assert (tmp_path / "plan" / "plan.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert found["parameter_count"] == 12_703_860_896
    ranks = {"replicate": 96, "shard": 8, "context": 1, "tensor": 1}
    assert {name: found["layout"][name] for name in ranks} == ranks
    most = found["memory"]["most_bytes"]
    assert most["parameters"] == pytest.approx(12_703_860_896 * 4 / 8, rel=1e-4)
    assert most["gradients"] == most["parameters"]
    assert sum(found["memory"]["at_peak_bytes"].values()) == found["memory"]["peak_bytes"] < 180e9
    # Six FLOPs a weight that multiplies, and attention on top.
    weights = 12_703_860_896 - 219_520 * 4096
    flops = found["flops_per_token"]
    assert 6 * weights < flops["forward"] + flops["backward"] < 1.15 * 6 * weights
    assert 0.1 < found["model_flops_utilisation"] < 0.7
    seconds = found["time_seconds"]
    assert seconds["step"] == pytest.approx(sum(v for name, v in seconds.items() if name != "step"))
    assert found["days"] == pytest.approx(5.5e12 / (768 * 4096) * seconds["step"] / 86400)
    assert found["gpu_hours"] == pytest.approx(found["days"] * 24 * 768)


@pytest.mark.parametrize(
    "fields", [{"parallel__shard": 8}, {"parallel__replicate": 2, "parallel__shard": 2, "parallel__tensor": 2}]
)
def test_ranks_together_hold_every_parameter_once(fields: dict[str, Any]) -> None:
    recipe = small_recipe(**fields)
    plans = [make_plan(recipe, find_gpu("h100"), 8, seq_len=SEQ_LEN, rank=rank).trace for rank in range(8)]
    vectors = 0
    if "parallel__tensor" in fields:  # what all heads share lies on both ranks of tensor parallelism
        vectors = plans[0].parameter_count - sum(_matrices(recipe))
    copies = plans[0].layout.replicate
    assert sum(p.parameters for p in plans) == 4 * copies * (plans[0].parameter_count + vectors)


def _matrices(recipe: Any) -> list[int]:
    return [p.numel() for p in MotifForCausalLM(config_of(recipe)).parameters() if p.ndim == 2]


def test_advice_fits_when_it_is_planned() -> None:
    recipe = small_recipe(batch__micro_size=4, model__num_hidden_layers=4)
    roomy = make_plan(recipe, find_gpu("h100"), 4, seq_len=512)
    gpu = dataclasses.replace(GPUS["h100"], memory=0.8 * roomy.peak)

    def replan(other: Any) -> Any:
        return make_plan(other, gpu, 4, seq_len=512)

    plan = replan(recipe)
    assert not plan.fits
    suggestions = find_suggestions(plan, replan)
    assert suggestions[-1].fits
    assert not any(a.fits for a in suggestions[:-1])
    taken = replan(changed(recipe, suggestions[-1].changes))
    assert taken.fits
    assert taken.peak == suggestions[-1].peak


def test_free_memory_buys_speed() -> None:
    recipe = small_recipe(activation_checkpointing="full", model__num_hidden_layers=4)
    gpu = GPUS["h100"]

    def replan(other: Any) -> Any:
        return make_plan(other, gpu, 2, seq_len=SEQ_LEN)

    plan = replan(recipe)
    faster = find_faster(plan, replan)
    assert faster is not None
    taken = replan(changed(recipe, faster.changes))
    assert taken.fits
    assert taken.peak == faster.peak > plan.peak
    assert taken.tokens_per_second == faster.tokens_per_second > plan.tokens_per_second
    plan.faster = faster
    assert f"--{next(iter(faster.changes))}" in plain(render(plan, "it"))
    crowded = dataclasses.replace(plan, gpu=dataclasses.replace(gpu, memory=1.2 * plan.peak))
    assert find_faster(crowded, replan) is None


def test_no_change_is_tried_that_cannot_help() -> None:
    """Weights that do not fit do not by recomputing more."""
    recipe = small_recipe()
    plan = make_plan(recipe, dataclasses.replace(GPUS["h100"], memory=1000.0), 2, seq_len=SEQ_LEN)
    tried = find_suggestions(plan, lambda other: make_plan(other, plan.gpu, 2, seq_len=SEQ_LEN), attempts=2)
    assert not any("activation_checkpointing" in suggestion.changes for suggestion in tried)


def test_advice_gives_up_where_nothing_helps() -> None:
    recipe = small_recipe()
    gpu = dataclasses.replace(GPUS["h100"], memory=1000.0)
    plan = make_plan(recipe, gpu, 2, seq_len=SEQ_LEN)
    suggestions = find_suggestions(plan, lambda other: make_plan(other, gpu, 2, seq_len=SEQ_LEN), attempts=2)
    assert len(suggestions) == 2
    assert not any(a.fits for a in suggestions)


def test_more_time_for_less_hardware() -> None:
    recipe = small_recipe()
    fast = make_plan(recipe, find_gpu("b200"), 2, seq_len=SEQ_LEN)
    slow = make_plan(recipe, find_gpu("h100"), 2, seq_len=SEQ_LEN)
    assert fast.time.total < slow.time.total
    compiled = make_plan(dataclasses.replace(recipe, compile=True), find_gpu("h100"), 2, seq_len=SEQ_LEN)
    assert compiled.time.elementwise < slow.time.elementwise
    assert compiled.time.matrices == slow.time.matrices


def test_stages_are_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path, SMALL)
    second = tmp_path / "{second}<b>[red]PICTURE$_$.yaml"
    second.write_text("base: recipe.yaml\n")
    output = tmp_path / "plan"
    options = ["--gpus", "2", "--gpu", "b200", "--tokens", "1e9,2e9", "--output", str(output)]
    assert main([str(first), str(second), "--seq-len", "64,128", *options]) == 0
    printed = capsys.readouterr().out
    assert "Kolibri" in printed
    assert "as reported" in printed
    found = json.loads((output / "plan.json").read_text())
    assert [stage["seq_len"] for stage in found["stages"]] == [64, 128]
    assert found["together"]["tokens"] == 3e9
    assert found["together"]["days"] == pytest.approx(sum(stage["days"] for stage in found["stages"]))
    page = (output / "plan.html").read_text()
    assert "data:image/png;base64," in page
    assert "{second}&lt;b&gt;[red]PICTURE$_$ on 2 x B200" in page
    with pytest.raises(UserError, match="--seq-len has 3 values for 2 recipes; give one for each"):
        main([str(first), str(second), "--seq-len", "64,128,256", *options])
    bad = tmp_path / "bad.yaml"
    bad.write_text("base: recipe.yaml\nbatch: {size: 33}\n")
    with pytest.raises(UserError, match=r"bad\.yaml: batch\.size is 33"):
        main([str(first), str(bad), "--gpus", "2", "--gpu", "b200", "--seq-len", "64"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--gpu", "b300"], "--gpu is 'b300'; accepted are h100, h200, b200, gb200"),
        (["--gpus", "0", "--gpu", "b200"], "--gpus is '0'; accepted: a whole number from 1"),
        (["--gpu", "b200"], "--gpus"),
        (["--gpus", "8", "--gpu", "b200", "--parallel.tensor", "3"], "parallel.tensor 3: the product is 3"),
        (["--gpus", "8", "--gpu", "b200", "--parallel.shard", "4"], "which is not the number of ranks, 8"),
        (["--gpus", "8", "--gpu", "b200", "--parallel.context", "8", "--seq-len", "100"], "does not divide sequences"),
        (["--gpus", "8", "--gpu", "b200", "--seq-len", "40000"], "model.max_position_embeddings is 32768"),
        (["--gpus", "8", "--gpu", "b200", "--seq-len", "0"], "--seq-len is '0'"),
        (["--gpus", "8", "--gpu", "b200", "--overlap", "2"], "--overlap is '2'; accepted: a number from 0 to 1"),
        (["--gpus", "8", "--gpu", "b200", "--optim.lrr", "1"], "did you mean 'optim.lr'"),
        (["--gpus", "8", "--gpu", "b200", "--batch.size", "33"], "batch.size is 33"),
    ],
)
def test_refusals_name_the_fix(tmp_path: Path, arguments: list[str], message: str) -> None:
    given = arguments if "--seq-len" in arguments else [*arguments, "--seq-len", "64"]
    with pytest.raises(UserError) as refused:
        main([str(write(tmp_path, SMALL)), *given])
    assert message in str(refused.value)


def test_what_needs_a_gpu_is_planned_without_one() -> None:
    wide = make_plan(small_recipe(), find_gpu("h100"), 2, seq_len=SEQ_LEN)
    narrow = make_plan(small_recipe(precision__matmul="fp8"), find_gpu("h100"), 2, seq_len=SEQ_LEN)
    assert narrow.peak == wide.peak
    assert "precision.matmul is fp8" in plain(render(narrow, "x"))
    assert "precision.matmul" not in plain(render(wide, "x"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_offloaded_moments_are_elsewhere(name: str) -> None:
    kept = make_plan(small_recipe(optim__name=name), find_gpu("h100"), 2, seq_len=SEQ_LEN)
    gone = make_plan(small_recipe(optim__name=name, optim__offload=True), find_gpu("h100"), 2, seq_len=SEQ_LEN)
    assert kept.trace.offloaded == 0
    assert gone.trace.offloaded + gone.trace.optimizer == kept.trace.optimizer
    assert gone.trace.optimizer < 1000  # counts of steps
    assert gone.trace.gradients == kept.trace.gradients
    assert gone.flops_per_token == kept.flops_per_token
    assert gone.time.optimizer > kept.time.optimizer


def test_the_data_says_how_long_sequences_are(tmp_path: Path) -> None:
    small = write(tmp_path, SMALL)
    with pytest.raises(UserError, match="is not prepared here; give --seq-len"):
        main([str(small), "--gpus", "8", "--gpu", "b200"])
    prepared = prepare_text(tmp_path)
    arguments = ["--gpus", "8", "--gpu", "b200", "--data.datasets", f"[{{path: {prepared}}}]"]
    assert main([str(small), *arguments, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["seq_len"] == 32
    assert found["tokens"] == 1000 * 32 * 32
    with pytest.raises(UserError, match="how large is the vocabulary"):
        main([str(small), "--gpus", "8", "--gpu", "b200", "--seq-len", "64", "--model.vocab_size", "null"])


def test_a_process_group_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="destroy_process_group"):
            make_plan(small_recipe(), find_gpu("h100"), 2, seq_len=SEQ_LEN)
    finally:
        torch.distributed.destroy_process_group()
