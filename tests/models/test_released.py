"""Folders laid out like the released models': loaded whole, computing what they describe."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, TorchAoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from helpers.agreement import assert_agrees
from helpers.models import random_ids
from helpers.plain_motif import plain_logits
from helpers.released import (
    MOTIF_2B,
    MOTIF_12B,
    SMALL,
    YARN,
    fingerprint,
    random_tensors,
    read_tensors,
    released_shapes,
    write_folder,
)
from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM, MotifModel

both_layouts = pytest.mark.parametrize("layout", list(SMALL))


@pytest.fixture
def folder(tmp_path):
    """An untied model's folder in three shards."""
    return write_folder(tmp_path / "released", SMALL["12.7B"], random_tensors(SMALL["12.7B"]), shards=3)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(MOTIF_12B, 12_703_860_896, 643), (MOTIF_2B, 2_597_218_432, 514)],
    ids=["Motif-2-12.7B", "Motif-2.6B"],
)
def test_the_released_models_names_shapes_and_sizes(config, parameters, tensors):
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig.from_dict(dict(config)))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        assert shapes.pop("lm_head.weight") == shapes["model.embed_tokens.weight"]
    assert shapes == released_shapes(config)
    assert len(shapes) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    attention = model.model.layers[0].self_attn
    assert attention.num_noise_heads == 8
    assert attention.lambda_init == pytest.approx(-0.0099, abs=1e-4)  # depth counted from -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 4])
@both_layouts
def test_a_folder_is_loaded_whole_and_saved_under_the_same_names(tmp_path, layout, shards, dtype):
    config = SMALL[layout] | {"torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = random_tensors(config, dtype)
    folder = write_folder(tmp_path / "released", config, tensors, shards)
    before = fingerprint(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(model) is MotifForCausalLM
    assert not any(report.values())
    assert model.dtype == dtype

    MotifForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    saved = read_tensors(tmp_path / "saved")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(t, tensors[name]) and t.dtype == dtype for name, t in saved.items())
    assert fingerprint(folder) == before


@both_layouts
def test_a_saved_config_says_all_that_the_folder_s_said(tmp_path, layout):
    config = SMALL[layout]
    folder = write_folder(tmp_path / "released", config, random_tensors(config))
    MotifForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    # transformers writes dtype; "motif" is read, "Motif" written; auto_map's code is not there.
    renamed = {"torch_dtype", "model_type", "auto_map"}
    assert {name: saved.get(name) for name in config.keys() - renamed} == {
        name: value for name, value in config.items() if name not in renamed
    }
    again = MotifConfig.from_pretrained(tmp_path / "saved").to_dict()
    assert {name: again[name] for name in saved if name in again} == {n: v for n, v in saved.items() if n in again}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@both_layouts
def test_logits_and_gradients_are_those_of_the_description(tmp_path, layout, attention):
    config = SMALL[layout]
    tensors = random_tensors(config, torch.float64)
    folder = write_folder(tmp_path, config, tensors)
    model = MotifForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention)
    ids = random_ids(2, 21)
    plain = {name: t.requires_grad_() for name, t in tensors.items()}
    theirs = plain_logits(config, plain, ids)
    ours = model(input_ids=ids).logits
    assert_agrees(ours, theirs, 1e-10, "logits")
    weight = torch.randn_like(theirs)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert_agrees(parameter.grad, plain[name].grad, 1e-10, name)


def without(name):
    def change(config, tensors):
        del tensors[name]
        return config

    return change


def renamed(config, tensors):
    tensors["model.layers.1.self_attn.sub_norm.weight"] = tensors.pop("model.layers.1.self_attn.subln.weight")
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.mlp.act_fn.bias"), "missing model.layers.1.mlp.act_fn.bias"),
        (without("lm_head.weight"), "missing lm_head.weight"),
        (renamed, "missing .*1.self_attn.subln.weight; unexpected model.layers.1.self_attn.sub_norm.weight"),
        (lambda c, t: c | {"num_hidden_layers": 1}, "unexpected model.layers.1.input_layernorm.weight, .* 12 more"),
        (lambda c, t: c | {"num_hidden_layers": 3}, "missing model.layers.2.input_layernorm.weight"),
        (lambda c, t: c | {"head_dim": 4}, r"another shape model.layers.0.self_attn.k_proj.weight \(128, 40\) for"),
        (lambda c, t: c | {"vocab_size": 96}, r"lm_head.weight \(97, 40\) for \(96, 40\), model.embed_tokens"),
    ],
    ids=["a bias", "the output projection", "another name", "fewer layers", "more layers", "heads", "words"],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, change, message):
    config, tensors = SMALL["12.7B"], random_tensors(SMALL["12.7B"])
    folder = write_folder(tmp_path, change(config, tensors), tensors)
    for load in (MotifForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message) as error:
            load(folder)
        assert isinstance(error.value, UserError)  # what the commands print
        assert str(folder) in str(error.value)


