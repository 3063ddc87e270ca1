"""Motif-3 as a folder: the released layout in and out, dtypes, shards, Auto classes, and tensors of
more than 2^31 elements.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.agreement import assert_agrees
from helpers.models import random_ids
from helpers.motif_3 import TINY, tiny_motif_3
from helpers.released import read_tensors, write_folder
from motifarch.models.motif import MotifConfig, MotifForCausalLM, MotifForSequenceClassification, MotifModel

IDS = random_ids(2, 9, vocab_size=TINY["vocab_size"])

RELEASED: dict[str, Any] = TINY | {
    "architectures": ["MotifForCausalLM"],
    "headwise_attn_output_gate": False,
    "score_before_experts": False,
    "polynorm_output_scale_per_layer": {},
    "load_balance_coeff": 1e-4,
    "original_seq_len": 16,
    "rope_factor": 64,
    "mscale": 1,
    "k_ratio": 1,
    "max_window_layers": 28,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "_debug_force_load_balance": False,
    "rope_scaling": TINY["rope_scaling"] | {"rope_theta": 10000.0},
    "torch_dtype": "bfloat16",
}
"""A config.json with the fields of the released one."""


def released_folder(folder: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 3) -> Path:
    """All in one dtype, the experts' biases too, as released."""
    tensors = {name: t.to(dtype) for name, t in tiny_motif_3(dtype=torch.float32).state_dict().items()}
    return write_folder(folder, RELEASED, tensors, shards=shards)


def test_a_released_folder_comes_and_goes_whole(tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "released")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(model) is MotifForCausalLM
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    expected = tiny_motif_3(dtype=torch.float32).bfloat16()
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, expected(IDS).logits)

    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    saved, given = read_tensors(tmp_path / "saved"), read_tensors(folder)
    assert saved.keys() == given.keys()
    assert all(torch.equal(t.float(), given[name].float()) for name, t in saved.items())
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for name in ("attention_cls", "rope_scaling", "diff_v2", "elementwise_attn_output_gate", "num_experts"):
        said = config[name]
        assert {k: said[k] for k in TINY[name]} == TINY[name] if isinstance(said, dict) else said == TINY[name]


def test_the_experts_selection_bias_stays_as_it_is_in_the_file(tmp_path: Path) -> None:
    """A bias that was moved by 1e-3 at a time is not rounded with the weights."""
    source = tiny_motif_3(dtype=torch.float32)
    source.save_pretrained(tmp_path)
    kept = {name: t for name, t in source.state_dict().items() if name.endswith("expert_bias")}
    assert kept
    for dtype in (torch.bfloat16, "auto"):
        loaded = MotifForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for name, bias in kept.items():
            assert torch.equal(loaded.state_dict()[name], bias)
        experts = next(iter(loaded.model.expert_layers().values()))
        assert experts.router.gate.weight.dtype == (torch.float32 if dtype == "auto" else dtype)


def test_auto_classes(tmp_path: Path) -> None:
    folder = released_folder(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MotifConfig
    assert config.attention_type == "gdla"
    assert type(AutoModelForCausalLM.from_config(config)) is MotifForCausalLM
    base = AutoModel.from_pretrained(folder)
    assert type(base) is MotifModel
    assert base.mtp_layers
    scored = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    assert type(scored) is MotifForSequenceClassification
    scored.train()(IDS, labels=torch.tensor([0.0, 1.0], dtype=torch.bfloat16)).loss.backward()
    assert all(p.grad is not None for p in scored.parameters())


def test_layers_on_several_devices(tmp_path: Path) -> None:
    """Some in memory, some on the disk."""
    folder, model = released_folder(tmp_path / "released", torch.float32), tiny_motif_3(dtype=torch.float32)
    places = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(len(model.model.layers))}
    placed = MotifForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    with torch.no_grad():
        assert_agrees(placed(IDS).logits, model(IDS).logits)
    out = [m.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (placed, model)]
    assert torch.equal(*out)


# More than 2^31 elements in a tensor: 32-bit arithmetic of offsets would read and write elsewhere.

MANY: dict[str, Any] = TINY | {
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "mhc_enabled": False,
    "hidden_size": 512,
    "num_experts": 8196,
    "moe_intermediate_size": 256,
    "intermediate_size": 16,
    "dtype": "bfloat16",
}
FUSED = "model.layers.1.moe.experts.gate_up_proj"


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], last: dict[str, torch.Tensor]) -> None:
    """A safetensors file of zeros that take no room, but for each tensor's last elements."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, written = 0, {}
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        if name in last:
            written[end - 2 * last[name].numel()] = last[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for place, tensor in written.items():
            file.seek(8 + len(text) + place)
            file.write(tensor.view(torch.int16).numpy().tobytes())
        file.truncate(8 + len(text) + end)


@pytest.mark.slow
def test_expert_tensors_past_two_to_the_31_elements(tmp_path: Path) -> None:
    """The last expert is read from the file, used, and written to another."""
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig(**MANY))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert torch.Size(shapes[FUSED]).numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    last = {
        name: torch.randn(shape[1:] if name.startswith(FUSED[:-12]) else shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
        if "expert_bias" not in name
    }
    (tmp_path / "config.json").write_text(
        json.dumps(MotifConfig(**MANY).to_dict() | {"architectures": ["MotifForCausalLM"]})
    )
    write_sparse(tmp_path / "model.safetensors", shapes, last)
    model = MotifForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    experts = model.model.layers[1].moe
    weights = dict(experts.experts.named_parameters())
    assert torch.equal(weights["gate_up_proj"][-1], last[FUSED])
    assert not weights["gate_up_proj"][:-1:97].any()

    x = torch.randn(3, 512, generator=generator).bfloat16()
    offsets = torch.full((len(weights["gate_up_proj"]),), 0, dtype=torch.int32)
    offsets[-1] = 3
    with torch.no_grad():
        found = experts.experts(x, offsets)
        alone = type(experts.experts)(
            512,
            num_experts=1,
            intermediate_size=256,
            bias_clamp=0.5,
            sigmoid_weight=True,
            output_scale=0.5,
            dtype=torch.bfloat16,
        )
        alone.load_state_dict({name: w[-1:].clone() for name, w in weights.items()})
        assert torch.equal(found, alone(x, torch.tensor([3], dtype=torch.int32)))

    model.save_pretrained(tmp_path / "saved")
    files = {name: file for file in (tmp_path / "saved").glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118  # it is no dict
    with safe_open(files[FUSED], "pt") as file:
        assert torch.equal(file.get_slice(FUSED)[-1], last[FUSED])
