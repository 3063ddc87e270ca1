"""Motif-3 in plain torch: slow, by loops, in float64, to compare a model with.

Written from MOTIF3.md alone, the notes on what is published of Motif-3 (arXiv 2608.09119), before
there was a model here, and shares no code with one. § is a section of these notes: 2 configuration,
3 tensors, 4 attention (GDLA), 5 PolyNorm, 6 router and experts, 7 hyper-connections (mHC), 8 MTP.
Where the notes leave a choice, a comment that begins with "Reading" says which was made.

What rounds (bf16, float32 islands) is left out: every step is in the tensors' own dtype.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # published name -> tensor


@dataclass(frozen=True)
class Motif3Config:
    """The fields of §2 that change the computation, with the released model's values."""

    vocab_size: int = 220160
    hidden_size: int = 4096
    num_hidden_layers: int = 53
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    num_attention_heads: int = 80
    num_noise_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 192
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    q_lora_rank: int = 1024
    kv_lora_rank: int = 512
    intermediate_size: int = 12288
    n_dense_first_layers: int = 2
    interleave_moe_layer_step: int = 1
    moe_intermediate_size: int = 1280
    num_experts: int = 384
    experts_top_k: int = 8
    num_shared_experts: int = 1
    route_norm: bool = True
    route_scale: float = 2.0
    polynorm_sigmoid_weight: bool = True
    polynorm_output_scale: float = 0.5
    polynorm_output_scale_per_layer: dict[Any, float] = field(default_factory=dict)
    polynorm_bias_clamp: float = 0.5
    hidden_clamp: float = 1e6
    mhc_enabled: bool = True
    mhc_expansion_rate: int = 4
    mhc_sinkhorn_iters: int = 20
    mhc_h_post_alpha: float = 0.0
    sliding_window: int = 128
    sliding_window_period: int = 4
    rope_theta: float = 10000.0
    swa_rope_theta: float = 10000.0
    # Reading (§2): top-level rope_factor, original_seq_len and mscale repeat what is here.
    rope_scaling: dict[str, Any] | None = field(
        default_factory=lambda: {
            "factor": 64,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1,
        }
    )
    num_nextn_predict_layers: int = 1

    def __post_init__(self) -> None:
        if self.num_noise_heads != self.num_key_value_heads:
            raise ValueError("§4 has one key/value head for each noise head")
        if self.num_attention_heads % self.num_noise_heads:
            raise ValueError("§4 has as many signal heads in each group")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError("§8 describes one MTP layer")

    @property
    def groups(self) -> int:
        return self.num_noise_heads

    @property
    def signal_heads(self) -> int:
        return self.num_attention_heads - self.num_noise_heads

    @property
    def nope_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim

    @property
    def streams(self) -> int:
        return self.mhc_expansion_rate if self.mhc_enabled else 1

    def is_full(self, layer: int) -> bool:
        """Whether a layer attends to everything before it; the others have a window."""
        return layer % self.sliding_window_period == 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts; the others have one dense MLP."""
        # Reading (§2): the step counts from the first layer after the dense ones.
        after = layer - self.n_dense_first_layers
        return after >= 0 and after % self.interleave_moe_layer_step == 0

    def output_scale(self, layer: int | None) -> float:
        """PolyNorm's output scale in a layer; None is the MTP layer."""
        # Reading (§2): {layer: scale} replaces the scale of that layer's dense, shared and routed
        # MLPs. JSON makes the index a string. The MTP layer is none of the numbered ones.
        per_layer = self.polynorm_output_scale_per_layer
        return per_layer.get(layer, per_layer.get(str(layer), self.polynorm_output_scale))


DESCRIBED = {
    "hidden_act": "poly_norm",
    "attention_cls": "gdla",
    "diff_v2": True,
    "elementwise_attn_output_gate": True,
    "headwise_attn_output_gate": False,
    "attention_dropout": 0,
    "score_func": "sigmoid",
    "score_before_experts": False,
    "use_sliding_window": True,
    "sliding_window_pattern": "interleave",
}


def read_config(config: dict[str, Any]) -> Motif3Config:
    """The fields read here, out of a whole config.json's.

    Raises:
        ValueError: A field has a value of which the notes say nothing.
    """
    for name, value in DESCRIBED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}={config[name]!r}: only {value!r} is described")
    known = {f.name for f in fields(Motif3Config)}
    return Motif3Config(**{name: value for name, value in config.items() if name in known})


