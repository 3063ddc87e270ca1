"""Compiled decoder layers compute the same, also where lengths and layers differ."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.distributed import on_ranks
from helpers.layouts import Case, train_cases
from helpers.models import random_ids, tiny_model
from helpers.tiny import MOTIF_3
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel import Layout
from motifarch.parallel.activation_checkpointing import apply_activation_checkpointing
from motifarch.parallel.compilation import apply_compile


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Leaves torch.compile's settings and what it has compiled as they were."""
    config = torch._dynamo.config
    names = ("specialize_float", "recompile_limit", "accumulated_recompile_limit")
    kept = {n: getattr(config, n) for n in (*names, "skip_fwd_side_effects_in_bwd_under_checkpoint")}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, **kept):
        yield
    torch._dynamo.reset()


def losses_and_gradients(lengths: tuple[int, ...], change: Callable[[nn.Module], None], **overrides: Any) -> Any:
    """The losses of rows of some lengths, the sum of their gradients, the last lambdas."""
    model = tiny_model("gda", **overrides).train()
    change(model)
    losses = []
    for length in lengths:
        ids = random_ids(1, length)
        loss = model(input_ids=ids, labels=ids).loss
        if torch.is_grad_enabled():
            loss.backward()
        losses.append(loss.detach())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses), gradients, model.last_lambdas()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which inductor compiles with; none is installed")
@torch.no_grad()
def test_inductor_gives_each_layer_its_own_numbers() -> None:
    # Layers that differ in lambda_init, and a second length that makes lengths variable.
    lengths = (64, 32)
    expected = losses_and_gradients(lengths, lambda _: None)
    found = losses_and_gradients(lengths, apply_compile)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiles to what was traced, forward and backward, without code; notes each time."""
    times: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        times.append(len(times))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", lambda self: _compile_with(backend, self))
    return times


def _compile_with(backend: Any, module: nn.Module) -> None:
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_what_is_computed_again_is_compiled_too(traced: list[int], recompute: Any) -> None:
    def change(model: nn.Module) -> None:
        apply_activation_checkpointing(model, recompute)
        apply_compile(model)

    expected = losses_and_gradients((16,), lambda _: None)
    found = losses_and_gradients((16,), change)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(traced) == 2  # each layer once, for each has its lambda_init


def test_training_compiled_and_sharded_is_training(traced: list[int], data: Path, tmp_path: Path) -> None:
    cases = [Case(str(on), "gda", Layout(), steps=3, options={"compile": on}) for on in (False, True)]
    train_cases(data, tmp_path / "trained.pt", cases)
    trained = torch.load(tmp_path / "trained.pt")
    torch.testing.assert_close(trained["True"], trained["False"], rtol=1e-5, atol=1e-5)
    assert len(traced) >= 4  # two layers, with and without gradients


@pytest.mark.nightly
def test_ranks_that_share_experts_train_compiled(data: Path, tmp_path: Path) -> None:
    model = MOTIF_3 | {"qk_norm": False, "num_hidden_layers": 2}
    cases = [
        Case(
            str(on),
            "gda",
            Layout(expert=2),
            steps=2,
            model=model,
            options={"compile": on, "activation_checkpointing": "full"},
        )
        for on in (False, True)
    ]
    on_ranks(2, _train_traced, data, tmp_path / "trained.pt", cases)
    trained = torch.load(tmp_path / "trained.pt")
    torch.testing.assert_close(trained["True"], trained["False"], rtol=1e-5, atol=1e-5)


def _train_traced(data: Path, output: Path, cases: list[Case]) -> None:
    """Trains on a rank, where compiling gives no code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self: _compile_with("aot_eager", self))
        train_cases(data, output, cases)


def test_more_layers_than_torch_compiles_by_default(traced: list[int]) -> None:
    layers = torch._dynamo.config.recompile_limit + 2
    with torch.no_grad():
        losses_and_gradients((8,), apply_compile, num_hidden_layers=layers)
    assert len(traced) >= layers


def motif_3_layer_step(recompute: Any, *, compiled: bool) -> Any:
    """A layer with experts that is computed again when its router has become another one: output,
    losses and gradients, and what was counted.
    """
    torch.manual_seed(0)
    model = MotifForCausalLM(MotifConfig(vocab_size=97, initializer_range=0.1, **MOTIF_3)).train()
    apply_activation_checkpointing(model, recompute)
    layer = model.model.layers[1]
    layer.moe.balance_loss_coeff = layer.moe.magnitude_loss_coeff = 0.1
    streams = torch.randn(2, 16, model.config.mhc_expansion_rate, model.config.hidden_size, requires_grad=True)
    table = model.model.rotary_embs[layer.layer_type](torch.arange(16)[None], torch.float32)
    if compiled:
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        layer.compile(fullgraph=True, backend="aot_eager")
    outputs = layer(streams, table)
    with torch.no_grad():
        layer.moe.router.gate.weight.data.neg_()
    sum(o.square().sum() for o in outputs).backward()
    return outputs, streams.grad, {n: p.grad for n, p in layer.named_parameters()}, dict(layer.moe.named_buffers())


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_layer_with_experts_is_one_graph_counts_once_and_sends_no_token_elsewhere(recompute: Any) -> None:
    expected = motif_3_layer_step(recompute, compiled=False)
    torch.testing.assert_close(motif_3_layer_step(recompute, compiled=True), expected, rtol=1e-5, atol=1e-5)
    assert expected[-1]["tokens_per_expert"].sum() == 2 * 16 * MOTIF_3["experts_top_k"]
