"""Folders: what is written, what comes back, tied weights and float32 tables."""

import json

import pytest
import torch
from safetensors import safe_open

from helpers.models import VARIANTS, random_ids, tiny_config, tiny_model
from helpers.released import MOTIF_12B, YARN
from motifarch.models.motif import MotifConfig, MotifForCausalLM


def layer_names(i):
    layer = f"model.layers.{i}."
    projections = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    lambdas = [f"self_attn.lambda_{n}" for n in ("q1", "k1", "q2", "k2")]
    mlp = [*(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")), "mlp.act_fn.weight", "mlp.act_fn.bias"]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    return {layer + name for name in (*projections, *lambdas, "self_attn.subln.weight", *mlp, *norms)}


def saved_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return set(tensors.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, variant, dtype):
    model = tiny_model(variant, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded, report = MotifForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    ids = random_ids(2, 19)
    assert torch.equal(model(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
    ours, theirs = ({k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (model, loaded))
    assert ours == theirs


@pytest.mark.parametrize("tied", [False, True])
def test_tensor_names_are_the_released_models_(tmp_path, tied):
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    names = layer_names(0) | layer_names(1) | {"model.embed_tokens.weight", "model.norm.weight"}
    assert saved_names(tmp_path) == names | (set() if tied else {"lm_head.weight"})


def test_tied_weights_come_back_tied(tmp_path):
    model = tiny_model("gda tied")
    model.save_pretrained(tmp_path)
    loaded = MotifForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.train()(input_ids=random_ids(1, 9), labels=random_ids(1, 9)).loss.backward()
    assert loaded.lm_head.weight.grad is loaded.model.embed_tokens.weight.grad
    assert len(list(loaded.parameters())) == len(list(loaded.state_dict())) - 1


def test_tied_gradient_is_the_sum_of_both_uses():
    tied, ids = tiny_model("gda tied", dtype=torch.float64).train(), random_ids(1, 9)
    untied = tiny_model("gda tied", dtype=torch.float64, tie_word_embeddings=False).train()
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(input_ids=ids, labels=ids).loss.backward()
    both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, both, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("move", [lambda m: m.to_empty(device="cpu"), lambda m: m.bfloat16(), lambda m: m.to("cpu")])
def test_meta_construction_and_moves_keep_weights_tied(move):
    with torch.device("meta"):
        model = MotifForCausalLM(tiny_config("gda tied"))
    if move(torch.nn.Linear(1, 1)).weight.dtype != torch.bfloat16:
        model.to_empty(device="cpu")
    model = move(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_untied_models_stay_untied():
    model = tiny_model().bfloat16()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_materialised_meta_model_computes_like_its_source():
    source = tiny_model("gda tied")
    with torch.device("meta"):
        model = MotifForCausalLM(tiny_config("gda tied"))
    model.to_empty(device="cpu").eval().load_state_dict(source.state_dict())
    ids = random_ids(2, 11)
    assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 5e5, "rope_scaling": dict(YARN)}], ids=["default", "yarn"])
def test_rotary_tables_stay_in_float32(tmp_path, rope):
    source = tiny_model(**rope)
    source.save_pretrained(tmp_path)
    loaded = MotifForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    positions = torch.arange(200)[None]
    exact = source.model.rotary_emb(positions)
    for model in (loaded, source.bfloat16()):
        assert model.lm_head.weight.dtype == torch.bfloat16
        for ours, theirs in zip(model.model.rotary_emb(positions, torch.bfloat16), exact, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)


def test_a_pass_on_the_meta_device_leaves_scaled_rotary_tables_whole():
    rotary, positions = tiny_model(rope_scaling=dict(YARN)).model.rotary_emb, torch.arange(9)[None]
    before = rotary(positions)
    assert rotary(positions.to("meta"))[0].is_meta
    for ours, expected in zip(rotary(positions), before, strict=True):
        assert torch.equal(ours, expected)


def test_config_is_written_with_the_old_rotary_fields_too(tmp_path):
    config = MotifConfig.from_dict(MOTIF_12B | {"rope_scaling": YARN | {"original_max_position_embeddings": 8192}})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "Motif"
    assert written["rope_theta"] == 1_000_000.0
    assert written["rope_scaling"] == YARN | {"original_max_position_embeddings": 8192}
    assert written["rope_parameters"]["rope_theta"] == 1_000_000.0
    for name in ("num_noise_heads", "num_key_value_heads", "head_dim", "hidden_act", "attn_rms_norm_eps"):
        assert written[name] == getattr(config, name)
    assert MotifConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