# §3: names and shapes


def parameter_shapes(config: Motif3Config) -> dict[str, tuple[int, ...]]:
    """Published name -> shape, for every tensor of a model."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= _attention_shapes(config, prefix)
        if config.mhc_enabled:
            shapes |= _mhc_shapes(config, prefix + "mhc_attn.") | _mhc_shapes(config, prefix + "mhc_ffn.")
        if config.is_moe(layer):
            shapes |= _moe_shapes(config, prefix + "moe.")
        else:
            shapes |= _mlp_shapes(config, prefix + "mlp.", config.intermediate_size)
    for layer in range(config.num_nextn_predict_layers):
        prefix = f"model.mtp_layers.{layer}."
        shapes |= {
            prefix + "embed_norm.weight": (hidden,),
            prefix + "final_layernorm.weight": (hidden,),
            prefix + "input_proj.weight": (hidden, 2 * hidden),
        }
        shapes |= _attention_shapes(config, prefix)
        shapes |= _mlp_shapes(config, prefix + "mlp.", config.intermediate_size)
    return shapes


def _attention_shapes(config: Motif3Config, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, q_rank, kv_rank = config.hidden_size, config.q_lora_rank, config.kv_lora_rank
    outputs = config.signal_heads * config.v_head_dim
    attention = prefix + "self_attn."
    return {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
        attention + "wq_a.weight": (q_rank, hidden),
        attention + "q_norm.weight": (q_rank,),
        attention + "wq_b.weight": (config.num_attention_heads * config.head_dim, q_rank),
        attention + "wq_b_gate.weight": (outputs, q_rank),
        attention + "wkv_a.weight": (kv_rank + config.qk_rope_head_dim, hidden),
        attention + "kv_norm.weight": (kv_rank,),
        attention + "wkv_b.weight": (config.groups * (config.nope_dim + config.v_head_dim), kv_rank),
        attention + "lambda_proj.weight": (config.signal_heads, hidden),
        attention + "wo.weight": (hidden, outputs),
    }


def _mhc_shapes(config: Motif3Config, prefix: str) -> dict[str, tuple[int, ...]]:
    n, width = config.streams, config.streams * config.hidden_size
    return {
        prefix + "alpha_pre": (1,),
        prefix + "alpha_post": (1,),
        prefix + "alpha_res": (1,),
        prefix + "bias_pre": (n,),
        prefix + "bias_post": (n,),
        prefix + "bias_res": (n, n),
        prefix + "proj_pre.weight": (n, width),
        prefix + "proj_post.weight": (n, width),
        prefix + "proj_res.weight": (n * n, width),
        prefix + "rms_norm.weight": (width,),
    }


def _mlp_shapes(config: Motif3Config, prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, config.hidden_size),
        prefix + "up_proj.weight": (width, config.hidden_size),
        prefix + "down_proj.weight": (config.hidden_size, width),
        prefix + "act_fn.weight": (3,),
        prefix + "act_fn.bias": (1,),
    }


def _moe_shapes(config: Motif3Config, prefix: str) -> dict[str, tuple[int, ...]]:
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "router.gate.weight": (experts, hidden),
        prefix + "expert_bias": (experts,),
        prefix + "experts.gate_up_proj": (experts, 2 * width, hidden),
        prefix + "experts.down_proj": (experts, hidden, width),
        prefix + "experts.act_fn.weight": (experts, 3),
        prefix + "experts.act_fn.bias": (experts, 1),
    }
    if config.num_shared_experts:
        # Reading (§3): several shared experts are one MLP, as many times as wide.
        shapes |= _mlp_shapes(config, prefix + "shared_experts.", config.num_shared_experts * width)
    return shapes


# Pieces


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., in) by a weight (out, in) to (..., out)."""
    return x @ weight.T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each vector (..., D) over its root mean square, times a weight (D,)."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


# §4: attention


