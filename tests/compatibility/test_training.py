"""Training that recomputes activations, and training that is compiled."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.compatibility import build, cells
from helpers.host_models import token_ids

IDS = token_ids(2, 12)


def gradients(model: Any, call: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    (model if call is None else call)(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@cells("gda")
def test_gradient_checkpointing(name: str) -> None:
    model = build(name).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model)
    assert len(calls) == 2  # forward, and again in backward
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which inductor compiles with; none is installed")
@cells()
def test_compiled_training(name: str) -> None:
    """By inductor, whole."""
    torch._dynamo.reset()
    model = build(name, num_hidden_layers=1).train()
    expected = gradients(model)
    found = gradients(model, torch.compile(model, fullgraph=True))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)
