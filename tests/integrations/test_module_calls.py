"""Patched models use the parameters that a patch adds by calling their modules, and Trainer takes
them for the causal language models that they are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from helpers.host_models import EXPERTS, HEADS, QUICK, RATIOS, host_model, moved, token_ids
from helpers.module_calls import Run, assert_hooks_take_effect, owners
from motifarch.integrations import patch
from motifarch.integrations.attention_function import add_lambdas


def everything(model: Any) -> Run:
    """Logits of a batch and of a token after it, and the loss."""
    ids = token_ids(2, 13)

    def run() -> list[Tensor]:
        with torch.no_grad():
            whole = model(ids, labels=ids, use_cache=True)
            next_token = model(ids[:, :1], past_key_values=whole.past_key_values).logits
        return [whole.logits, next_token, whole.loss]

    return run


# Without routed experts: hosts read their routers' weights themselves.
@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, "gda") for f in QUICK if f not in EXPERTS]
    + [pytest.param(f, "gda", marks=pytest.mark.slow) for f in HEADS if f not in {*QUICK, *EXPERTS}]
    + [("qwen3", "diff_v2")],
)
def test_every_module_of_a_patched_model_is_called(family: str, attention: str) -> None:
    model = host_model(family)
    patch(model, attention, RATIOS[family], "polynorm", sub_norm=True)
    assert_hooks_take_effect(moved(model), everything(model))


def test_every_module_of_a_model_with_lambdas_is_called() -> None:
    torch.manual_seed(0)
    model = host_model("qwen3")
    add_lambdas(model)
    assert any(name.endswith("subln") for name in owners(model))
    assert_hooks_take_effect(model, everything(model))


@pytest.mark.parametrize("patched", [False, True])
def test_label_smoothing_of_a_patched_model_is_of_the_next_token(patched: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, initializer_range=0.2)
    model = LlamaForCausalLM(config)
    if patched:
        patch(model)
    ids = token_ids(2, 13)
    logp = F.log_softmax(model(ids).logits, -1)[:, :-1]
    expected = 0.9 * -logp.gather(-1, ids[:, 1:, None]).mean() - 0.1 * logp.mean()
    options = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    loss = Trainer(model, options).compute_loss(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss, expected)
