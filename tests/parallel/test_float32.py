"""What stays float32 in a run that computes in bfloat16."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.models import random_ids
from helpers.tiny import MOTIF_3
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel import Layout, Mesh, open_world, parallelize
from motifarch.parallel.float32 import float32_modules
from motifarch.shards import to_local

# By the names of their parameters, apart from the code's types.
FLOAT32 = ("norm", "mhc_", "router", "lambda_proj", "act_fn")


def build() -> MotifForCausalLM:
    torch.manual_seed(0)
    model = MotifForCausalLM(MotifConfig(vocab_size=97, **MOTIF_3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # no norm is 1, which bfloat16 has
    return model.train()


def gradients(model: MotifForCausalLM) -> dict[str, torch.Tensor]:
    ids = random_ids(2, 16)
    for _ in range(2):  # two micro-batches
        model(input_ids=ids, shift_labels=ids).loss.backward()
    return {n: to_local(p.grad).float() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_sharded_step_is_that_of_a_model_with_these_weights_in_float32(recompute: Any) -> None:
    plain = build()
    for name, parameter in plain.named_parameters():
        if not any(part in name for part in FLOAT32):
            parameter.data = parameter.data.bfloat16()
    expected = {}
    ids = random_ids(2, 16)
    for _ in range(2):
        plain.zero_grad()
        plain(input_ids=ids, shift_labels=ids).loss.backward()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, 0) + parameter.grad.float()
    with open_world():
        options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "activation_checkpointing": recompute}
        found = gradients(parallelize(build(), Mesh("cpu", Layout().resolve(1)), **options))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_router_decides_by_its_float32_weight() -> None:
    model = build()
    weights = [layer.moe.router.gate.weight.detach().clone() for layer in model.model.layers if layer.moe]
    assert not torch.equal(weights[0], weights[0].bfloat16().float())
    seen: list[tuple[torch.Tensor, ...]] = []

    def look(gate: torch.nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        seen.append((inputs[0].detach(), gate.weight.detach().clone(), logits.detach()))

    with open_world():
        parallelize(model, Mesh("cpu", Layout().resolve(1)), compute_dtype=torch.bfloat16)
        for layer in model.model.layers:
            if layer.moe:
                layer.moe.router.gate.register_forward_hook(look)
        ids = random_ids(2, 16)
        model(input_ids=ids, shift_labels=ids).loss.backward()
    assert len(seen) == len(weights)
    for (hidden_states, used, logits), weight in zip(seen, weights, strict=True):
        assert hidden_states.dtype == torch.bfloat16
        assert torch.equal(used, weight)
        assert torch.equal(logits, F.linear(hidden_states.float(), weight))


def test_those_modules_are_found() -> None:
    layer = build().model.layers[1]
    found = {id(p) for module in float32_modules(layer) for p in module.parameters()}
    names = {name for name, p in layer.named_parameters() if id(p) in found}
    assert names == {name for name, _ in layer.named_parameters() if any(part in name for part in FLOAT32)}


def test_dense_models_are_gathered_as_ever() -> None:
    dense = {"num_experts": None, "mhc_enabled": False, "num_nextn_predict_layers": 0, "polynorm_bias_clamp": None}
    model = MotifForCausalLM(MotifConfig(vocab_size=97, **(MOTIF_3 | dense)))
    with open_world():
        parallelize(model, Mesh("cpu", Layout().resolve(1)), compute_dtype=torch.bfloat16)
        dtypes: set[torch.dtype] = set()
        norm = model.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda module, *_: dtypes.add(module.weight.dtype))
        model(input_ids=random_ids(1, 8))
    assert dtypes == {torch.bfloat16}