def test_who_asks_for_the_report_gets_what_fits(tmp_path):
    config, tensors = SMALL["12.7B"], random_tensors(SMALL["12.7B"])
    del tensors["model.norm.weight"]
    folder = write_folder(tmp_path, config, tensors)
    model, report = MotifForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {"model.norm.weight"}
    assert torch.equal(model.model.norm.weight, torch.ones(40))  # as initialised


def test_who_asks_for_other_shapes_gets_them(folder):
    model = MotifForCausalLM.from_pretrained(folder, vocab_size=50, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (50, 40)
    assert torch.isfinite(model(input_ids=random_ids(1, 5, vocab_size=50)).logits).all()
    with pytest.raises(ValueError, match=r"missing model\.layers\.2"):  # it is asked for shapes only
        MotifForCausalLM.from_pretrained(folder, num_hidden_layers=3, ignore_mismatched_sizes=True)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def corrupt_header(file):
    data = bytearray(file.read_bytes())
    data[8:40] = b"\0" * 32
    file.write_bytes(data)


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (SHARD, truncate, f"{SHARD} is truncated or damaged"),
        (SHARD, corrupt_header, f"{SHARD} is truncated or damaged"),
        (SHARD, lambda f: f.write_bytes(b""), f"{SHARD} is truncated or damaged"),
        (SHARD, lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), f"{SHARD} is truncated"),
        (SHARD, Path.unlink, f"{SHARD} is missing, but {INDEX} says it holds .* and 8 more"),
        (INDEX, truncate, f"{INDEX} is damaged"),
        (INDEX, lambda f: f.write_text("{}"), f"{INDEX} is damaged"),
        (INDEX, lambda f: f.write_text('{"weight_map": 3}'), f"{INDEX} is damaged"),
        (
            INDEX,
            lambda f: f.write_text(f.read_text().replace('"weight_map": {', f'"weight_map": {{"model.a": "{SHARD}",')),
            f"{SHARD} lacks model.a, which {INDEX} says it holds",
        ),
        (
            INDEX,
            lambda f: f.write_text(f.read_text().replace(SHARD, f"../{f.parent.name}/{SHARD}")),
            rf"{INDEX} names the file '\.\./\w+/{SHARD}'; .*without a path",
        ),
        (
            INDEX,
            lambda f: f.write_text(f.read_text().replace(SHARD, str(f.parent / SHARD))),
            rf"{INDEX} names the file '/.*{SHARD}'; .*without a path",
        ),
    ],
    ids=[
        "truncated", "header", "empty", "pointer", "missing", "index cut", "index empty", "index odd", "index wrong",
        "index up", "index absolute",
    ],
)  # fmt: skip
def test_damaged_files_are_named_and_left_alone(folder, file, damage, message):
    damage(folder / file)
    before = fingerprint(folder)
    with pytest.raises(ValueError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(error.value, UserError)
    assert len(str(error.value).splitlines()) == 1
    assert fingerprint(folder) == before


def test_a_truncated_single_file_is_named(tmp_path):
    folder = write_folder(tmp_path, SMALL["2.6B"], random_tensors(SMALL["2.6B"]))
    truncate(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        MotifForCausalLM.from_pretrained(folder)


@both_layouts
def test_the_model_inside_loads_from_the_whole_folder(tmp_path, layout):
    config = SMALL[layout]
    folder = write_folder(tmp_path / "whole", config, random_tensors(config), shards=2)
    inside = AutoModel.from_pretrained(folder)
    assert type(inside) is MotifModel
    whole = MotifForCausalLM.from_pretrained(folder)
    ids = random_ids(1, 9)
    assert torch.equal(inside(input_ids=ids).last_hidden_state, whole.model(input_ids=ids).last_hidden_state)

    inside.save_pretrained(tmp_path / "inside")
    if config["tie_word_embeddings"]:  # the folder then holds all that there is
        back = MotifForCausalLM.from_pretrained(tmp_path / "inside")
        assert torch.equal(back(input_ids=ids).logits, whole(input_ids=ids).logits)
    else:
        with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
            MotifForCausalLM.from_pretrained(tmp_path / "inside")


@pytest.mark.parametrize("written", ["embedding", "both"])
def test_a_tied_folder_may_hold_the_matrix_twice(tmp_path, written):
    config, tensors = SMALL["2.6B"], random_tensors(SMALL["2.6B"])
    if written == "both":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = MotifForCausalLM.from_pretrained(write_folder(tmp_path, config, tensors))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_ways_to_load_still_work(folder, tmp_path):
    ids, tensors = random_ids(1, 7), read_tensors(folder)
    whole = MotifForCausalLM.from_pretrained(folder)
    expected = whole(input_ids=ids).logits
    config = MotifConfig.from_pretrained(folder)
    whole.save_pretrained(tmp_path / "outer" / "inner", variant="v2")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    for model in (
        MotifForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors)),
        MotifForCausalLM.from_pretrained(folder, device_map="cpu"),
        MotifForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True, use_safetensors=True),
        MotifForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner", variant="v2"),
        MotifForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(model(input_ids=ids).logits, expected)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"the state_dict does not fit MotifForCausalLM .* missing model\.norm"):
        MotifForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