def yarn_correction_range(config: Motif3Config) -> tuple[int, int]:
    """The first and the last pair of dimensions between which YaRN's frequencies go over."""
    yarn, dim = config.rope_scaling, config.qk_rope_head_dim
    assert yarn is not None

    def pair_that_turns(times: float) -> float:
        wavelength = yarn["original_max_position_embeddings"] / times
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    # Reading (§4): the notes give [10, 23] alone. Kept within 0 and dim - 1, as in YaRN's own code.
    low, high = math.floor(pair_that_turns(yarn["beta_fast"])), math.ceil(pair_that_turns(yarn["beta_slow"]))
    return max(low, 0), min(high, dim - 1)


def rotary_frequencies(config: Motif3Config, full: bool) -> list[float]:
    """Radians a position, one for each of the qk_rope_head_dim / 2 pairs."""
    dim = config.qk_rope_head_dim
    theta = config.rope_theta if full else config.swa_rope_theta
    plain = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    if not full or config.rope_scaling is None:
        return plain
    low, high = yarn_correction_range(config)
    frequencies = []
    for pair, frequency in enumerate(plain):
        # Reading (§4): a range of no length is a step, by YaRN's own 0.001.
        ramp = (pair - low) / (high - low if high != low else 0.001)
        slowed = min(max(ramp, 0.0), 1.0)
        frequencies.append((1 - slowed) * frequency + slowed * frequency / config.rope_scaling["factor"])
    return frequencies


def softmax_scale(config: Motif3Config, full: bool) -> float:
    """What logits are multiplied with before the softmax."""
    scale = config.head_dim**-0.5
    if full and config.rope_scaling is not None:
        # Reading (§4): mscale stands before the logarithm, and a factor below 1 changes nothing, as
        # in DeepSeek's.
        factor = max(config.rope_scaling["factor"], 1)
        scale *= (0.1 * config.rope_scaling["mscale"] * math.log(factor) + 1) ** 2
    return scale


def rotate(x: Tensor, positions: Tensor, frequencies: list[float]) -> Tensor:
    """Turn pairs (i, i + D/2) of each vector (B, S, D) by its position (B, S)."""
    half = len(frequencies)
    columns: list[Tensor] = [x[..., i] for i in range(2 * half)]
    for i, frequency in enumerate(frequencies):
        angle = positions.to(x.dtype) * frequency
        first, second = x[..., i], x[..., i + half]
        columns[i] = first * torch.cos(angle) - second * torch.sin(angle)
        columns[i + half] = second * torch.cos(angle) + first * torch.sin(angle)
    return torch.stack(columns, -1)


