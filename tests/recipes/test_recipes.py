"""Every recipe fits its GPUs and its published model, and a shrunken copy trains."""

import re
from pathlib import Path

import pytest
import torch

from helpers.distributed import torchrun
from motifarch.commands.generate import main as generate
from motifarch.data import BatchSchedule, DataShape
from motifarch.export import export
from motifarch.models.motif import MotifForCausalLM
from motifarch.train.annealing import post_alpha
from motifarch.train.inputs import model_config
from motifarch.train.learning_rate import learning_rates
from motifarch.train.main import main
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import Recipe
from motifarch.train.recipe_rules import check_recipe
from motifarch.train.run_folder import read_metrics

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name not in ("launch", "study", "trainer"))
SFT = [path for path in FILES if path.parent.name == "sft"]
LARGE = [path for path in FILES if path.parent.name.startswith("motif_") and path.stem not in ("base", "tiny_cpu")]
MOTIF_3 = 314_841_775_750 - 51 * 384  # biases of experts are buffers here, and counted among the published
PUBLISHED = {"motif_2.6b": 2_597_218_432, "motif_2_12.7b": 12_703_860_896, "motif_3": MOTIF_3}
BUDGET = {"motif_2.6b": 2.4e12, "motif_2_12.7b": 5.5e12}
NODE = 8
WHOLE = [path for path in LARGE if path != RECIPES / "motif_3" / "h100_8.yaml"]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def gpus(path: Path) -> int:
    """The number in a file's name, as in b200_768; 8 where there is none, processes on a CPU."""
    found = re.match(r"(?:b200|h100)_(\d+)", path.stem)
    return int(found[1]) if found else 2 if "cpu" in path.stem else NODE


def seq_len(path: Path) -> int:
    found = re.search(r"long_(\d+)k", path.stem)
    return 1024 * int(found[1]) if found else 512 if "cpu" in path.stem else 4096


def schedule(recipe: Recipe) -> BatchSchedule:
    batch = recipe.batch
    multiple = batch.warmup_multiple or 1
    return BatchSchedule(batch.size, start=batch.warmup_start, warmup_steps=batch.warmup_steps, multiple=multiple)


def parameters(recipe: Recipe) -> int:
    config = model_config(recipe, DataShape(32, recipe.model.vocab_size or 32768, 0, "nowhere"))
    with torch.device("meta"):
        model = MotifForCausalLM(config)
    return sum(p.numel() for p in model.parameters())


def test_all_recipes_are_here() -> None:
    assert {name(path) for path in FILES} >= {
        f"{model}/{cluster}" for model in PUBLISHED for cluster in ("base", "b200_64", "b200_256", "b200_768", "h100_8")
    }


