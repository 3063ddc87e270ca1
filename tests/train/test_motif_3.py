"""Training all that Motif-3 has: the parts of its recipe, resuming, saving."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.distributed import train
from helpers.models import random_ids, tiny_config
from helpers.motif_3 import TINY, tiny_motif_3
from helpers.tiny import MOTIF_3, SHORT_RUN, write_recipe
from motifarch.data import Block, collate
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.models.motif import MotifForCausalLM
from motifarch.optim import build_optimizer
from motifarch.parallel import (
    Layout,
    Mesh,
    initialize,
    open_world,
    parallelize,
)
from motifarch.parallel.activation_checkpointing import apply_activation_checkpointing
from motifarch.shards import to_local
from motifarch.train.annealing import Annealing, post_alpha, router_noise, set_expert_losses
from motifarch.train.checkpoint import TrainState
from motifarch.train.init_from import load_weights
from motifarch.train.manifest import checkpoint_name
from motifarch.train.recipe import DataSection, DatasetEntry, ExpertsSection, ModelSection, OptimSection, Recipe
from motifarch.train.recipe_rules import check_recipe
from motifarch.train.run_folder import read_metrics
from motifarch.train.step import StepResult, count_targets, train_step
from motifarch.train.trained_model import load_trained_model

MODEL = ModelSection(**MOTIF_3)


def recipe_of(**sections: Any) -> Recipe:
    return Recipe(**{"model": MODEL, "data": DataSection([DatasetEntry("somewhere")]), **sections})


def tiny(seed: int = 0, **changes: Any) -> MotifForCausalLM:
    torch.manual_seed(seed)
    return MotifForCausalLM(tiny_config("gda", **MOTIF_3 | {"initializer_range": 0.1} | changes)).train()


def biases(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for name, value in model.state_dict().items() if name.endswith("expert_bias")]


def test_noise_and_alpha_end_where_the_recipe_says() -> None:
    recipe = recipe_of(
        experts=ExpertsSection(router_noise=0.4, router_noise_steps=10),
        optim=OptimSection(mhc_post_alpha_steps=4),
        model=replace(MODEL, mhc_h_post_alpha_end=0.2),
    )
    assert [router_noise(recipe, step) for step in (0, 5, 10, 999)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    assert [post_alpha(recipe, step) for step in (0, 1, 4, 999)] == pytest.approx([1.0, 0.8, 0.2, 0.2])
    assert post_alpha(recipe_of(), 0) == 0
    # Without a number of its own the noise takes the whole run.
    recipe = replace(recipe, experts=ExpertsSection(router_noise=0.4))
    assert router_noise(recipe, recipe.run.steps // 2) == pytest.approx(0.2)
    assert router_noise(recipe, recipe.run.steps) == 0


def test_what_is_set_reaches_the_layers() -> None:
    model = tiny()
    recipe = recipe_of(
        experts=ExpertsSection(router_noise=0.5, balance_loss_by_layer={1: 3e-4}),
        optim=OptimSection(mhc_post_alpha_steps=4),
    )
    set_expert_losses(model, recipe, 16)
    Annealing(model, recipe, torch.device("cpu")).set(2)
    first, last = model.model.expert_layers().values()
    assert (first.balance_loss_coeff, last.balance_loss_coeff) == (3e-4, 1e-4)
    assert (first.sequence_length, last.sequence_length) == (16, 16)
    assert (first.magnitude_threshold, last.magnitude_threshold) == (128, 1024)
    assert float(first.router_noise) > 0
    assert {float(layer.mhc_ffn.post_alpha) for layer in model.model.layers} == {0.5}  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": ModelSection(), "experts": ExpertsSection(bias_rate=1e-4)}, r"experts\.bias_rate.*num_experts"),
        ({"experts": ExpertsSection(balance_loss_by_layer={0: 1e-4})}, "names layer 0, which has no experts"),
        ({"experts": ExpertsSection(balance_loss_by_layer={3: 1e-4})}, "names layer 3, which has no experts"),
        ({"experts": ExpertsSection(router_noise_steps=5)}, r"experts\.router_noise is 0"),
        ({"model": ModelSection(), "optim": OptimSection(mtp_loss=0.1)}, r"optim\.mtp_loss.*num_nextn_predict_layers"),
        (
            {"model": ModelSection(), "optim": OptimSection(mhc_post_alpha_steps=5)},
            r"mhc_post_alpha_steps.*mhc_enabled",
        ),
        ({"optim": OptimSection(mtp_loss=0.0)}, r"optim\.mtp_loss is 0"),
        ({"experts": ExpertsSection(balance_loss_by_layer={1: -1.0})}, r"balance_loss_by_layer.*such as \{2"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    check_recipe(recipe_of())
    check_recipe(recipe_of(model=ModelSection()))
    with pytest.raises(UserError, match=message):
        check_recipe(recipe_of(**sections))


def test_first_weights_leave_no_tensor_without_a_value() -> None:
    with torch.device("meta"):
        model = tiny()
    initialize(model, torch.device("cpu"), seed=0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
    assert not any(bias.any() for bias in biases(model))
    with torch.device("meta"):
        model.model.norm.register_buffer("unknown", torch.empty(3))
    with pytest.raises(RuntimeError, match=r"model\.norm\.unknown"):
        initialize(model, torch.device("cpu"), seed=0)


# Both losses weigh something.
EXPERTS = ExpertsSection(balance_loss=0.1, magnitude_loss=0.1, magnitude_threshold=0.01, magnitude_threshold_last=0.01)


def blocks(rows: int, seq_len: int, vocab_size: int = 97) -> list[Block]:
    """Rows of two or three documents, of which some targets are not trained."""
    draw, ids = np.random.default_rng(0), random_ids(rows, seq_len + 1, vocab_size=vocab_size).numpy()
    lengths = [np.diff([0, *sorted({3, int(draw.integers(4, seq_len))}), seq_len + 1]) for _ in range(rows)]
    return [Block(i, n, draw.random(seq_len + 1) < 0.8) for i, n in zip(ids, lengths, strict=True)]


def split(rows: list[Block], micro: int) -> list[list[Block]]:
    """So many in each part, and what is left in the last."""
    return [rows[i : i + micro] for i in range(0, len(rows), micro)]


def steps(model: MotifForCausalLM, micro: int, *options: dict[str, Any]) -> Generator[StepResult]:
    """Steps on the same 8 rows of documents, so many packed into a micro-batch."""
    rows = [collate(part) for part in split(blocks(8, 16), micro)]
    common = {"lr": 1e-3, "clip": None, "expert_bias_rate": 0.01}
    with open_world() as world:
        set_expert_losses(model, recipe_of(experts=EXPERTS), 16)
        sharded = parallelize(model, Mesh("cpu", Layout().resolve(1)))
        state = TrainState(sharded, build_optimizer(sharded, name="adamw", lr=1e-3, eps=1e-4))
        for own in options:
            yield train_step(state, rows, world=world, targets=count_targets(rows), **common | own)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: to_local(value).clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_micro_batches_add_up(micro: int) -> None:
    whole, parts = tiny(), tiny()
    (expected,), (found,) = steps(whole, 8, {}), steps(parts, micro, {})
    assert expected.mtp_loss is not None
    assert expected.expert_loss is not None
    for name in ("loss", "mtp_loss", "expert_loss", "grad_norm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole_state(parts), whole_state(whole), rtol=0, atol=1e-6)
    assert all(bias.any() for bias in biases(whole))
    # What is reported as the loss is the cross-entropy alone.
    batch = collate(blocks(8, 16))
    labels = batch.pop("shift_labels")
    plain = nn.functional.cross_entropy(tiny().eval()(**batch).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found.loss, plain.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_do_not_depend_on_the_rows_of_a_micro_batch() -> None:
    rows = blocks(7, 12, TINY["vocab_size"])
    targets = torch.tensor(count_targets([collate(rows)]))

    def gradients(micro: int, seq_len: int | None) -> dict[str, torch.Tensor]:
        model = tiny_motif_3(num_hidden_layers=3).train()
        for layer in model.model.expert_layers().values():
            layer.balance_loss_coeff, layer.magnitude_loss_coeff, layer.magnitude_threshold = 0.1, 0.1, 0.1
            layer.sequence_length = seq_len
        for part in split(rows, micro):
            model(**collate(part), num_items_in_batch=targets).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    apart = gradients(1, None)  # each row alone
    for micro in (1, 2, 3, 4, 7):
        torch.testing.assert_close(gradients(micro, 12), apart, rtol=0, atol=1e-12)
    together, router = gradients(7, None), "model.layers.1.moe.router.gate.weight"
    assert (together[router] - apart[router]).abs().max() > 1e-4


def test_a_skipped_step_leaves_biases_and_zeroes_counts() -> None:
    model = tiny()
    with torch.no_grad():
        for layer in model.model.expert_layers().values():
            layer.expert_bias.uniform_(-0.01, 0.01)
    before = biases(model)
    taken = steps(model, 4, {"z_loss_weight": float("inf")}, {})
    assert next(taken).skipped == 1
    assert all(map(torch.equal, before, biases(model)))
    assert not any(layer.tokens_per_expert.any() for layer in model.model.expert_layers().values())
    assert next(taken).skipped == 0
    assert not any(map(torch.equal, before, biases(model)))
    taken.close()


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_draws_the_same_noise(recompute: Any) -> None:
    def gradients(recompute: Any) -> dict[str, torch.Tensor]:
        model = tiny()
        apply_activation_checkpointing(model, recompute)
        recipe = recipe_of(experts=ExpertsSection(router_noise=1.0))
        Annealing(model, recipe, torch.device("cpu")).set(0)
        ids = random_ids(2, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, expected = gradients(recompute), gradients("none")
    assert any("mtp_layers" in name for name in expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_moving_value_compiles_nothing_anew() -> None:
    model = tiny()
    for layer in (*model.model.layers, *model.model.mtp_layers):
        layer.compile(backend="eager")
    recipe = recipe_of(experts=ExpertsSection(router_noise=1.0), optim=OptimSection(mhc_post_alpha_steps=100))
    annealing, ids, losses = Annealing(model, recipe, torch.device("cpu")), random_ids(2, 16), []
    torch._dynamo.reset()
    for number in range(4):
        annealing.set(10 * number)
        torch.manual_seed(0)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert len(set(losses)) == 4
    torch._dynamo.reset()


ANNEALED = {"experts": {"router_noise": 0.3, "bias_rate": 0.01, "balance_loss_by_layer": {2: 2.4e-4}}}
OPTIONS = (*SHORT_RUN, "--optim.mhc_post_alpha_steps", "8", "--model.mhc_h_post_alpha_end", "0.2")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """A recipe and the run of 4 steps on two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    recipe = write_recipe(folder, data, model=MOTIF_3, **ANNEALED)
    train(2, folder, recipe, *OPTIONS)
    return recipe, folder / "run"