def test_quantised_weights_load_and_come_back(tmp_path):
    """Their tensors' other names and shapes must not pass for a damaged folder."""
    torchao = pytest.importorskip("torchao.quantization")
    config = SMALL["12.7B"] | {"hidden_size": 64, "intermediate_size": 64}
    folder = write_folder(tmp_path / "released", config, random_tensors(config, torch.bfloat16))
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    ids = random_ids(1, 9)
    logits = again(input_ids=ids).logits
    assert torch.equal(logits, model(input_ids=ids).logits)
    assert not torch.equal(logits, AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits)


def llama_tables(theta, scaling, positions, **fields):
    """The cosines and sines of transformers for heads of width 128."""
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_theta=theta, rope_scaling=scaling, **fields)
    return LlamaRotaryEmbedding(config)(torch.zeros(1), positions)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        {"type": "yarn", "factor": 2.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 0.7},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False}
        | {"mscale": 0.5, "mscale_all_dim": 1.5},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    ],
    ids=["yarn", "older spelling", "no length", "betas", "attention factor", "mscale", "linear", "llama3"],
)
def test_scaled_rotary_tables_are_transformers_own(tmp_path, scaling):
    (tmp_path / "config.json").write_text(json.dumps(MOTIF_12B | {"rope_scaling": scaling}))
    positions = torch.tensor([[0, 1, 7, 63, 511, 2047]])
    plain = llama_tables(1e6, None, positions)
    theirs = llama_tables(1e6, dict(scaling), positions, max_position_embeddings=32_768)
    assert (plain[0] - theirs[0]).abs().max() > 0.1
    config = MotifConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    for read in (config, MotifConfig.from_pretrained(tmp_path / "again")):
        with torch.device("meta"):
            model = MotifModel(MotifConfig.from_dict(read.to_dict() | {"num_hidden_layers": 1}))
        for ours, expected in zip(model.rotary_embs["full_attention"](positions), theirs, strict=True):
            assert_agrees(ours, expected, 5e-4)  # a frequency's rounding to float32, times 2047 positions


def test_yarn_s_original_length_may_stand_outside(tmp_path):
    fields = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(MOTIF_12B | fields | {"num_hidden_layers": 1}))
    positions = torch.tensor([[0, 1, 7, 63, 511, 2047]])
    theirs = llama_tables(1e6, YARN | {"original_max_position_embeddings": 8192}, positions)
    with torch.device("meta"):
        ours = MotifModel(MotifConfig.from_pretrained(tmp_path)).rotary_embs["full_attention"](positions)
    for a, b in zip(ours, theirs, strict=True):
        assert_agrees(a, b, 5e-4)


def test_windows_and_the_long_context_theta_come_from_the_config():
    with torch.device("meta"):
        long = MotifModel(MotifConfig.from_dict(MOTIF_2B | {"num_hidden_layers": 1}))
    assert long.config.max_position_embeddings == 16_384
    positions = torch.tensor([[0, 1, 100, 16_383]])
    for ours, theirs in zip(
        long.rotary_embs["full_attention"](positions), llama_tables(5e5, None, positions), strict=True
    ):
        assert_agrees(ours, theirs, 2e-3)
    assert long.layers[0].self_attn.window_size == (-1, -1)
    with torch.device("meta"):
        windowed = MotifModel(MotifConfig.from_dict(SMALL["2.6B"]))
    assert windowed.layers[0].self_attn.window_size == (4, 0)