@pytest.mark.parametrize("path", FILES, ids=name)
def test_it_holds_on_its_gpus(path: Path) -> None:
    recipe, count = read_recipe([str(path)]), gpus(path)
    check_recipe(recipe, count)
    layout = recipe.parallel.resolve(count)
    sizes = schedule(recipe)
    # No rank is without rows, and no micro-batch is larger than what is left for a rank.
    for step in (0, recipe.batch.warmup_steps // 2, recipe.run.steps - 1):
        assert sizes.batch_size(step) % layout.data_parallel_size == 0
        assert sizes.batch_size(step) // layout.data_parallel_size >= recipe.batch.micro_size
    if path in LARGE:
        # A copy of the parameters fills a node, so that gathering them stays on NVLink; one of
        # Motif-3 takes 8 nodes or more, and its tokens go to experts within one.
        nodes = layout.shard * layout.context // NODE if path.parent.name == "motif_3" and count > NODE else 1
        assert nodes == 1 or nodes >= 8
        assert layout.shard * layout.context * layout.tensor == nodes * NODE
        assert layout.replicate * nodes * NODE == count
        assert layout.expert == (NODE if path.parent.name == "motif_3" else 1)
    assert recipe.model.max_position_embeddings >= seq_len(path)


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_its_model_has_the_published_size(path: Path) -> None:
    assert parameters(read_recipe([str(path)])) == PUBLISHED[path.parent.name]


@pytest.mark.parametrize("gpus", [64, 256, 768])
def test_the_stages_of_motif_3_go_on_where_the_last_ended(gpus: int) -> None:
    paths = [RECIPES / "motif_3" / f"b200_{gpus}{stage}.yaml" for stage in ("", "_long_32k", "_long_256k")]
    stages = [read_recipe([str(path)]) for path in paths]
    tokens = [r.run.steps * r.batch.size * seq_len(path) for r, path in zip(stages, paths, strict=True)]
    assert sum(tokens) == pytest.approx(12.5e12, rel=1e-3)
    for before, after, path in zip(stages, stages[1:], paths[1:], strict=False):
        last = before.run.steps - 1
        assert learning_rates(after)(after.optim.warmup_steps) == pytest.approx(learning_rates(before)(last), rel=1e-3)
        assert post_alpha(after, 0) == post_alpha(before, before.run.steps)
        assert f"--run.init_from {before.run.output}/checkpoints/step_{before.run.steps:08}" in path.read_text()
        assert after.batch.size * seq_len(path) == before.batch.size * before.model.max_position_embeddings
    assert learning_rates(stages[-1])(stages[-1].run.steps - 1) == pytest.approx(3e-5)


@pytest.mark.parametrize("path", [p for p in LARGE if "long" not in p.stem and p.parent.name in BUDGET], ids=name)
def test_its_steps_are_the_published_tokens(path: Path) -> None:
    recipe = read_recipe([str(path)])
    tokens = schedule(recipe).samples_before(recipe.run.steps) * seq_len(path)
    assert tokens == pytest.approx(BUDGET[path.parent.name], rel=1e-3)
    if path.parent.name == "motif_2.6b":
        per_step = recipe.batch.size * seq_len(path)
        assert (recipe.run.steps - (recipe.optim.decay_steps or 0)) * per_step == pytest.approx(2e12, rel=1e-3)
        assert recipe.average.every * per_step == pytest.approx(8e9, rel=0.01)
        assert recipe.average.every == recipe.average.last * recipe.checkpoint.every


def test_the_ablation_compares_equals() -> None:
    sizes = {path.stem: parameters(read_recipe([str(path)])) for path in FILES if path.parent.name == "ablation_300m"}
    assert len(sizes) >= 3
    assert all(size == pytest.approx(3e8, rel=0.02) for size in sizes.values()), sizes
    assert max(sizes.values()) < 1.01 * min(sizes.values())


def shrunken(path: Path, data: Path, output: Path) -> list[str]:
    """Overrides that make a recipe two steps of a tiny model on one process."""
    recipe = read_recipe([str(path)])
    model, batch = recipe.model, recipe.batch
    end = ", weight_end: 0.5" if recipe.data.ramp_end else ""
    fields: dict[str, object] = {
        "run.output": output,
        "run.steps": 2,
        "model.vocab_size": "null",
        "model.hidden_size": model.hidden_size // 64,
        "model.intermediate_size": model.intermediate_size // 64,
        "model.num_hidden_layers": 2,
        "model.head_dim": 8,
        "data.datasets": f"[{{path: {data}, weight: 1.0{end}}}, {{path: {data}, weight: 0.5}}]",
        "data.ramp_end": 2 if recipe.data.ramp_end else 0,
        "batch.size": 4,
        "batch.micro_size": 2,
        "batch.warmup_start": 2 if batch.warmup_start else "null",
        "batch.warmup_steps": 1 if batch.warmup_start else 0,
        "batch.warmup_multiple": 2 if batch.warmup_multiple else "null",
        "optim.warmup_steps": 1,
        "optim.decay_steps": 1,
        "precision.compute": "float32",
        "precision.matmul": "compute",
        "parallel.replicate": 1,
        "parallel.shard": -1,
        "parallel.context": 1,
        "parallel.tensor": 1,
        "compile": "false",
        "checkpoint.every": 1,
        "average.every": 1 if recipe.average.every else 0,
        "validation.every": 2,
        "validation.sequences": 4,
        "log.every": 1,
        "log.tensorboard": "false",
    }
    if model.num_experts:
        fields |= {
            "model.num_attention_heads": 10,
            "model.num_noise_heads": 2,
            "model.num_key_value_heads": 2,
            "model.head_dim": 12,
            "model.qk_rope_head_dim": 4,
            "model.v_head_dim": 8,
            "model.q_lora_rank": 16,
            "model.kv_lora_rank": 16,
            "model.num_experts": 8,
            "model.moe_intermediate_size": 16,
            "model.n_dense_first_layers": 1,
            "optim.mhc_post_alpha_steps": 1 if recipe.optim.mhc_post_alpha_steps else 0,
            "experts.balance_loss_by_layer": "{}",
            "parallel.expert": 1,
        }
        if not recipe.optim.decay_steps:
            fields["optim.decay_steps"] = 0
    return [str(path), *(f"--{field}={value}" for field, value in fields.items())]


SHRUNKEN = [p for p in FILES if p.stem not in ("base", "b200_256", "tiny_cpu") and p not in SFT]
# On other numbers of GPUs they say nothing but their base's name.
SHRUNKEN = [p for p in SHRUNKEN if not re.match(r"motif_3/b200_(256|768)", name(p))]


@pytest.mark.parametrize("path", SHRUNKEN, ids=name)
def test_two_steps_of_a_shrunken_copy(
    path: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(shrunken(path, data, tmp_path / "run")) == 0
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0 < second["validation_loss"] < 10
    assert first["skipped"] == second["skipped"] == 0
    assert second["loss"] != first["loss"]
    averaged = "the mean of the checkpoints of steps 1" in capfd.readouterr().out
    assert averaged == bool(read_recipe([str(path)]).average.every)


@pytest.mark.slow
def test_the_small_motif_3_trains_on_two_processes_and_writes(data: Path, tmp_path: Path) -> None:
    """A few steps of the recipe as it is, on little text; then export and a sample."""
    short = ("--run.steps", 6, "--optim.warmup_steps", 1, "--optim.decay_steps", 2, "--log.every", 3)
    output = tmp_path / "run"
    options = (*short, "--run.output", output, "--data.datasets", f"[{{path: {data}}}]", "--validation.sequences", 4)
    done = torchrun(2, "-m", "motifarch.train", RECIPES / "motif_3" / "tiny_cpu.yaml", *options)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(output / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(loss > 0 for row in rows for loss in (row["mtp_loss"], row["expert_loss"]))
    reported = [row["step"] for row in rows if "router_load_max_mean" in row]
    assert reported == [3, 6]
    assert rows[-1]["router_load_max_mean"][0] is None
    assert all(1 <= value <= 4 for value in rows[-1]["router_load_max_mean"][1:])
    assert (output / "router.png").is_file()
    folder = export(output)
    assert generate([str(folder), "--prompt", "alpha", "--max-new-tokens", "5"]) == 0
