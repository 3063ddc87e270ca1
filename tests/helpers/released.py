"""Folders laid out like the released models', written without our code."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Fields that nothing here reads, of the kinds that such files hold.
UNUSED = {
    "auto_map": {"AutoModelForCausalLM": "modeling_motif.MotifForCausalLM"},
    "fused_rope": True,
    "loss_reduction": "mean",
    "max_window_layers": 28,
    "multi_token_heads": None,
    "wandb": {"run": "a"},
}
MOTIF_12B: dict[str, Any] = {
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
    "rms_norm_eps": 1e-6,
    "attn_rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "k_ratio": 1,
    "torch_dtype": "bfloat16",
    **UNUSED,
}
MOTIF_2B: dict[str, Any] = {
    "model_type": "motif",
    "architectures": ["MotifForCausalLM"],
    "vocab_size": 219_520,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "poly_norm",
    "rms_norm_eps": 1e-5,
    "attn_rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "max_position_embeddings": 16_384,
    "rope_theta": 500_000.0,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "use_bias": False,
    "torch_dtype": "bfloat16",
    **UNUSED,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# Two layers with the real heads; each has something of what a config can ask for.
_SMALL = {"vocab_size": 97, "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 256}
SMALL = {
    "2.6B": MOTIF_2B
    | _SMALL
    | {"hidden_size": 64, "use_sliding_window": True, "sliding_window": 5}
    | {"max_window_layers": 0},
    "12.7B": MOTIF_12B | _SMALL | {"hidden_size": 40, "head_dim": 8, "rope_theta": 500.0, "rope_scaling": YARN},
}


def released_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a folder's tensors."""
    size, width, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    noise, head = config.get("num_noise_heads") or heads // 2, config.get("head_dim") or size // heads
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads * head, size),
        "self_attn.k_proj.weight": (kv_heads * head, size),
        "self_attn.v_proj.weight": (kv_heads * head, size),
        "self_attn.o_proj.weight": (size, (heads - noise) * 2 * head),
        **{f"self_attn.lambda_{name}": (head,) for name in ("q1", "k1", "q2", "k2")},
        "self_attn.subln.weight": (2 * head,),
        "mlp.gate_proj.weight": (width, size),
        "mlp.up_proj.weight": (width, size),
        "mlp.down_proj.weight": (size, width),
        "mlp.act_fn.weight": (3,),
        "mlp.act_fn.bias": (1,),
        "input_layernorm.weight": (size,),
        "post_attention_layernorm.weight": (size,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, size), "model.norm.weight": (size,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (words, size)}


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of these shapes, norm weights around 1; each is large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in released_shapes(config).items():
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        tensors[name] = (t + 1 if "norm" in name or "subln" in name else t).to(dtype)
    return tensors


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """config.json and safetensors files, with an index if they are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file's name and contents' hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
