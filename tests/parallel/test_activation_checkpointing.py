"""What the backward pass recomputes: the same gradients, as many products as asked."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import random_ids, tiny_model
from motifarch.errors import UserError
from motifarch.models.motif import MotifForCausalLM
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
