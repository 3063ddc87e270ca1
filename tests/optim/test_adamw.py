"""Which parameters are decayed, and that AdamW is AdamW."""

import torch
from torch import nn

from helpers.sharded_training import build_model
from motifarch.optim import build_adamw, parameter_groups


def test_only_matrices_are_decayed() -> None:
    model = build_model()
    decayed, plain = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    plain_names = {names[id(p)] for p in plain["params"]}
    assert decayed_names | plain_names == set(names.values())
    assert not decayed_names & plain_names
    assert "model.embed_tokens.weight" in decayed_names
    assert {n for n in names.values() if n.endswith("proj.weight")} <= decayed_names
    for ending in ("norm.weight", "lambda_q1", "subln.weight", "act_fn.weight", "act_fn.bias"):
        found = {n for n in names.values() if n.endswith(ending)}
        assert found, ending
        assert found <= plain_names


def test_embeddings_can_be_left_out() -> None:
    model = build_model()
    _, plain = parameter_groups(model, weight_decay=0.1, decay_embeddings=False)
    assert any(p is model.lm_head.weight for p in plain["params"])  # tied
    assert not any(p is model.model.layers[0].mlp.up_proj.weight for p in plain["params"])


def test_no_empty_group_and_no_frozen_parameter() -> None:
    linear = nn.Linear(3, 3, bias=False)
    assert len(parameter_groups(linear, weight_decay=0.1)) == 1
    linear.weight.requires_grad_(False)
    assert parameter_groups(linear, weight_decay=0.1) == []


def test_one_step_by_hand() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3).double()
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    optimizer = build_adamw(linear, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    linear(torch.randn(5, 4).double()).square().sum().backward()
    # After one step both corrected moments are the gradient's own, so the update is lr * g /
    # (|g| + eps).
    moved = {name: p.grad / (p.grad.abs() + 1e-8) for name, p in linear.named_parameters() if p.grad is not None}
    optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1 * moved["weight"])
    torch.testing.assert_close(linear.bias.detach(), bias - 0.1 * moved["bias"])
