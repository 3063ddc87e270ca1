"""A Motif model as its description says, in plain PyTorch without motifarch or motif_kernels.

arXiv 2410.05258 (differential attention), 2510.06949 (grouped heads), 2411.03884 (PolyNorm),
2104.09864 (rotary), 2309.00071 (YaRN); heads, depth and tensor names as the checkpoints have them.
"""

import math
from typing import Any

import torch
from torch import Tensor


def plain_logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (B, S, vocabulary) of ids (B, S), from a folder's config and tensors."""
    eps = config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{i}."): t for name, t in tensors.items() if f".layers.{i}." in name}
        x = x + attention(config, layer, i, rms_norm(x, layer["input_layernorm.weight"], eps))
        x = x + feed_forward(layer, rms_norm(x, layer["post_attention_layernorm.weight"], eps))
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    tied = config["tie_word_embeddings"]
    return x @ tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def feed_forward(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    gate = x @ layer["mlp.gate_proj.weight"].T
    powers = [gate**n / ((gate**n).square().mean(-1, keepdim=True) + 1e-6).sqrt() for n in (3, 2, 1)]
    activated = sum(w * p for w, p in zip(layer["mlp.act_fn.weight"], powers, strict=True)) + layer["mlp.act_fn.bias"]
    return (activated * (x @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T


def attention(config: dict[str, Any], layer: dict[str, Tensor], index: int, x: Tensor) -> Tensor:
    """(B, S, E) to (B, S, E); query heads lie as blocks of g signal heads and a noise head."""
    noise_heads = config.get("num_noise_heads") or config["num_attention_heads"] // 2
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    block = config["num_attention_heads"] // noise_heads
    pairs = config["num_key_value_heads"] // 2
    q, k, v = ((x @ layer[f"self_attn.{n}_proj.weight"].T).split(width, dim=-1) for n in "qkv")
    angles = rotary_angles(config, width, x.shape[1])
    visible = mask(config, x.shape[1])

    first, second = (layer[f"self_attn.lambda_q{n}"] @ layer[f"self_attn.lambda_k{n}"] for n in (1, 2))
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (index - 1))
    lam = first.exp() - second.exp() + lambda_init

    outputs = []
    for noise in range(noise_heads):
        pair = noise // (noise_heads // pairs)
        k1, k2 = k[2 * pair], k[2 * pair + 1]
        values = torch.cat((v[2 * pair], v[2 * pair + 1]), dim=-1)
        group = q[noise * block : (noise + 1) * block]
        noise_map = attention_map(group[-1], k2, angles, visible)
        for signal in group[:-1]:
            difference = attention_map(signal, k1, angles, visible) @ values - lam * (noise_map @ values)
            normed = rms_norm(difference, layer["self_attn.subln.weight"], config["attn_rms_norm_eps"])
            outputs.append((1 - lambda_init) * normed)
    return torch.cat(outputs, dim=-1) @ layer["self_attn.o_proj.weight"].T


def attention_map(q: Tensor, k: Tensor, angles: tuple[Tensor, float], visible: Tensor) -> Tensor:
    """Probabilities (B, S, S) of one query and key head, (B, S, D) each."""
    logits = rotate(q, angles) @ rotate(k, angles).mT / math.sqrt(q.shape[-1])
    return logits.masked_fill(~visible, -math.inf).softmax(-1)


def mask(config: dict[str, Any], length: int) -> Tensor:
    """Which keys (columns) a query (row) sees: up to itself, with a window W the last W."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    reach = config["sliding_window"] if config.get("use_sliding_window") else length
    return (distance >= 0) & (distance < reach)


def rotate(x: Tensor, angles: tuple[Tensor, float]) -> Tensor:
    """Each pair (x[i], x[i + D / 2]) as a complex number, turned by its angle and scaled."""
    turns, scale = angles
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.full_like(turns, scale), turns)
    return torch.cat((turned.real, turned.imag), dim=-1)


def rotary_angles(config: dict[str, Any], width: int, length: int) -> tuple[Tensor, float]:
    """Angles (S, D / 2), and what multiplies queries and keys: 1 without YaRN."""
    theta, yarn = config["rope_theta"], config.get("rope_scaling")
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    scale = 1.0
    if yarn:
        frequencies = [yarn_frequency(yarn, theta, width, i) for i in range(width // 2)]
        scale = 0.1 * math.log(yarn["factor"]) + 1
    return torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64)), scale


def yarn_frequency(yarn: dict[str, Any], theta: float, width: int, i: int) -> float:
    """Between its own (pairs that turn often) and that divided by the factor (seldom)."""

    def index_of(turns: float) -> float:
        return width * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * turns)) / 2 / math.log(theta)

    low = max(math.floor(index_of(yarn.get("beta_fast", 32))), 0)
    high = min(math.ceil(index_of(yarn.get("beta_slow", 1))), width - 1)
    share = min(max((i - low) / (high - low), 0), 1)
    own = theta ** (-2 * i / width)
    return own * (1 - share) + own / yarn["factor"] * share