def token_positions(ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """The number of real tokens of the same document before each of (B, S)."""
    positions = torch.zeros_like(ids)
    for b in range(ids.shape[0]):
        seen: dict[int, int] = {}
        for t in range(ids.shape[1]):
            document = 0 if document_ids is None else int(document_ids[b, t])
            positions[b, t] = seen.get(document, 0)
            if attention_mask is None or attention_mask[b, t]:
                seen[document] = seen.get(document, 0) + 1
    return positions


def visible_keys(
    config: Motif3Config,
    full: bool,
    positions: Tensor,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Which keys each query attends to, (B, S, S) of bool: queries, then keys.

    A window is sliding_window keys and the query's own: 129 in the released model.
    """
    batch, length = positions.shape
    visible = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for t in range(length):
            for s in range(t + 1):
                real = attention_mask is None or bool(attention_mask[b, t] and attention_mask[b, s])
                together = document_ids is None or bool(document_ids[b, t] == document_ids[b, s])
                near = full or bool(positions[b, t] - positions[b, s] <= config.sliding_window)
                visible[b, t, s] = real and together and near
    return visible


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """One head: queries and keys (B, S, D), values (B, S, V), visible (B, S, S) to (B, S, V)."""
    rows = []
    for b in range(query.shape[0]):
        for t in range(query.shape[1]):
            keys = visible[b, t].nonzero().flatten()
            if len(keys) == 0:  # Reading: a padded query has no output; nothing real ever sees it
                rows.append(value.new_zeros(value.shape[-1]))
                continue
            weights = torch.softmax(key[b, keys] @ query[b, t] * scale, dim=-1)
            rows.append(weights @ value[b, keys])
    return torch.stack(rows).unflatten(0, query.shape[:2])


def attention(
    config: Motif3Config, tensors: Tensors, prefix: str, x: Tensor, positions: Tensor, visible: Tensor, full: bool
) -> Tensor:
    """GDLA from the normed input (B, S, hidden) to the sublayer's output (B, S, hidden).

    Args:
        config: The model's.
        tensors: The model's.
        prefix: What stands before "wq_a.weight", dot included.
        x: After input_layernorm, (B, S, hidden).
        positions: (B, S).
        visible: From visible_keys, (B, S, S).
        full: Full layers have YaRN and its scale, window and MTP layers neither.
    """
    nope, eps = config.nope_dim, config.rms_norm_eps
    frequencies, scale = rotary_frequencies(config, full), softmax_scale(config, full)

    c_q = rms_norm(linear(x, tensors[prefix + "wq_a.weight"]), tensors[prefix + "q_norm.weight"], eps)
    queries = linear(c_q, tensors[prefix + "wq_b.weight"]).unflatten(-1, (config.num_attention_heads, -1))
    gate = linear(c_q, tensors[prefix + "wq_b_gate.weight"]).unflatten(-1, (config.signal_heads, -1))

    latent = linear(x, tensors[prefix + "wkv_a.weight"])
    c_kv, k_pe = latent[..., : config.kv_lora_rank], latent[..., config.kv_lora_rank :]
    c = rms_norm(c_kv, tensors[prefix + "kv_norm.weight"], eps)
    kv = linear(c, tensors[prefix + "wkv_b.weight"]).unflatten(-1, (config.groups, -1))
    k_pe = rotate(k_pe, positions, frequencies)

    lam = torch.sigmoid(linear(x, tensors[prefix + "lambda_proj.weight"]))

    heads_per_group = config.num_attention_heads // config.groups
    ratio = heads_per_group - 1  # signal heads a noise head
    outputs = []
    for group in range(config.groups):
        key = torch.cat([kv[:, :, group, :nope], k_pe], -1)
        value = kv[:, :, group, nope:]
        heads = []
        for h in range(group * heads_per_group, (group + 1) * heads_per_group):
            query = queries[:, :, h]
            query = torch.cat([query[..., :nope], rotate(query[..., nope:], positions, frequencies)], -1)
            heads.append(softmax_attention(query, key, value, visible, scale))
        noise = heads[ratio]  # a group's last head
        for j in range(ratio):
            s = ratio * group + j
            difference = heads[j] - lam[:, :, s, None] * noise
            outputs.append(difference * torch.sigmoid(gate[:, :, s]))
    return linear(torch.cat(outputs, -1), tensors[prefix + "wo.weight"])


# §5: PolyNorm


def poly_norm(config: Motif3Config, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """poly(gate) of vectors (..., width) with a weight (3,) and a bias (1,)."""
    s = torch.sigmoid(weight) if config.polynorm_sigmoid_weight else weight
    result = bias
    for coefficient, power in zip(s, (3, 2, 1), strict=True):
        z = gate**power
        result = result + coefficient * z / torch.sqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)
    return result


def mlp(config: Motif3Config, tensors: Tensors, prefix: str, x: Tensor, output_scale: float) -> Tensor:
    """A dense, shared or MTP layer's MLP, (B, S, hidden) to (B, S, hidden)."""
    gate = linear(x, tensors[prefix + "gate_proj.weight"])
    up = linear(x, tensors[prefix + "up_proj.weight"])
    # Reading (§5): hidden_clamp is a routed expert's; that others clamp too is "no effect" there.
    poly = poly_norm(config, gate, tensors[prefix + "act_fn.weight"], tensors[prefix + "act_fn.bias"])
    return linear(poly * up * output_scale, tensors[prefix + "down_proj.weight"])


# §6: router and experts


@dataclass
class Routing:
    """One layer's choices: E experts, k of them a token.

    Attributes:
        logits: (B, S, E).
        scores: Sigmoid of logits, without the selection bias, (B, S, E).
        choices: Experts from the highest biased score down, (B, S, k).
        weights: What each choice's output is multiplied with, (B, S, k).
        routed: The weighted sum of the routed experts, (B, S, hidden).
    """

    logits: Tensor
    scores: Tensor
    choices: Tensor
    weights: Tensor
    routed: Tensor


def moe(config: Motif3Config, tensors: Tensors, prefix: str, x: Tensor, output_scale: float) -> tuple[Tensor, Routing]:
    """Routed and shared experts, (B, S, hidden) to (B, S, hidden), and the routing."""
    logits = linear(x, tensors[prefix + "router.gate.weight"])
    scores = torch.sigmoid(logits)
    choices = torch.topk(scores + tensors[prefix + "expert_bias"], config.experts_top_k, dim=-1).indices
    weights = scores.gather(-1, choices)
    if config.route_norm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * config.route_scale

    gate_up, down = tensors[prefix + "experts.gate_up_proj"].unbind(), tensors[prefix + "experts.down_proj"].unbind()
    act_weight = tensors[prefix + "experts.act_fn.weight"].unbind()
    act_bias = tensors[prefix + "experts.act_fn.bias"].unbind()

    def clamp(values: Tensor) -> Tensor:
        return values.clamp(-config.hidden_clamp, config.hidden_clamp)

    def expert(e: int, token: Tensor) -> Tensor:
        gate, up = (clamp(half) for half in (gate_up[e] @ token).chunk(2))
        # Reading (§5): a plain clamp, so a bias beyond it has no gradient.
        bias = act_bias[e].clamp(-config.polynorm_bias_clamp, config.polynorm_bias_clamp)
        product = clamp(poly_norm(config, gate, act_weight[e], bias) * up)
        return down[e] @ (product * output_scale)

    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            terms = [weights[b, t, c] * expert(int(choices[b, t, c]), x[b, t]) for c in range(choices.shape[-1])]
            rows.append(torch.stack(terms).sum(0))
    routed = torch.stack(rows).unflatten(0, x.shape[:2])

    output = routed
    if config.num_shared_experts:
        output = output + mlp(config, tensors, prefix + "shared_experts.", x, output_scale)
    return output, Routing(logits, scores, choices, weights, routed)


# §7: hyper-connections


def sinkhorn(matrix: Tensor, iterations: int) -> Tensor:
    """Positive (..., n, n) to doubly stochastic: rows, then columns, so many times."""
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=1e-8)
        matrix = matrix / matrix.sum(-2, keepdim=True).clamp(min=1e-8)
    return matrix


def mhc_maps(config: Motif3Config, tensors: Tensors, prefix: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a sublayer reads, writes and mixes.

    Args:
        config: The model's.
        tensors: The model's.
        prefix: What stands before "alpha_pre", dot included.
        streams: (B, S, n, hidden).

    Returns:
        h_pre (B, S, n), h_post (B, S, n) and H (B, S, n, n); H[i, j] is what stream i takes of j.
        Without mHC there is one stream, and all three are 1: a pre-norm residual.
    """
    n = config.streams
    if not config.mhc_enabled:
        one = streams.new_ones(*streams.shape[:2], 1)
        return one, one, one[..., None]
    normed = rms_norm(streams.flatten(-2), tensors[prefix + "rms_norm.weight"], 1e-6)

    def affine(name: str, bound: float) -> Tensor:
        projected = linear(normed, tensors[f"{prefix}proj_{name}.weight"])
        bias = tensors[f"{prefix}bias_{name}"].flatten()
        return (tensors[f"{prefix}alpha_{name}"] * projected + bias).clamp(-bound, bound)

    h_pre = torch.sigmoid(affine("pre", 10))
    h_post = (1 + config.mhc_h_post_alpha) * torch.sigmoid(affine("post", 10))
    mix = sinkhorn(torch.exp(affine("res", 20)).unflatten(-1, (n, n)), config.mhc_sinkhorn_iters)
    return h_pre, h_post, mix


def mhc_read(streams: Tensor, h_pre: Tensor) -> Tensor:
    """A sublayer's input (B, S, hidden) of streams (B, S, n, hidden)."""
    return torch.stack([h_pre[..., i, None] * streams[..., i, :] for i in range(streams.shape[-2])]).sum(0)


def mhc_write(streams: Tensor, output: Tensor, h_post: Tensor, mix: Tensor) -> Tensor:
    """The streams (B, S, n, hidden) after a sublayer's output (B, S, hidden)."""
    n = streams.shape[-2]
    written = []
    for i in range(n):
        mixed = torch.stack([mix[..., i, j, None] * streams[..., j, :] for j in range(n)]).sum(0)
        written.append(mixed + h_post[..., i, None] * output)
    return torch.stack(written, -2)


# The model


@dataclass
class Output:
    """What forward computes; V is the vocabulary, L the number of layers.

    Attributes:
        logits: (B, S, V).
        mtp_logits: One (B, S - 1, V) for each MTP layer; row t has seen token t + 1 and speaks of
            token t + 2.
        hidden: After the final norm, (B, S, hidden).
        streams: Before each layer and after the last, L + 1 of (B, S, n, hidden).
        attention_outputs: The attention sublayers' outputs, L of (B, S, hidden).
        ffn_outputs: The MLPs' or experts' outputs, L of (B, S, hidden).
        routing: Layer -> its routing, for layers with experts.
    """

    logits: Tensor
    mtp_logits: list[Tensor]
    hidden: Tensor
    streams: list[Tensor]
    attention_outputs: list[Tensor]
    ffn_outputs: list[Tensor]
    routing: dict[int, Routing]


def forward(
    config: Motif3Config,
    tensors: Tensors,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Output:
    """The whole model.

    Args:
        config: The model's.
        tensors: Those that parameter_shapes names.
        ids: (B, S).
        attention_mask: 0 where a token is padding, (B, S). Rows of padding mean nothing.
        document_ids: Which packed document a token is of, (B, S); none sees another.
    """
    eps = config.rms_norm_eps
    positions = token_positions(ids, attention_mask, document_ids)
    visible = {full: visible_keys(config, full, positions, attention_mask, document_ids) for full in (True, False)}

    embedded = tensors["model.embed_tokens.weight"][ids]
    streams = torch.stack([embedded] * config.streams, -2)
    all_streams, attention_outputs, ffn_outputs, routing = [streams], [], [], {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        full, scale = config.is_full(layer), config.output_scale(layer)

        h_pre, h_post, mix = mhc_maps(config, tensors, prefix + "mhc_attn.", streams)
        x = rms_norm(mhc_read(streams, h_pre), tensors[prefix + "input_layernorm.weight"], eps)
        output = attention(config, tensors, prefix + "self_attn.", x, positions, visible[full], full)
        attention_outputs.append(output)
        streams = mhc_write(streams, output, h_post, mix)

        h_pre, h_post, mix = mhc_maps(config, tensors, prefix + "mhc_ffn.", streams)
        x = rms_norm(mhc_read(streams, h_pre), tensors[prefix + "post_attention_layernorm.weight"], eps)
        if config.is_moe(layer):
            output, routing[layer] = moe(config, tensors, prefix + "moe.", x, scale)
        else:
            output = mlp(config, tensors, prefix + "mlp.", x, scale)
        ffn_outputs.append(output)
        streams = mhc_write(streams, output, h_post, mix)
        all_streams.append(streams)

    hidden = rms_norm(streams.mean(-2), tensors["model.norm.weight"], eps)
    head = tensors["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    mtp_logits = []
    for layer in range(config.num_nextn_predict_layers):
        prefix = f"model.mtp_layers.{layer}."
        predicted = _mtp_layer(config, tensors, prefix, hidden, embedded, positions, visible[False])
        mtp_logits.append(linear(predicted, head))
    return Output(linear(hidden, head), mtp_logits, hidden, all_streams, attention_outputs, ffn_outputs, routing)


# §8: multi-token prediction


def _mtp_layer(
    config: Motif3Config,
    tensors: Tensors,
    prefix: str,
    hidden: Tensor,
    embedded: Tensor,
    positions: Tensor,
    visible: Tensor,
) -> Tensor:
    """From the final hidden (B, S, hidden) and embeddings (B, S, hidden) to (B, S - 1, hidden)."""
    # Reading (§8): each norm's eps is rms_norm_eps. Row t has token t's position and mask; a packed
    # document's last row takes in the next one's first token, and no other row sees it.
    eps = config.rms_norm_eps
    following = rms_norm(embedded[:, 1:], tensors[prefix + "embed_norm.weight"], eps)
    h = linear(torch.cat([hidden[:, :-1], following], -1), tensors[prefix + "input_proj.weight"])
    x = rms_norm(h, tensors[prefix + "input_layernorm.weight"], eps)
    visible = visible[:, :-1, :-1]
    h = h + attention(config, tensors, prefix + "self_attn.", x, positions[:, :-1], visible, full=False)
    x = rms_norm(h, tensors[prefix + "post_attention_layernorm.weight"], eps)
    h = h + mlp(config, tensors, prefix + "mlp.", x, config.output_scale(None))
    return rms_norm(h, tensors[prefix + "final_layernorm.weight"], eps)
