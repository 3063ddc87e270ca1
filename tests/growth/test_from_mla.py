"""Models of transformers with latent attention become Motif models, and differential ones, that
compute the same function.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.agreement import assert_agrees, randomise
from helpers.grown import loaded
from helpers.models import random_ids
from helpers.motif_3 import tiny_motif_3
from motifarch.commands.grow import main
from motifarch.errors import UserError
from motifarch.growth import SourceFolder, describe, write
from motifarch.growth.from_softmax import from_softmax
from motifarch.growth.from_softmax_sources import as_motif

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    # As in the released DeepSeek-V3, but for its groups of experts.
    "deepseek_v3": EXPERTS
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
    | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v3, the tables scaled too": EXPERTS
    | {"first_k_dense_replace": 3, "rope_interleave": False, "rope_parameters": YARN | {"mscale": 0.7}},
    # Its latents' norms have another epsilon than the others.
    "glm4_moe_lite": EXPERTS | {"rms_norm_eps": 1e-3, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    "youtu": {"tie_word_embeddings": True, "initializer_range": 0.02, "rope_parameters": YARN | {"mscale": 0.7}}
    | {"rms_norm_eps": 1e-5},
}


def make(folder: Path, name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A random model of the family that the name begins with, and its saved folder."""
    config = AutoConfig.for_model(name.split(",")[0], **(SIZES | MODELS[name] | fields))
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, std=0.3)
    model.to(dtype)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # enough to choose other experts than the scores would
            order = torch.randperm(module.num_experts, generator=torch.Generator().manual_seed(0))
            module.e_score_correction_bias = torch.linspace(-0.3, 0.3, module.num_experts)[order]
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "deepseek_v3" else pytest.mark.slow) for name in MODELS]
)
def test_the_converted_model_is_transformers_function(tmp_path: Path, name: str) -> None:
    """Logits, also of a left-padded row, and tokens generated with the latent cache."""
    theirs = make(tmp_path / "source", name)
    ids, mask = random_ids(2, 33), torch.ones(2, 33, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        padded = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits[1, 9:]
        tokens = theirs.generate(input_ids=ids[:, :11], **options)
    for kind in ("mla", "gdla"):
        assert main([str(tmp_path / "source"), str(tmp_path / kind), "--to", kind]) == 0
        ours = loaded(tmp_path / kind)
        assert ours.config.attention_type == kind
        with torch.no_grad():
            assert_agrees(ours(input_ids=ids).logits, expected)
            rows = ours(input_ids=ids, attention_mask=mask, position_ids=positions).logits[1, 9:]
        assert_agrees(rows, padded)
        assert torch.equal(ours.generate(input_ids=ids[:, :11], **options), tokens)


@pytest.mark.slow
def test_the_differential_model_is_exactly_the_softmax_model(tmp_path: Path) -> None:
    """In float64; also of a Motif model with fewer keys than heads, a gate, experts and
    multi-token prediction.
    """
    options: dict[str, Any] = {"attention_type": "mla", "num_attention_heads": 8, "num_key_value_heads": 2}
    options |= {"attention_cls": None, "diff_v2": None, "num_noise_heads": None}
    theirs = tiny_motif_3(**options)
    theirs.save_pretrained(tmp_path / "source")
    source = SourceFolder(tmp_path / "source")
    write(from_softmax(describe(source), "gdla"), source, tmp_path / "gdla", base=as_motif(describe(source)))
    ours, ids = loaded(tmp_path / "gdla", torch.float64), random_ids(2, 40, vocab_size=61)
    assert (ours.config.num_attention_heads, ours.config.noise_heads, ours.config.num_key_value_heads) == (16, 8, 2)
    with torch.no_grad():
        found, expected = (m(input_ids=ids, return_mtp_logits=True) for m in (ours, theirs))
    assert_agrees(found.logits, expected.logits, 1e-10)
    assert_agrees(found.mtp_logits, expected.mtp_logits, 1e-10)
    with pytest.raises(UserError, match="'gdla', which is differential already"):
        from_softmax(describe(SourceFolder(tmp_path / "gdla")), "gdla")
    with pytest.raises(UserError, match=r"--to mla .* this is one already"):
        from_softmax(describe(source), "mla")


@pytest.mark.slow
def test_a_model_with_latents_grows_in_depth_alone(tmp_path: Path) -> None:
    theirs = make(tmp_path / "source", "youtu")
    names = [str(tmp_path / name) for name in ("source", "gdla", "deeper")]
    assert main([*names[:2], "--to", "gdla"]) == 0
    assert main([*names[1:], "--layers", "5"]) == 0
    ids = random_ids(1, 12)
    with torch.no_grad():
        assert_agrees(loaded(tmp_path / "deeper")(input_ids=ids).logits, theirs(input_ids=ids).logits)
    with pytest.raises(UserError, match="with attention_type 'gdla' does not grow in width"):
        main([names[1], str(tmp_path / "wider"), "--hidden", "2"])


@pytest.mark.slow
def test_every_new_parameter_learns(tmp_path: Path) -> None:
    make(tmp_path / "source", "deepseek_v3")
    main([str(tmp_path / "source"), str(tmp_path / "gdla"), "--to", "gdla", "--no-check"])
    model, ids = loaded(tmp_path / "gdla").train(), random_ids(2, 24)
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        attention = layer.self_attn
        noise = attention.wq_b.weight.grad.view(4, 2, -1)[:, 1]
        for gradient in (noise, attention.lambda_proj.weight.grad, attention.wq_b_gate.weight.grad):
            assert (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.slow
def test_bfloat16_rounds_nothing(tmp_path: Path) -> None:
    """Copies, moved rows and powers of two; and the bias that selects experts stays float32."""
    make(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    assert main([str(tmp_path / "source"), str(tmp_path / "gdla"), "--to", "gdla", "--dtype", "bfloat16"]) == 0
    steps = json.loads((tmp_path / "gdla" / "growth.json").read_text())["steps"]
    assert [step["loss"] for step in steps] == [None, None]
    ids = random_ids(2, 20)
    with torch.no_grad():
        assert_agrees(loaded(tmp_path / "gdla", torch.float32)(input_ids=ids).logits, theirs(input_ids=ids).logits)
    make(tmp_path / "glm", "glm4_moe_lite", torch.bfloat16)
    loss = as_motif(describe(SourceFolder(tmp_path / "glm"))).steps[0].loss
    assert loss is not None
    assert "in bfloat16 the latents' norms have an epsilon of 9.77e-07, not 1e-06" in loss


@pytest.mark.slow
def test_both_layouts_of_experts_and_layers_of_multi_token_prediction(tmp_path: Path) -> None:
    """Folders hold each expert's matrices, or all in one tensor; layers past the last are said."""
    theirs = make(tmp_path / "source", "deepseek_v3")
    file = tmp_path / "source" / "model.safetensors"
    held = load_file(file)
    fused = {name: tensor for name, tensor in theirs.state_dict().items() if "lm_head" not in name}
    assert held.keys() - fused.keys(), "a folder with a tensor for each expert"
    more = {"model.layers.3.eh_proj.weight": torch.ones(2, 2), "lm_head.weight": theirs.lm_head.weight}
    save_file({n: t.detach().contiguous() for n, t in (fused | more).items()}, file, metadata={"format": "pt"})
    spec = as_motif(describe(SourceFolder(tmp_path / "source")))
    assert spec.steps[0].summary.endswith("multi-token prediction is left out: model.layers.3.eh_proj.weight")
    assert main([str(tmp_path / "source"), str(tmp_path / "mla"), "--to", "mla"]) == 0
    ids = random_ids(1, 12)
    with torch.no_grad():
        assert_agrees(loaded(tmp_path / "mla")(input_ids=ids).logits, theirs(input_ids=ids).logits)
    del held["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it lacks model.layers.2.mlp.experts.down_proj"):
        as_motif(describe(SourceFolder(tmp_path / "source")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_lora_rank": None}, "q_lora_rank None, queries without a latent; .* no weights make a norm the identity"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"n_group": 2, "topk_group": 1}, "n_group 2 and topk_group 1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2; .* they are num_attention_heads, 4"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "'linear'"),
    ],
    ids=str,
)
def test_what_motif_cannot_honour_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    make(tmp_path, "deepseek_v3", **fields)
    with pytest.raises(UserError, match=message):
        as_motif(describe(SourceFolder(tmp_path)))


def test_what_does_not_become_gdla_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "source", "deepseek_v3")
    spec = describe(SourceFolder(tmp_path / "source"))
    for options, message in (
        ({"to": "gda"}, "--to gda does not go with this model's attention"),
        ({"to": "gdla", "ratio": 2}, "each of the 4 serves 1 of the 4 heads; it may be 1"),
        ({"to": "gdla", "sub_norm": True}, "--sub-norm does not go with --to gdla"),
        ({"to": "mla", "ratio": 1}, "have no meaning with --to mla"),
        ({"to": "mla", "approximate": True}, "have no meaning with --to mla"),
    ):
        with pytest.raises(UserError, match=message):
            from_softmax(spec, **options)
    for name, reason in (("axk1", "post_mlp_layernorm"), ("axk2", "gates")):
        with pytest.raises(UserError, match=f"model_type '{name}', which no Motif model computes: .*{reason}"):
            from_softmax(dataclasses.replace(spec, config={"model_type": name}), "gdla")
    layers = {"mlp_layer_types": ["sparse", "sparse", "dense"]}
    make(tmp_path / "glm", "glm4_moe_lite", **layers)
    with pytest.raises(UserError, match="experts in layers 0, 1; in a Motif model they are at equal distances"):
        as_motif(describe(SourceFolder(tmp_path / "glm")))
