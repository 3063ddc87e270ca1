"""Independent models are not called copies; copies are found, whatever they are hidden by: their
order, scales, signs, a rotation, other training, a merge, another model around them.

How often in hundreds is measured by benchmarks/verify/similarity.py; some of it is done here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from benchmarks.verify import spectra
from benchmarks.verify.disguises import disguised, same_function
from benchmarks.verify.similarity import (
    DISGUISES,
    FILE,
    KINDS,
    LAYOUTS,
    REPLACED,
    Zoo,
    batch,
    in_disguise,
    main,
    new_model,
    text,
    train,
)
from helpers.tiny import MOTIF_3, SHORT_RUN, prepare_text, write_recipe
from motifarch.cli import run as command_line
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.train.main import main as train_run
from motifarch.verify.similarity.compare import Comparer, Comparison
from motifarch.verify.similarity.parts import Model

STEPS = 20
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Models trained from independent seeds on one text."""
    return Zoo(tmp_path_factory.mktemp("models"), STEPS, floor_steps=100)


def save(state: State, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / FILE)
    return folder


def compare(one: Path, two: Path) -> Comparison:
    return Comparer(Model(one)).compare(Model(two))


def verify(*arguments: object) -> int:
    return command_line(["verify", *map(str, arguments)])


def llama(seed: int, steps: int = STEPS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=256, **sizes, **heads, initializer_range=0.05)
    model = LlamaForCausalLM(config)
    list(train(model, text("code"), steps, seed))
    return model.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_independent_models_give_no_alarm(zoo: Zoo, layout: str) -> None:
    assert not compare(zoo.trained(layout, 0), zoo.trained(layout, 1)).alarms


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize(("layout", "kind"), [("gda", "fine-tuned"), *(("softmax", kind) for kind in KINDS[:4])])
def test_what_was_made_of_a_model_is_found(zoo: Zoo, layout: str, kind: str, disguise: str, tmp_path: Path) -> None:
    state = zoo.derived(kind, layout, 0, variant=int(kind == KINDS[3]), models=2)
    tokens = batch(zoo.code, torch.Generator().manual_seed(0), 2)
    state = in_disguise(state, layout, disguise, 1, tokens, zoo.trained(layout, 3))
    (part,) = compare(save(state, tmp_path), zoo.trained(layout, 0)).alarms
    assert part.part == "model.layers"
    # Without embeddings heads may lie as they did, which shows as much.
    assert disguise in ("", REPLACED) or part.how == disguise.split()[0]


def test_one_layer_of_another_model_is_found(zoo: Zoo, tmp_path: Path) -> None:
    own, other = (load_file(zoo.trained("gda", seed) / FILE) for seed in (0, 1))
    taken = {name.replace("layers.1", "layers.0"): value for name, value in other.items() if "layers.1." in name}
    (part,) = compare(save(own | taken, tmp_path), zoo.trained("gda", 1)).alarms
    assert [(match.layer, match.other) for match in part.layers if match.score > 0.99] == [(0, 1)]


def test_embeddings_alone_are_found(zoo: Zoo, tmp_path: Path) -> None:
    own, other = (load_file(zoo.trained("softmax", seed) / FILE) for seed in (0, 1))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    name = "model.embed_tokens.weight"
    (part,) = compare(save(own | {name: other[name][:, order]}, tmp_path), zoo.trained("softmax", 1)).alarms
    assert part.reason == "its embeddings"


@pytest.mark.parametrize("change", ["shards", "bfloat16"])
def test_other_architectures_are_compared_in_any_folder(change: str, tmp_path: Path) -> None:
    model, other = llama(0), llama(1)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    hidden = disguised(model.state_dict(), model.config, seed=0)
    assert same_function(model, hidden, batch(text("code"), torch.Generator().manual_seed(0), 2)) < 1e-4
    model.load_state_dict(hidden)
    if change == "shards":
        model.save_pretrained(tmp_path / "copy", max_shard_size="100KB")
        assert not (tmp_path / "copy" / FILE).exists()
    else:
        model.bfloat16().save_pretrained(tmp_path / "copy")
    assert compare(tmp_path / "copy", tmp_path / "model").alarms
    assert not compare(tmp_path / "other", tmp_path / "model").alarms
    assert not compare(tmp_path / "copy", tmp_path / "other").alarms


def clip(seed: int, width: int = 32) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8))


def with_encoder(language: State, vision: State) -> State:
    """A vision language model's weights: an encoder, a projector, a language model."""
    names = {f"vision_tower.{name}": value for name, value in vision.items()}
    names["multi_modal_projector.linear_1.weight"] = torch.randn(64, 32)
    return names | {f"language_model.{name}": value for name, value in language.items()}


def test_an_encoder_from_outside_is_named(zoo: Zoo, tmp_path: Path) -> None:
    clip(0).save_pretrained(tmp_path / "clip")
    clip(1).save_pretrained(tmp_path / "other_clip")
    language = load_file(zoo.trained("gda", 0) / FILE)
    model = save(with_encoder(language, load_file(tmp_path / "clip" / FILE)), tmp_path / "model")
    (part,) = compare(model, tmp_path / "clip").alarms
    assert part.part.startswith("vision_tower")
    assert not compare(model, tmp_path / "other_clip").alarms
    (part,) = compare(model, zoo.trained("gda", 0)).alarms
    assert part.part == "language_model.model.layers"


