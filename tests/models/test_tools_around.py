"""Adapters, sharding units, offloading and label smoothing around a Motif model."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import Trainer, TrainingArguments

from helpers.models import VARIANTS, random_ids, tiny_model
from motifarch.layers import cross_entropy
from motifarch.models.motif import MotifForCausalLM

# What Motif-2.6B and Motif-2-12.7B are, and every other kind of parameter.
LAYOUTS: dict[str, dict[str, Any]] = {name: {} for name in VARIANTS} | {
    "softmax": {"hidden_act": "poly_norm", "qk_norm": True},
    "diff_v2": {"sub_norm": True, "attention_gate": False, "use_bias": True},
}
IDS = random_ids(2, 12)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of the loss's chunks in a batch of a few tokens."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_TOKENS", (7, 7))
    monkeypatch.setattr(cross_entropy, "_FLOAT32_ELEMENTS", 1)


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def assert_same_outputs(found: Any, expected: Any) -> None:
    """The same logits to the bit, and the same losses."""
    with torch.no_grad():
        ours, theirs = found(input_ids=IDS, labels=IDS), expected(input_ids=IDS, labels=IDS)
        in_training = found.train()(input_ids=IDS, labels=IDS).loss
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    torch.testing.assert_close(in_training, theirs.loss)


# Adapters


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], "all-linear"], ids=str)
@pytest.mark.parametrize("variant", ["gda", "diff_v2 gated", "softmax"])
def test_an_adapter_is_trained_by_the_loss_of_its_logits(variant: str, targets: Any, tmp_path: Path) -> None:
    bare = tiny_model(variant)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(bare), config).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(loss, loss_of(logits))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert not torch.allclose(expected, bare(input_ids=IDS).logits, atol=1e-2)
        again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)
        torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["subln", "act_fn", "q_norm", "k_norm", "lm_head", "norm"])
def test_a_module_is_trained_whole_beside_an_adapter(name: str) -> None:
    """PEFT wraps it and trains a copy: what counts is the copy."""
    config = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=[name])
    bare = tiny_model("gda", qk_norm=True)
    model = get_peft_model(copy.deepcopy(bare), config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    copies = {n: p for n, p in model.named_parameters() if f"{name}.modules_to_save" in n}
    assert copies
    assert all(p.grad is not None and p.grad.any() for p in copies.values())
    expected = bare.train()
    expected(input_ids=IDS, labels=IDS).loss.backward()
    whole = dict(expected.named_parameters())
    for key, parameter in copies.items():
        own = key.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        torch.testing.assert_close(parameter.grad, whole[own].grad, rtol=1e-4, atol=1e-6)


# Sharding units, offloading


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", LAYOUTS)
def test_each_module_can_be_a_sharding_unit(variant: str, one_rank: None) -> None:
    """Parameters are whole only while their module is called."""
    model = tiny_model(variant, **LAYOUTS[variant]).train()
    if model.config.tie_word_embeddings and Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch 2.11 gathers a unit of two modules once where one of them is recomputed in pieces")
    sharded = copy.deepcopy(model)
    ends = [sharded.model.embed_tokens, sharded.lm_head]
    for module in reversed(list(sharded.modules())):
        if module not in ends and next(module.parameters(recurse=False), None) is not None:
            fully_shard(module)
    if model.config.tie_word_embeddings:
        fully_shard(ends)  # one unit, for their weight is one
    else:
        for module in ends:
            fully_shard(module)
    fully_shard(sharded)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, sharded)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(sharded.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].grad.full_tensor(), parameter.grad, msg=name)


@pytest.mark.parametrize("variant", LAYOUTS)
def test_offloading_changes_nothing(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, **LAYOUTS[variant])
    assert_same_outputs(cpu_offload(copy.deepcopy(model)), model)
    assert_same_outputs(disk_offload(copy.deepcopy(model), tmp_path), model)


def test_quantised_weights_change_no_count_of_operations() -> None:
    model = tiny_model("gda")
    flops = model.flops_per_token(12)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    assert model.flops_per_token(12) == flops


# transformers.Trainer


class Mine(MotifForCausalLM):
    """A user's own subclass."""


@pytest.mark.parametrize("kind", ["motif", "subclass", "adapter", "sharded"])
def test_label_smoothing_is_of_the_next_token(kind: str, tmp_path: Path, one_rank: None) -> None:
    model: Any = tiny_model("gda", initializer_range=0.2)
    if kind == "subclass":
        own = Mine(model.config)
        own.load_state_dict(model.state_dict())
        model = own
    logp = F.log_softmax(model(input_ids=IDS).logits.float(), -1)[:, :-1]
    expected = 0.9 * -logp.gather(-1, IDS[:, 1:, None]).mean() - 0.1 * logp.mean()
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    if kind == "sharded":
        fully_shard(model)  # another class, made by torch
    options = TrainingArguments(
        str(tmp_path),
        label_smoothing_factor=0.1,
        per_device_train_batch_size=2,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        optim="sgd",
    )
    trainer = Trainer(model, options, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    loss = trainer.compute_loss(model.train(), {"input_ids": IDS, "labels": IDS})
    torch.testing.assert_close(loss, expected)
