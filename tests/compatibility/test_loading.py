"""Folders that are loaded in parts, or quantised."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from helpers.compatibility import build, cells
from helpers.host_models import token_ids
from motifarch.layers import cross_entropy

IDS = token_ids(2, 12)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of the loss's chunks in a batch of a few tokens."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_TOKENS", (7, 7))
    monkeypatch.setattr(cross_entropy, "_FLOAT32_ELEMENTS", 1)


def saved(name: str, folder: Path) -> Any:
    model = build(name)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


# In parts


def assert_same(found: Any, expected: Any) -> None:
    """The same logits to the bit, tokens and losses."""
    assert type(found) is type(expected)
    assert torch.equal(logits(found), logits(expected))
    assert torch.equal(found.generate(IDS, **GREEDY), expected.generate(IDS, **GREEDY))
    with torch.no_grad():
        losses = [m.train()(input_ids=IDS, labels=IDS).loss for m in (found, expected)]
    torch.testing.assert_close(*losses)


@cells("gda")
def test_device_map_auto(name: str, tmp_path: Path) -> None:
    """What memory does not hold is on the disk, whole layers at a time."""
    model = saved(name, tmp_path / "saved")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    options = {"max_memory": {"cpu": int(0.7 * size)}, "offload_folder": str(tmp_path / "off")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto", **options)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_same(loaded, model)


@cells()
def test_device_map_dict(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "saved")
    ends = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_embs", "lm_head"), "cpu")
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    maps: list[dict[str, str]] = [{"": "cpu"}, {"": "disk"}, ends | layers]
    if not model.config.tie_word_embeddings:
        maps.append(ends | layers | {"model.norm": "disk", "lm_head": "disk"})
    for parts in maps:
        options = {"device_map": parts, "offload_folder": str(tmp_path / "off")}
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options), model)


# Quantised


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_counts(quantised: Any, expected: Tensor, most: float, kinds: type | tuple[type, ...]) -> None:
    """Quantised weights are near the full ones and the only ones that logits, loss and generated
    tokens know.
    """
    skipped = ("lm_head", "lambda_proj")  # the latter by 4 bits of bitsandbytes
    linears = [m for n, m in quantised.named_modules() if isinstance(m, nn.Linear) and not n.endswith(skipped)]
    assert all(isinstance(m, kinds) or isinstance(m.weight, kinds) for m in linears)
    found = distance(logits(quantised), expected)
    assert 0 < found < most
    with torch.no_grad():
        loss, of_training = (quantised.train()(input_ids=IDS, **labels) for labels in ({"labels": IDS}, {}))
    expected_loss = F.cross_entropy(of_training.logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss.loss, expected_loss)
    cached = quantised.eval().generate(IDS, **GREEDY)
    assert torch.equal(cached, quantised.generate(IDS, use_cache=False, **GREEDY))


def assert_loads(config: Any, most: float, kinds: Any, model: Any, folder: Path) -> None:
    """From a folder of full weights, and again from one of quantised weights."""
    expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert type(loaded) is type(model)
    assert_counts(loaded, expected, most, kinds)
    loaded.save_pretrained(folder / "quantised")
    again = AutoModelForCausalLM.from_pretrained(folder / "quantised")
    assert torch.equal(logits(again), logits(loaded))


INT8 = Int8WeightOnlyConfig(version=2)
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def assert_torchao(config: Any, most: float, name: str, folder: Path) -> None:
    from torchao.utils import TorchAOBaseTensor

    model = saved(name, folder)
    expected = logits(model)
    assert_loads(TorchAoConfig(config), most, TorchAOBaseTensor, model, folder)
    quantize_(model, config)
    assert_counts(model, expected, most, TorchAOBaseTensor)


@cells("gda")
def test_torchao_int8(name: str, tmp_path: Path) -> None:
    assert_torchao(INT8, 0.05, name, tmp_path)


@cells()
def test_torchao_int4(name: str, tmp_path: Path) -> None:
    assert_torchao(INT4, 0.5, name, tmp_path)


@cells()
def test_bitsandbytes_8bit(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    assert_loads(BitsAndBytesConfig(load_in_8bit=True), 0.05, bnb.nn.Linear8bitLt, model, tmp_path)


@cells()
def test_bitsandbytes_4bit(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    options = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "lambda_proj"]}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    assert_loads(config, 0.5, bnb.nn.Linear4bit, model, tmp_path)
