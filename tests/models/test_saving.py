"""Folders: what is written, what comes back, tied weights and float32 tables."""

import json

import pytest
import torch
from safetensors import safe_open

from helpers.models import VARIANTS, random_ids, tiny_config, tiny_model
from motifarch.models.motif import MotifConfig, MotifForCausalLM

RELEASED_12B = {
    "model_type": "Motif",
    "architectures": ["MotifForCausalLM"],
    "vocab_size": 219_520,
    "hidden_size": 4096,
    "intermediate_size": 16_384,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 16,
    "num_noise_heads": 8,
    "head_dim": 128,
    "hidden_act": "poly_norm",
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_bias": False,
    "k_ratio": 1,
}
RELEASED_2B = {
    "model_type": "Motif",
    "vocab_size": 219_520,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "poly_norm",
    "max_position_embeddings": 16_384,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}


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


@pytest.mark.parametrize(
    ("released", "parameters", "tensors"),
    [(RELEASED_12B, 12_703_860_896, 643), (RELEASED_2B, 2_597_218_432, 514)],
    ids=["Motif-2-12.7B", "Motif-2.6B"],
)
def test_released_sizes(released, parameters, tensors):
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig.from_dict(released))
    state = model.state_dict()
    if released["tie_word_embeddings"]:
        assert state.pop("lm_head.weight") is not None
    assert len(state) == tensors
    assert sum(t.numel() for t in state.values()) == parameters
    shapes = {n: tuple(state[f"model.layers.0.self_attn.{n}_proj.weight"].shape) for n in "qkvo"}
    if released is RELEASED_12B:
        assert shapes == {"q": (5120, 4096), "k": (2048, 4096), "v": (2048, 4096), "o": (4096, 8192)}
    else:
        assert set(shapes.values()) == {(2048, 2048)}
    attention = model.model.layers[0].self_attn
    assert attention.lambda_q1.shape == (128,)
    assert attention.subln.weight.shape == (256,)
    assert attention.num_noise_heads == 8
    assert attention.lambda_init == pytest.approx(-0.0099, abs=1e-4)  # depth counted from -1


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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


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


def test_config_is_written_with_the_old_rotary_fields_too(tmp_path):
    config = MotifConfig.from_dict(RELEASED_12B | {"rope_scaling": YARN | {"original_max_position_embeddings": 8192}})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "Motif"
    assert written["rope_theta"] == 1_000_000.0
    assert written["rope_scaling"] == YARN | {"original_max_position_embeddings": 8192}
    assert written["rope_parameters"]["rope_theta"] == 1_000_000.0
    for name in ("num_noise_heads", "num_key_value_heads", "head_dim", "hidden_act", "attn_rms_norm_eps"):
        assert written[name] == getattr(config, name)
    assert MotifConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