def test_what_cannot_be_compared_is_said(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(0, width=40).save_pretrained(tmp_path / "clip")
    assert verify(zoo.trained("gda", 0), "--against", tmp_path / "clip") == 0
    assert "width 40" in capsys.readouterr().out
    save({"norm.weight": torch.ones(8)}, tmp_path / "nothing")
    assert verify(zoo.trained("gda", 0), "--against", tmp_path / "nothing") == 0
    with pytest.raises(UserError, match="nowhere"):
        compare(zoo.trained("gda", 0), tmp_path / "nowhere")


def test_a_narrower_model_that_was_cut_out_of_another_is_found(zoo: Zoo, tmp_path: Path) -> None:
    whole, keep = load_file(zoo.trained("softmax", 0) / FILE), torch.arange(0, 64, 2)
    cut = {}
    for name, value in whole.items():
        for axis, size in enumerate(value.shape):
            residual = size == 64 and (
                value.dim() == 1 or axis == (0 if "o_proj" in name or "down_proj" in name else 1)
            )
            value = value.index_select(axis, keep) if residual else value
        cut[name] = value
    save(cut, tmp_path)
    assert compare(tmp_path, zoo.trained("softmax", 0)).alarms
    assert compare(zoo.trained("softmax", 0), tmp_path).alarms
    assert not compare(tmp_path, zoo.trained("softmax", 1)).alarms


def tokenizer(tokens: list[int], folder: Path) -> None:
    """A tokenizer whose vocabulary has one token for each row of an embedding."""
    Tokenizer(models.BPE({f"<{token}>": row for row, token in enumerate(tokens)}, [])).save(
        str(folder / "tokenizer.json")
    )


@pytest.mark.parametrize("others", [0, 100])
def test_rows_of_embeddings_are_matched_by_their_tokens(zoo: Zoo, others: int, tmp_path: Path) -> None:
    state = load_file(zoo.trained("softmax", 0) / FILE)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name][order], 0.1 * torch.randn(others, 64)])
    config = new_model("softmax", 0).config
    copy = save(disguised(state, config, seed=0), tmp_path / "copy")
    tokenizer([*order.tolist(), *range(1000, 1000 + others)], copy)
    original = save(load_file(zoo.trained("softmax", 0) / FILE), tmp_path / "original")
    tokenizer(list(range(256)), original)
    found = compare(copy, original)
    assert found.alarms[0].anchor == pytest.approx(1, abs=0.05)
    assert found.tokenizer is not None
    assert found.tokenizer.shared == 256


def test_the_command_reports_on_folders_and_runs(zoo: Zoo, tmp_path: Path) -> None:
    model, report = zoo.trained("gda", 0), tmp_path / "report.md"
    arguments = ["--against", zoo.trained("gda", 1), "--against", zoo.trained("gda", 0), "--report", report]
    assert verify(model, *arguments) == 1
    content = json.loads(report.with_suffix(".json").read_text())
    assert [one["alarm"] for one in content["similarity"]] == [False, True]
    assert [check["verdict"] for check in content["checks"]] == ["holds", "fails"]
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "model.layers" in report.read_text()


def test_a_run_is_compared_beside_its_links(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, prepare_text(tmp_path))
    assert train_run([str(recipe), *SHORT_RUN]) == 0
    run = tmp_path / "run"
    checkpoint = max((run / "checkpoints").iterdir())
    assert verify(run, "--against", run, "--report", tmp_path / "report.md") == 1
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert len(checks) > 1
    assert [check["verdict"] for check in checks].count("fails") == 1
    assert verify(checkpoint, "--against", run) == 1


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "Motif-3": lambda: MotifForCausalLM(MotifConfig(vocab_size=256, **MOTIF_3)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, vocab_size=300, num_local_experts=4)),
    "ViT": lambda: ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_from_two_seeds_are_alike_in_nothing(name: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        ARCHITECTURES[name]().save_pretrained(tmp_path / str(seed))
    assert not compare(tmp_path / "0", tmp_path / "1").alarms
    same = compare(tmp_path / "0", tmp_path / "0").nearest
    assert [(part.part, part.how, round(part.score, 3)) for part in same] == [
        (part.other, "as they lie", 1.0) for part in same
    ]


@pytest.mark.nightly
def test_the_measurement_goes_on_and_ends(tmp_path: Path) -> None:
    sizes = {"models": 6, "bases": 4, "steps": STEPS, "floor-steps": 100, "pairs": 8, "copies": 10, "long": 2}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    for _ in range(2):
        assert main(["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.json"), *options]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert all(row["alarms"] == (0 if row["kind"] == "independent" else row["compared"]) for row in rows)

    sizes = {name: value for name, value in sizes.items() if name not in ("copies", "long")}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    assert spectra.main(["--work", str(tmp_path / "work"), "--output", str(tmp_path / "spectra.json"), *options]) == 0
    independent, *copies = json.loads((tmp_path / "spectra.json").read_text())["rows"]
    assert max(independent["likeness"]) < 0.9
    # No disguise changes them: a copy's are the same, to rounding.
    assert all(min(row["likeness"]) > 0.99 for row in copies if row["kind"] == "copy")
