"""What many launches or a whole compiled model show; without a GPU a few, tiny and interpreted."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import kernel_cases
from helpers.interpreter import require_interpreter
from helpers.models import random_ids, tiny_config
from helpers.numerics import assert_error_rule
from motif_kernels.impl.gluon import availability
from motifarch.models.motif import MotifForCausalLM

pytest.importorskip("triton", reason="the Triton kernels need triton")

# Under compute-sanitizer one run is enough.
RUNS = {"cuda": int(os.environ.get("MOTIF_GPU_RUNS", "1000")), "cpu": 2}
ROWS = {"cuda": 1024 if RUNS["cuda"] > 1 else 150, "cpu": 20}
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ONE_PASS = kernel_cases.FAMILIES["one-pass attention"]  # adds up with atomics, in any order
PAIRED = [case.removesuffix(" in one pass") for case in ONE_PASS]


@pytest.fixture(autouse=True)
def without_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """With MOTIF_GPU_GLUON=0 the Triton kernels serve what Gluon's would."""
    if os.environ.get("MOTIF_GPU_GLUON") == "0":
        monkeypatch.setattr(availability, "can_serve", lambda inputs: False)


def bits(x: Tensor) -> Tensor:
    """As bytes: 0 and -0 differ, and NaN is like itself."""
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [case for case in kernel_cases.CASES if case not in ONE_PASS])
def test_the_same_bits_in_every_run(case: str, place: str) -> None:
    """Output and every gradient of every deterministic path."""
    if place == "cpu":
        require_interpreter()
    call = kernel_cases.make(case, torch.device(place), ROWS[place])
    first = {name: bits(t.clone()) for name, t in call().items()}
    differing = {name: torch.zeros((), dtype=torch.int64, device=place) for name in first}
    for _ in range(RUNS[place] - 1):
        for name, t in call().items():
            differing[name] += (bits(t) != first[name]).any()  # stays on the GPU: it runs ahead, as in training
    assert {name: int(count) for name, count in differing.items()} == dict.fromkeys(first, 0)


@pytest.mark.parametrize(
    ("case", "place"), [("DIFF V1", "cpu"), *(pytest.param(c, "cuda", marks=pytest.mark.gpu) for c in PAIRED)]
)
def test_the_one_pass_backward_repeats_up_to_rounding(case: str, place: str) -> None:
    if place == "cpu":
        require_interpreter()
    device, rows = torch.device(place), ROWS[place]
    call = kernel_cases.make(f"{case} in one pass", device, rows)
    first = call()
    for _ in range(RUNS[place] // 20 + 1):
        for name, t in call().items():
            tolerance = 2 * torch.finfo(t.dtype).eps * first[name].abs().max().item()
            torch.testing.assert_close(t, first[name], atol=tolerance, rtol=4 * torch.finfo(t.dtype).eps)


def loss_and_gradients(model: MotifForCausalLM, ids: Tensor, backend: str | None = None) -> dict[str, Tensor]:
    """Of a training step, compiled or not."""
    torch._dynamo.reset()
    function: Any = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    loss = function(input_ids=ids, labels=ids).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@pytest.mark.parametrize(
    ("place", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_a_compiled_model_is_as_near_to_float64_as_an_eager_one(place: str, backend: str) -> None:
    """GDA 4:1 with PolyNorm in bf16, in one graph: the loss and the gradient of every parameter."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = MotifForCausalLM(tiny_config("gda 4:1", num_key_value_heads=4, **sizes)).to(place, torch.bfloat16).train()
    ids = random_ids(2, 200).to(place)
    eager, compiled = loss_and_gradients(model, ids), loss_and_gradients(model, ids, backend)
    double = MotifForCausalLM(tiny_config("gda 4:1", num_key_value_heads=4, attn_implementation="eager", **sizes))
    double.load_state_dict(model.state_dict())
    exact = loss_and_gradients(double.to(place, torch.float64).train(), ids)
    eps = torch.finfo(torch.bfloat16).eps
    for name, e in exact.items():
        # The gradient of a scale or a lambda is a sum of thousands of rounded numbers, which
        # cancel: its error is luck.
        floor = (8 if e.ndim < 2 else 1) * eps * e.abs().max().item()
        assert e.abs().max() > 0
        assert_error_rule(compiled[name], eager[name], e, floor=floor)
