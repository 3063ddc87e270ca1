"""Newton-Schulz, Muon against torch's, which parameters it takes, and steps that are skipped."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers.models import tiny_model
from motifarch.optim import (
    NS_COEFFICIENTS,
    Muon,
    build_adamw,
    build_muon,
    build_optimizer,
    newton_schulz,
    parameter_groups,
    step_if_finite,
)
from motifarch.optim.build import hidden_matrices
from motifarch.optim.newton_schulz import newton_schulz_flops

SHAPES = [(64, 64), (32, 96), (96, 32), (7, 5), (256, 128), (64, 64)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def give_gradients(*models: list[nn.Parameter]) -> None:
    for copies in zip(*models, strict=True):
        gradient = torch.randn_like(copies[0])
        for parameter in copies:
            parameter.grad = gradient.clone()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 50), (2, 2, 30, 12)])
@pytest.mark.parametrize("name", NS_COEFFICIENTS)
def test_singular_values_are_those_of_the_polynomial(shape: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape, dtype=torch.float64)
    kept = given.clone()
    found = newton_schulz(given, NS_COEFFICIENTS[name], dtype=torch.float64)
    assert torch.equal(given, kept)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in NS_COEFFICIENTS[name]:
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(found, left @ torch.diag_embed(values) @ right)
    low, high = (0.95, 1.05) if name == "polar_express" else (0.65, 1.25)
    assert low < values.min() < values.max() < high


def test_newton_schulz_at_the_edges() -> None:
    assert not newton_schulz(torch.zeros(3, 4)).any()
    # A batch's matrices do not know of each other.
    torch.manual_seed(0)
    batch = torch.randn(3, 10, 20) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    each = torch.stack([newton_schulz(m, dtype=torch.float32) for m in batch])
    torch.testing.assert_close(newton_schulz(batch, dtype=torch.float32), each)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        newton_schulz(torch.zeros(3))
    assert newton_schulz_flops(4, 8, 1) == newton_schulz_flops(8, 4, 1) == 2 * (4 * 8 * 4) * 2 + 2 * 4**3


def test_equal_to_torch() -> None:
    """In bfloat16 and to the bit: the same products, batched or not."""
    ours, theirs = matrices(), matrices()
    triple = NS_COEFFICIENTS["keller_jordan"][0]
    muon = Muon(ours, lr=1e-2, weight_decay=0.1, ns_coefficients=NS_COEFFICIENTS["keller_jordan"])
    torchs = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, ns_coefficients=triple, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        give_gradients(ours, theirs)
        muon.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(muon.state[a]["momentum_buffer"], torchs.state[b]["momentum_buffer"])
        # A matrix product of a batch may be summed in another order on other processors: a few of
        # bfloat16's last places (2^-8 of an update of lr * 0.2 * sqrt(rows) a step) over ten steps.
        torch.testing.assert_close(a, b, rtol=0, atol=10 * 1e-2 * 0.2 * 2**-8)


def test_one_step_by_hand() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 9, dtype=torch.float64)
    parameter = nn.Parameter(weight.clone())
    optimizer = Muon([parameter], lr=0.1, lr_ratio=0.5, weight_decay=0.3, momentum=0.9, ns_dtype=torch.float64)
    mean = torch.zeros_like(weight)
    for _ in range(3):
        gradient = torch.randn_like(weight)
        parameter.grad = gradient.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        update = newton_schulz(0.9 * mean + 0.1 * gradient, dtype=torch.float64)
        weight = weight * (1 - 0.05 * 0.3) - 0.05 * 0.2 * 3 * update
        torch.testing.assert_close(parameter.detach(), weight)


@pytest.mark.parametrize("variant", ["gda", "diff_v2 gated", "softmax", "gda tied"])
def test_who_gets_which(variant: str) -> None:
    model = tiny_model(variant)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_muon(model, lr=1e-3, muon_lr_ratio=2.0, decay_embeddings=False)
    muon = {names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    others = {names[id(p)] for g in optimizer.param_groups if not g["muon"] for p in g["params"]}
    assert muon | others == set(names.values())
    assert not muon & others
    endings = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
    assert muon == {n for n in names.values() if n.split(".")[-2] in endings}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= others
    assert len([n for n in others if "lambda" in n]) == {"gda": 8, "gda tied": 8, "diff_v2 gated": 2}.get(variant, 0)
    for group in optimizer.param_groups:
        assert group["lr_ratio"] == (2.0 if group["muon"] else 1.0)
    assert {id(p) for p in hidden_matrices(model)} == {i for i, name in names.items() if name in muon}


def test_the_rest_is_adamw() -> None:
    model = tiny_model()
    twin = copy.deepcopy(model)
    muon = build_muon(model, lr=1e-2, eps=1e-6, betas=(0.8, 0.9))
    adamw = build_adamw(twin, lr=1e-2, eps=1e-6, betas=(0.8, 0.9))
    hidden = {id(p) for p in hidden_matrices(model)}
    for _ in range(3):
        give_gradients(list(model.parameters()), list(twin.parameters()))
        muon.step()
        adamw.step()
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
    assert same == [id(p) not in hidden for p in model.parameters()]


def test_a_skipped_step_changes_nothing() -> None:
    model = tiny_model("diff_v2")
    optimizer = build_muon(model, lr=1e-2)
    parameters = list(model.parameters())
    give_gradients(parameters)
    assert step_if_finite(optimizer, torch.tensor(1.0)).item() == 0

    def everything() -> list[torch.Tensor]:
        return [t.detach().clone() for t in (*parameters, *(v for s in optimizer.state.values() for v in s.values()))]

    before = everything()
    for bad, loss in ((math.nan, 1.0), (math.inf, 1.0), (0.0, math.nan)):
        give_gradients(parameters)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad += bad
        norm = parameters[0].grad.sum()  # type: ignore[union-attr]
        assert step_if_finite(optimizer, torch.tensor(loss), norm).item() == 1
        assert all(map(torch.equal, before, everything()))
    give_gradients(parameters)
    assert step_if_finite(optimizer, torch.tensor(1.0)).item() == 0
    assert not any(map(torch.equal, before, everything()))


def test_state_is_there_from_the_start_and_survives() -> None:
    ours = matrices()
    vector = nn.Parameter(torch.randn(5))
    groups = [{"params": ours}, {"params": [vector], "muon": False, "weight_decay": 0.0}]
    optimizer = Muon(groups, lr=1e-2)
    assert optimizer.state[ours[0]].keys() == {"momentum_buffer"}
    assert optimizer.state[vector].keys() == {"step", "exp_avg", "exp_avg_sq"}
    give_gradients([*ours, vector])
    optimizer.step()
    twins = copy.deepcopy([*ours, vector])
    twin = Muon([{"params": twins[:-1]}, {"params": twins[-1:], "muon": False}], lr=1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients([*ours, vector], twins)
    optimizer.step()
    twin.step()
    assert all(map(torch.equal, [*ours, vector], twins))


def test_parameters_without_gradient_stay() -> None:
    ours = matrices()
    optimizer = Muon(ours, lr=1e-2)
    before = [p.detach().clone() for p in ours]
    ours[1].grad = torch.randn_like(ours[1])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert [torch.equal(a, b) for a, b in zip(before, ours, strict=True)] == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr is -1\.0"),
        ({"lr": torch.tensor(1.0)}, "lr is a tensor"),
        ({"momentum": 1.0}, r"momentum is 1\.0; .*below 1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\)"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0; it must be at least 1"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"ns_coefficients": ((1.0, 2.0),)}, "give a triple"),
    ],
)
def test_impossible_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(matrices(), **options)  # type: ignore[arg-type]


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"shape \(5,\).*muon=False"):
        Muon([nn.Parameter(torch.zeros(5))])


def test_a_recipes_optimizer() -> None:
    model = tiny_model()
    assert isinstance(build_optimizer(model, name="adamw", lr=1e-3), torch.optim.AdamW)
    muon = build_optimizer(
        model, name="muon", lr=1e-3, ns_coefficients="keller_jordan", ns_dtype=torch.float32, muon_chunk_mib=3
    )
    first = muon.param_groups[0]
    assert (first["muon"], first["ns_dtype"], first["chunk_bytes"]) == (True, torch.float32, 3 << 20)
    assert first["ns_coefficients"] == NS_COEFFICIENTS["keller_jordan"]
    decays = {g["weight_decay"] for g in parameter_groups(model, weight_decay=0.1)}
    assert {g["weight_decay"] for g in muon.param_groups} == decays
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        build_optimizer(model, name="sgd", lr=1e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accepted are polar_express, keller_jordan"):
        build_optimizer(model, name="muon", lr=1e-3, ns_coefficients="best")
