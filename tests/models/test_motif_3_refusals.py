"""What a Motif-3 config or folder may ask for that no layer computes: one message that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.motif_3 import TINY, tiny_motif_3
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.weight_files import ModelFolderError

ROPE = TINY["rope_scaling"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_top_k": 7}, "experts_top_k=7 is more than num_experts=6"),
        ({"experts_top_k": None}, "num_experts=6 needs experts_top_k"),
        ({"qk_rope_head_dim": 14}, "qk_rope_head_dim=14 does not fit head_dim=12"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim=5 .* even"),
        ({"kv_lora_rank": None}, "needs kv_lora_rank"),
        ({"mhc_expansion_rate": 1}, "mhc_expansion_rate=1 .* two streams or more"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2"),
        ({"attention_cls": "mla2"}, "attention_cls='mla2'"),
        ({"diff_v2": False}, "diff_v2=False"),
        ({"headwise_attn_output_gate": True}, "headwise_attn_output_gate=True"),
        ({"score_before_experts": True}, "score_before_experts=True"),
        ({"score_func": "softmax"}, "score_func='softmax'"),
        ({"polynorm_output_scale_per_layer": {"3": 0.25}}, "polynorm_output_scale_per_layer="),
        ({"hidden_act": "silu"}, "polynorm_sigmoid_weight=True is of PolyNorm"),
        ({"sliding_window_period": None}, "sliding_window_pattern is 'interleave' without sliding_window_period"),
        ({"rope_scaling": ROPE | {"apply_yarn_scaling": True}}, "apply_yarn_scaling=True"),
        ({"rope_scaling": ROPE | {"rope_type": "linear"}}, "rope_type='linear'"),
        ({"rope_scaling": ROPE | {"mscale_all_dim": 1}}, "mscale_all_dim=1"),
        ({"rope_scaling": ROPE | {"attention_factor": 1.2}}, "attention_factor=1.2"),
        ({"rope_factor": 32}, "rope_factor=32 but rope_scaling has factor=64"),
        ({"layer_types": ["full_attention"] * 5}, "layer_types has 'full_attention' for layer 1"),
        ({"num_noise_heads": 3}, "num_heads=10 .* num_noise_heads=3"),
        ({"use_bias": True}, "use_bias is on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_is_refused_by_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MotifConfig(**(TINY | changes))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    tiny_motif_3(dtype=torch.float32).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def transposed_experts(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.moe.experts.gate_up_proj"
    tensors[name] = tensors[name].mT.contiguous()


def an_expert_each(tensors: dict[str, torch.Tensor]) -> None:
    fused = tensors.pop("model.layers.1.moe.experts.down_proj")
    tensors |= {f"model.layers.1.moe.experts.{i}.down_proj.weight": t.clone() for i, t in enumerate(fused)}


def a_head_of_its_own(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.mtp_layers.0.shared_head.head.weight"] = tensors["lm_head.weight"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            transposed_experts,
            r"of another shape .*experts.gate_up_proj \(6, 24, 32\) for \(6, 32, 24\)",
        ),
        (an_expert_each, "missing model.layers.1.moe.experts.down_proj"),
        (a_head_of_its_own, "unexpected model.mtp_layers.0.shared_head.head.weight"),
    ],
)
def test_tensors_of_another_layout_are_named(tmp_path: Path, change: Any, message: str) -> None:
    tensors = saved(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=message):
        MotifForCausalLM.from_pretrained(tmp_path)


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="tp_plan='auto' can't cut this model"):
        MotifForCausalLM.from_pretrained(tmp_path, tp_plan="auto")


def test_a_folder_keeps_the_released_fields(tmp_path: Path) -> None:
    model = tiny_motif_3(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name, value in TINY.items():
        assert written[name] == value or name == "rope_scaling"
    assert ROPE.items() <= written["rope_scaling"].items()
    again = MotifForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(1, 15)[None]
    # A file's tensors lie elsewhere in memory, where products of odd widths sum in another order.
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
