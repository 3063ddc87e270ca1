"""What a training step of Motif-3 allocates, at its proportions: many small experts, long rows.

A router has a number for each token and expert by its definition: logits, and scores made of them.
Nothing else may be of that many: no mask of choices, no slot of an expert for each token, nothing
with a width beside them. Nor may anything have a number for each two tokens of a row.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from helpers.memory import largest_allocation, live_bytes, mark
from motifarch.data import Block, collate
from motifarch.layers import mixture_of_experts
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.optim import build_optimizer

MODEL = {
    "attention_type": "gdla",
    "attention_gate": True,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,  # one sees all tokens and is dense, one has a window and experts
    "num_attention_heads": 5,
    "num_noise_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "use_sliding_window": True,
    "sliding_window": 32,
    "sliding_window_period": 4,
    "experts_top_k": 8,
    "moe_intermediate_size": 8,
    "n_dense_first_layers": 1,
    "route_scale": 2.0,
    "polynorm_sigmoid_weight": True,
    "polynorm_output_scale": 0.5,
    "polynorm_bias_clamp": 0.5,
    "hidden_clamp": 1e6,
    "mhc_enabled": True,
    "num_nextn_predict_layers": 1,
}


def training_step(experts: int, tokens: int) -> Callable[[], None]:
    """Forward, backward and update on a row of two documents, as the recipe packs it; the first
    such step, which makes what stays, is over.
    """
    torch.manual_seed(0)
    model = MotifForCausalLM(MotifConfig(**MODEL, num_experts=experts, max_position_embeddings=tokens)).train()
    for layer in model.model.expert_layers().values():
        layer.balance_loss_coeff, layer.magnitude_loss_coeff, layer.router_noise = 1e-4, 2e-4, 0.1
    optimizer = build_optimizer(model, name="muon", lr=1e-3, ns_dtype=torch.float32)
    ids = np.random.default_rng(0).integers(64, size=tokens + 1, dtype=np.int32)
    batch = collate([Block(ids, np.array([tokens // 8, tokens + 1 - tokens // 8], dtype=np.int32))])

    def step() -> None:
        loss = model(**batch, z_loss_weight=1e-4).loss
        mark("forward")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def scores() -> dict[str, float]:
    """How many float32 tensors (tokens, experts) a step allocates in all ("allocated"), keeps for
    its backward pass ("forward"), and has at most ("peak"): what bytes grow by with more of both,
    beyond what they grow by with more of either.
    """
    (few, half), (many, whole) = (
        [live_bytes(training_step(experts, tokens)) for tokens in (256, 512)] for experts in (64, 192)
    )
    each = 4 * (192 - 64) * (512 - 256)
    return {name: (whole[name] - half[name] - many[name] + few[name]) / each for name in whole}


def test_only_scores_grow_with_experts_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forward: logits, noise, their sum, scores, what is preferred, the entropy's terms. Backward:
    # gradients of what reads the scores and sums of these, and that of the logits.
    found = scores()
    assert found["allocated"] == pytest.approx(11, abs=0.1)
    assert found["forward"] == pytest.approx(1, abs=0.1)
    assert found["peak"] == pytest.approx(1, abs=0.1)

    # The measure itself: one that is kept, and one that is not.
    entropy, kept = mixture_of_experts.entropy_of_shares, []
    monkeypatch.setattr(mixture_of_experts, "entropy_of_shares", lambda t: kept.append(t.clone()) or entropy(t.clone()))
    more = scores()
    assert more["allocated"] == pytest.approx(11 + 2, abs=0.1)
    assert more["forward"] == pytest.approx(1 + 1, abs=0.1)


def test_nothing_is_larger_than_the_scores() -> None:
    experts, tokens = 384, 2048
    largest = largest_allocation(training_step(experts, tokens))
    assert largest <= 4 * experts * tokens
    assert largest < tokens * tokens  # a byte for each pair of tokens would be a mask
