"""Adapters, sharding, offloading, quantisation and pickle, around every family's patched model."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from helpers.host_models import EXPERTS, HEADS, RATIOS, host_config, host_model, moved, token_ids
from motifarch.integrations import load_patched, patch

# One of each kind: plain, with norms of queries, latent with experts, of one projection.
FEW = ("llama", "qwen3", "axk1", "phi3")
FAMILIES = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]


def patched(family: str = "llama", **options: Any) -> Any:
    """With all that a patch can add."""
    experts = {"experts": "swap"} if family in EXPERTS else {}
    model = host_model(family)
    patch(model, **({"ratio": RATIOS[family], "feed_forward": "polynorm", "sub_norm": True} | experts | options))
    return moved(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 13)).logits


# Adapters


@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_all_linear_layers_trains_merges_and_is_saved(
    family: str, attention: str, tmp_path: Path
) -> None:
    model = patched(family, attention=attention)
    bare = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = token_ids(2, 13)
    adapted.train()(ids, labels=ids).loss.backward()
    idle = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle
    assert any("q_proj.lora_A" in name for name, _ in adapted.named_parameters())
    expected = logits(adapted.eval())
    assert not torch.allclose(expected, logits(bare), atol=1e-2)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare, tmp_path).eval()), expected)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"], ["up_proj"]])
def test_an_adapter_of_some_layers_merges(targets: list[str]) -> None:
    model = get_peft_model(patched(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("attention", "name"), [("gda", "lambda_vectors"), ("diff_v2", "lambda_proj")])
def test_lambda_trains_beside_an_adapter_and_is_saved_with_it(attention: str, name: str, tmp_path: Path) -> None:
    model = patched(attention=attention)
    bare = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=[name])).train()
    ids = token_ids(2, 13)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    before = logits(adapted)
    adapted(ids, labels=ids).loss.backward()
    for parameter_name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora" in parameter_name:
            parameter.grad = None
    optimizer.step()
    expected = logits(adapted)
    assert not torch.equal(expected, before)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare, tmp_path)), expected)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected)


# Sharding, offloading, quantisation


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_module_can_be_a_sharding_unit(family: str, one_rank: None) -> None:
    """Parameters are whole only while their module is called."""
    model = patched(family).train()
    sharded = copy.deepcopy(model)
    ends = [sharded.model.embed_tokens, sharded.lm_head]  # one unit where they are tied
    for module in reversed(list(sharded.modules())):
        if module not in ends and next(module.parameters(recurse=False), None) is not None:
            fully_shard(module)
    fully_shard(ends)
    fully_shard(sharded)
    ids = token_ids(2, 13)
    losses = [m(ids, labels=ids).loss for m in (model, sharded)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(sharded.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].grad.full_tensor(), parameter.grad, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_offloading_changes_nothing(family: str, tmp_path: Path) -> None:
    expected = logits(patched(family))
    torch.testing.assert_close(logits(cpu_offload(patched(family))), expected)
    torch.testing.assert_close(logits(disk_offload(patched(family), tmp_path)), expected)


def test_a_folder_loads_in_parts(tmp_path: Path) -> None:
    model = patched()
    model.save_pretrained(tmp_path / "saved")
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    parts |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = load_patched(tmp_path / "saved", device_map=parts, offload_folder=tmp_path / "off")
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_are_as_close_as_a_hosts(family: str) -> None:
    errors = []
    for model in (host_model(family), patched(family)):
        expected = logits(model)
        quantize_(model, Int8WeightOnlyConfig(version=2))
        errors.append(float((logits(model) - expected).norm() / expected.norm()))
    assert 0 < errors[1] < max(3 * errors[0], 0.05)


def test_what_is_sharded_or_quantized_already_is_refused(one_rank: None) -> None:
    quantized = host_model("llama")
    quantize_(quantized, Int8WeightOnlyConfig(version=2))
    sharded = host_model("llama")
    fully_shard(sharded)
    for model in (quantized, sharded):
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight is a .* patch the model first"):
            patch(model)


# Nobody else's objects change


@pytest.mark.parametrize("family", ["llama", "qwen3", "axk1"])
def test_other_models_of_the_same_config_stay_as_they_are(family: str) -> None:
    config = host_config(family)
    model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    if family == "llama":
        model, other = (LlamaForCausalLM(config).eval() for _ in range(2))  # share the config
    attention = model.model.layers[0].self_attn
    state, saved, expected = copy.deepcopy(attention.state_dict()), config.to_json_string(), logits(other.eval())
    patch(model, ratio=4, **({"experts": "keep", "feed_forward": "polynorm"} if family in EXPERTS else {}))
    assert config.to_json_string() == saved
    assert config._attn_implementation != "motifarch_differential"
    assert torch.equal(logits(other), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in attention.state_dict().items())
    assert attention.state_dict().keys() == state.keys()
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_a_patched_model_is_pickled() -> None:
    model = patched("qwen3")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded) is type(model)
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, nn.Linear)