def weights(run: Path, number: int) -> dict[str, Any]:
    """What a checkpoint holds, whole, by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run / "checkpoints" / checkpoint_name(number), run / f"{number}.pt")
    return torch.load(run / f"{number}.pt")  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--optim.name", "muon", "--activation_checkpointing", "full")])
def test_resume_is_bitwise(two_ranks: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    recipe, whole = two_ranks
    if options:
        whole = tmp_path / "whole"
        train(2, tmp_path, recipe, *OPTIONS, *options, "--run.output", whole)
    half = tmp_path / "half"
    # The noise must not depend on where a run is planned to end.
    noise = ("--experts.router_noise_steps", "4")
    train(2, tmp_path, recipe, *OPTIONS, *noise, *options, "--run.output", half, "--run.steps", "2")
    assert "resuming after step 2" in train(2, tmp_path, recipe, *OPTIONS, *options, "--run.output", half)
    rows = [read_metrics(run / "metrics.jsonl") for run in (half, whole)]
    for name in ("loss", "mtp_loss", "expert_loss", "grad_norm"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    found, expected = weights(half, 4), weights(whole, 4)
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
        if name.endswith("expert_bias"):
            assert value.dtype == torch.float32
            assert value.any()


@pytest.mark.slow
def test_what_is_exported_computes_what_was_trained(two_ranks: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = two_ranks
    trained = load_trained_model(run / "checkpoints" / checkpoint_name(4))
    assert trained.config.mhc_h_post_alpha_end == pytest.approx(0.6)  # half of the way from 1 to 0.2
    folder = export(run, tmp_path / "exported", dtype="bfloat16")
    model = MotifForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.mhc_h_post_alpha_end == pytest.approx(0.6)
    assert [float(layer.mhc_attn.post_alpha) for layer in model.model.layers] == [pytest.approx(0.6)] * 3  # type: ignore[union-attr, arg-type]
    saved = load_file(folder / "model.safetensors")
    names = [name for name in saved if name.endswith("expert_bias")]
    assert len(names) == 2
    for name in names:
        assert torch.equal(saved[name], trained.state_dict()[name])
        assert torch.equal(model.state_dict()[name], saved[name])
    with open_world():  # as first weights of another run
        with torch.device("meta"):
            other = MotifForCausalLM(trained.config)
        initialize(other, torch.device("cpu"), seed=1)
        load_weights(folder, other)
    assert all(map(torch.equal, biases(other), biases(trained)))
