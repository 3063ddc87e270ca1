"""Muon on parameters (experts, rows, columns): each expert's matrix by itself."""

import copy
import math

import pytest
import torch
from torch import nn

from motifarch.layers import (
    GroupedDifferentialLatentAttention,
    HyperConnections,
    MixtureOfExperts,
    MultiTokenPrediction,
    PolyNormMLP,
)
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


def latent_attention() -> GroupedDifferentialLatentAttention:
    return GroupedDifferentialLatentAttention(
        8, num_heads=4, ratio=1, head_dim=6, qk_rope_head_dim=2, q_lora_rank=4, kv_lora_rank=4
    )


def stand_in_model() -> nn.Module:
    """Motif-3's layers, under the names that they have in a model."""
    layer = nn.ModuleDict(
        {
            "input_layernorm": nn.RMSNorm(8),
            "self_attn": latent_attention(),
            "mhc_attn": HyperConnections(8, num_streams=2),
            "moe": MixtureOfExperts(8, num_experts=EXPERTS, top_k=2, intermediate_size=6),
        }
    )
    ahead = MultiTokenPrediction(8, attention=latent_attention(), mlp=PolyNormMLP(8, intermediate_size=6))
    layers = {"layers": nn.ModuleList([layer]), "mtp_layers": nn.ModuleList([ahead])}
    decoder = nn.ModuleDict({"embed_tokens": nn.Embedding(11, 8), **layers, "norm": nn.RMSNorm(8)})
    return nn.ModuleDict({"model": decoder, "lm_head": nn.Linear(8, 11, bias=False)})


def test_who_gets_which() -> None:
    model = stand_in_model()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_muon(model, lr=1e-3)
    muon = {names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    assert muon == {names[id(p)] for p in hidden_matrices(model)}
    attention = {f"self_attn.{name}" for name in ("wq_a", "wq_b", "wq_b_gate", "wkv_a", "wkv_b", "wo")}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    first = attention | {f"mhc_attn.proj_{name}" for name in ("pre", "post", "res")} | {"moe.router.gate"}
    first |= {f"moe.shared_experts.{name}" for name in mlp}
    ahead = attention | {f"mlp.{name}" for name in mlp} | {"input_proj"}
    expected = {f"model.layers.0.{name}.weight" for name in first}
    expected |= {f"model.mtp_layers.0.{name}.weight" for name in ahead}
    assert muon == expected | {f"model.layers.0.moe.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    # Decayed are these, and the matrices that AdamW has.
    groups = parameter_groups(model, weight_decay=0.1)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    lambdas = {name for name in names.values() if "lambda_proj" in name}
    assert decayed == muon | lambdas | {"model.embed_tokens.weight", "lm_head.weight"}


def test_experts_learn_with_it() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(8, num_experts=EXPERTS, top_k=2, intermediate_size=6)
    optimizer = Muon([layer.experts.gate_up_proj, layer.experts.down_proj], 0.02, weight_decay=0.0)
    given, wanted = torch.randn(4, 16, 8), torch.randn(4, 16, 8)
    losses = []
    for _ in range(30):
        loss = (layer(given).hidden_states - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(experts, rows, columns\).*muon=False"):
        Muon([nn.Parameter(torch.zeros(shape))])
