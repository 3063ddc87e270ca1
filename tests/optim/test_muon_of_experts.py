"""Muon on parameters (experts, rows, columns): each expert's matrix by itself."""

import copy
import math

import pytest
import torch
from torch import nn

from motifarch.optim import Muon, build_muon, offload_state, parameter_groups, step_if_finite
from motifarch.optim.build import hidden_matrices

EXPERTS = 5
SHAPES = [(EXPERTS, 24, 10), (EXPERTS, 10, 12), (1, 3, 20), (EXPERTS, 24, 10)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def give_gradients(given: list[nn.Parameter]) -> None:
    for parameter in given:
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 24 * 10 * 4, 1 << 20])
def test_equal_to_a_loop_over_experts(chunk_bytes: int) -> None:
    stacks = parameters()
    loop = [[nn.Parameter(matrix.clone()) for matrix in stack.detach()] for stack in stacks]
    together = Muon(stacks, 1e-2, ns_dtype=torch.float32, chunk_bytes=chunk_bytes)
    alone = Muon([m for matrices in loop for m in matrices], 1e-2, ns_dtype=torch.float32)
    for _ in range(5):
        give_gradients(stacks)
        for stack, matrices in zip(stacks, loop, strict=True):
            assert stack.grad is not None
            for matrix, gradient in zip(matrices, stack.grad, strict=True):
                matrix.grad = gradient.clone()
        together.step()
        alone.step()
    for stack, matrices, start in zip(stacks, loop, parameters(), strict=True):
        assert (stack - start).abs().max() > 1e-2
        torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in matrices]), rtol=0, atol=1e-6)
        momenta = torch.stack([alone.state[m]["momentum_buffer"] for m in matrices])
        torch.testing.assert_close(together.state[stack]["momentum_buffer"], momenta, rtol=0, atol=1e-6)


def test_a_skipped_step_changes_nothing() -> None:
    stacks = parameters()
    optimizer = Muon(stacks, 1e-2)
    give_gradients(stacks)
    optimizer.step()
    kept = [t.detach().clone() for p in stacks for t in (p, optimizer.state[p]["momentum_buffer"])]
    for bad in (math.nan, math.inf):
        stacks[1].grad.fill_(bad)  # type: ignore[union-attr]
        assert step_if_finite(optimizer, torch.tensor(bad)).item() == 1
        assert all(map(torch.equal, kept, (t for p in stacks for t in (p, optimizer.state[p]["momentum_buffer"]))))


def test_a_checkpoint_goes_on_bitwise() -> None:
    stacks = parameters()
    optimizer = Muon(stacks, 1e-2)
    give_gradients(stacks)
    optimizer.step()
    twins = copy.deepcopy(stacks)
    twin = Muon(twins, 1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients(stacks)
    for stack, other in zip(stacks, twins, strict=True):
        other.grad = stack.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    twin.step()
    assert all(map(torch.equal, stacks, twins))


def test_moments_in_cpu_memory_come_in_pieces_and_change_nothing() -> None:
    runs = []
    for offloaded in (False, True):
        stacks = parameters()
        optimizer = Muon(stacks, 1e-2)
        calls: list[int] = []
        inner = optimizer.step
        optimizer.step = lambda inner=inner, calls=calls: (calls.append(1), inner())  # type: ignore[method-assign, misc]
        if offloaded:
            offload_state(optimizer, piece_bytes=1)
        torch.manual_seed(1)
        for _ in range(2):
            give_gradients(stacks)
            optimizer.step()
        assert len(calls) == 2 * (len(stacks) if offloaded else 1)
        runs.append(stacks)
    assert all(map(torch.equal, *runs))


class Layer(nn.Module):
    """The names and numbers of dimensions that a layer with experts and hyper-connections has."""

    def __init__(self, hidden: int = 8, streams: int = 2) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden)
        self.self_attn = nn.ModuleDict(
            {"wq_b": nn.Linear(hidden, 6, bias=False), "lambda_proj": nn.Linear(hidden, 2, bias=False)}
        )
        experts = nn.Module()
        experts.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 6, hidden))
        experts.down_proj = nn.Parameter(torch.randn(EXPERTS, hidden, 3))
        experts.act_fn = nn.Module()
        experts.act_fn.weight = nn.Parameter(torch.ones(EXPERTS, 3))
        experts.act_fn.bias = nn.Parameter(torch.ones(EXPERTS, 1))
        gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.moe = nn.ModuleDict({"router": nn.ModuleDict({"gate": gate}), "experts": experts})
        self.mhc_ffn = nn.ModuleDict(
            {"proj_res": nn.Linear(streams * hidden, streams**2, bias=False), "rms_norm": nn.RMSNorm(streams * hidden)}
        )
        self.mhc_ffn.bias_res = nn.Parameter(torch.ones(streams, streams))
        self.mhc_ffn.alpha_res = nn.Parameter(torch.ones(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(11, 8)
        self.model.layers = nn.ModuleList([Layer()])
        self.model.mtp_layers = nn.ModuleList([nn.ModuleDict({"input_proj": nn.Linear(16, 8, bias=False)})])
        self.lm_head = nn.Linear(8, 11, bias=False)


def test_who_gets_which() -> None:
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_muon(model, lr=1e-3)
    muon = [names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]]
    assert len(muon) == len(hidden_matrices(model))
    assert {name.removeprefix("model.") for name in muon} == {
        "layers.0.self_attn.wq_b.weight",
        "layers.0.moe.router.gate.weight",
        "layers.0.moe.experts.gate_up_proj",
        "layers.0.moe.experts.down_proj",
        "layers.0.mhc_ffn.proj_res.weight",
        "mtp_layers.0.input_proj.weight",
    }
    undecayed = {
        names[id(p)].split("layers.0.")[-1]
        for group in parameter_groups(model, weight_decay=0.1)
        for p in group["params"]
        if group["weight_decay"] == 0
    }
    assert undecayed == {
        "input_layernorm.weight",
        "moe.experts.act_fn.weight",
        "moe.experts.act_fn.bias",
        "mhc_ffn.rms_norm.weight",
        "mhc_ffn.bias_res",
        "mhc_ffn.alpha_res",
    }


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(experts, rows, columns\).*muon=False"):
        Muon([nn.Parameter(torch.zeros(shape))])
