"""What the backward pass recomputes: the same gradients, as many products as asked."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.kept import kept_and_peak
from helpers.models import random_ids, tiny_model
from helpers.tiny import MOTIF_3
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel.activation_checkpointing import apply_activation_checkpointing

LAYERS = 4
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
# q, k, v, o, gate and up, and for gated DIFF V2 lambda and its gate; down_proj comes last: nobody
# needs its result.
LINEARS = {"gda": 6, "diff_v2 gated": 8}
ATTENTION = ("motif::blocked_attention", "aten::_scaled_dot_product_flash_attention_for_cpu")


class Count(TorchDispatchMode):
    """Counts the operators that really run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def of(self, names: tuple[str, ...]) -> int:
        return sum(self.ran[name] for name in names)


def gradients_and_backward(variant: str, recompute: Any) -> tuple[dict[str, torch.Tensor], Count]:
    """A training step's gradients, and what its backward pass ran."""
    model: MotifForCausalLM = tiny_model(variant, num_hidden_layers=LAYERS).train()
    apply_activation_checkpointing(model, recompute)
    ids = random_ids(2, 16)
    loss = model(input_ids=ids, labels=ids).loss
    with Count() as count:
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, count


@pytest.mark.parametrize("variant", LINEARS)
def test_gradients_stay_and_recomputation_is_what_was_asked_for(variant: str) -> None:
    expected, plain = gradients_and_backward(variant, "none")
    assert plain.of(PRODUCTS) >= 2 * LINEARS[variant] * LAYERS
    assert plain.of(ATTENTION) == 0
    for recompute, layers in {"full": LAYERS, "selective": 0, 2: LAYERS // 2, 3: 2, 1: LAYERS}.items():
        gradients, count = gradients_and_backward(variant, recompute)
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
        again = count.of(PRODUCTS) - plain.of(PRODUCTS)
        attended = count.of(ATTENTION)
        assert again == LINEARS[variant] * layers, recompute
        assert (attended > 0) == (layers > 0), recompute
        # Norms, rotations and sums are computed again in any case.
        assert count.ran["aten::add"] + count.ran["aten::_fused_rms_norm"] > (
            plain.ran["aten::add"] + plain.ran["aten::_fused_rms_norm"]
        ), recompute


@pytest.mark.parametrize("recompute", ["some", 0, -1])
def test_what_is_no_choice_is_refused(recompute: Any) -> None:
    with pytest.raises(UserError, match=f"activation_checkpointing is {recompute!r}; accepted are none, full"):
        apply_activation_checkpointing(tiny_model("gda"), recompute)


def motif_3(recompute: Any, **changes: Any) -> MotifForCausalLM:
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": 97, "initializer_range": 0.1, **MOTIF_3, **changes}
    model = MotifForCausalLM(MotifConfig(**config)).train()
    apply_activation_checkpointing(model, recompute)
    return model


def motif_3_step(recompute: Any, *, perturb: float = 0.0) -> tuple[MotifForCausalLM, list[torch.Tensor], Any]:
    """A step with noise on routers' logits: the model with gradients, and each router's choices and
    weights. In the recomputation logits are perturbed.
    """
    model = motif_3(recompute)
    choices, weights = [], []

    def disturb(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        again = torch._C._current_graph_task_id() != -1
        return logits + perturb * torch.linspace(-1, 1, logits.shape[-1]) if again and perturb else logits

    def note(_: Any, __: Any, routing: Any) -> None:
        choices.append(routing.selected)
        weights.append(routing.weights.detach())

    for layer in model.model.expert_layers().values():
        layer.router_noise = 0.5
        layer.router.gate.register_forward_hook(disturb)
        layer.router.register_forward_hook(note)
    torch.manual_seed(1)
    ids = random_ids(2, 16)
    model(input_ids=ids, shift_labels=ids).loss.backward()
    return model, choices, weights


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_gradients_of_experts_and_streams_stay(recompute: Any) -> None:
    expected, found = motif_3_step("none")[0], motif_3_step(recompute)[0]
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    # Counted once.
    for a, b in zip(found.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b)
    for layer in found.model.expert_layers().values():
        assert layer.tokens_per_expert.sum() == 2 * 16 * layer.top_k
        assert layer.statistic_sums[0] == 2 * 16


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_no_token_is_sent_elsewhere_by_scores_that_come_out_otherwise(recompute: Any) -> None:
    _, choices, weights = motif_3_step(recompute, perturb=100.0)
    layers = len(choices) // 2
    assert layers == 2
    for i in range(layers):  # the last layer is repeated first
        assert torch.equal(choices[i], choices[-1 - i])
        assert not torch.equal(weights[i], weights[-1 - i])


def kept_by_experts_layer(recompute: Any, size: int, tokens: int) -> tuple[int, int, int]:
    """Bytes that a layer with experts and four streams keeps, and the most that there are in its
    backward pass; those of all its products and of attention.
    """
    float32 = ("norm", "mhc_", "router", "lambda_proj", "act_fn")
    model = motif_3(recompute, hidden_size=size, mhc_expansion_rate=4, moe_intermediate_size=64)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in float32):
            parameter.data = parameter.data.bfloat16()
    layer, config = model.model.layers[1], model.config
    products = []
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, out: products.append(out.nbytes))
    streams = torch.randn(1, tokens, 4, size).bfloat16().requires_grad_()
    table = model.model.rotary_embs[layer.layer_type](torch.arange(tokens)[None], torch.bfloat16)
    known = [streams, *table, *model.parameters(), *model.buffers()]
    kept, peak = kept_and_peak(lambda: layer(streams, table)[0], known)
    of_experts = 2 * tokens * config.experts_top_k * (2 * config.moe_intermediate_size + size)
    of_attention = 2 * tokens * config.num_attention_heads * config.v_head_dim
    times = 1 if recompute == "none" else 2
    return kept, peak, sum(products) // times + of_experts + of_attention


def test_selective_keeps_products_and_no_streams_in_float32() -> None:
    size, tokens = 256, 128
    none, full, selective = (kept_by_experts_layer(r, size, tokens) for r in ("none", "full", "selective"))
    routing = tokens * 2 * 2 * 8  # choices and the places of their rows, int64
    assert routing <= full[0] <= 1.1 * routing
    # Besides: attention's log-sum-exps, and an end of rows for each expert.
    assert none[2] <= selective[0] - full[0] <= 1.15 * none[2]
    streams = 4 * tokens * 4 * size
    assert selective[0] < streams
    # A repetition holds what a layer keeps without: its four norms' inputs and outputs in float32.
    assert 4 * streams < none[0]
    assert full[1] <= 1.02 * none[1]
