"""The Motif models in one file, for transformers and PyTorch alone: grouped differential attention
and PolyNorm.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Sources: differential attention (DIFF V1, arXiv 2410.05258), grouped differential attention
(arXiv 2510.06949), DIFF V2 (Microsoft, January 2026), PolyNorm (arXiv 2411.03884). With motifarch
installed, ``import motifarch.models`` first: its own classes, which compute the same faster, then
load the folder instead.

Shapes: B batch, S tokens, E hidden size, D query/key head width, Dv value head width, Hs signal and
Hn noise heads.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import TransformersKwargs, can_return_tuple

PositionEmbeddings = tuple[Tensor, Tensor]

_LATER = (
    *("attention_cls", "kv_lora_rank", "num_experts", "mhc_enabled", "num_nextn_predict_layers"),
    *("sliding_window_period", "swa_rope_theta", "polynorm_sigmoid_weight", "polynorm_output_scale"),
)


def check_generation(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a config's fields that Motif-3 has, which this code does not compute."""
    later = [name for name in _LATER if fields.get(name)]
    if later:
        raise ValueError(
            f"the config has {', '.join(f'{name}={fields[name]!r}' for name in later)}, and this code is of the models "
            "before Motif-3; install motifarch, which has them (import motifarch.models)"
        )


class MotifConfig(PreTrainedConfig):
    """Configuration of a Motif model.

    Args:
        num_attention_heads: query heads, signal and noise together.
        num_key_value_heads: None means num_attention_heads.
        head_dim: d; None means hidden_size // num_attention_heads.
        num_noise_heads: None means half of the heads.
        attention_type: "gda", "diff_v1" (one noise head for each signal head), "diff_v2" or
            "softmax".
        paired_kv: keys in pairs, one for signal and one for noise, and values of width 2D; None
            means yes for "gda" and "diff_v1".
        attention_gate: with "diff_v2", an elementwise sigmoid gate on the difference.
        sub_norm: RMS-normalise each head's output; None means yes for "gda" and "diff_v1".
        lambda_init: the constant of every layer's lambda; None means the one by depth.
        lambda_init_depth_offset: added to the layer's index for that depth; None means -1 for
            "gda", 0 for "diff_v1".
        sliding_window: tokens a query sees, itself included, if use_sliding_window.
    """

    model_type = "Motif"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 219_520
    hidden_size: int = 4096
    intermediate_size: int = 16_384
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_noise_heads: int | None = None
    attention_type: str = "gda"
    paired_kv: bool | None = None
    attention_gate: bool = False
    sub_norm: bool | None = None
    qk_norm: bool = False
    lambda_init: float | int | None = None
    lambda_init_depth_offset: int | None = None
    hidden_act: str = "poly_norm"
    poly_norm_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    attn_rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32_768
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    use_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields.

        Raises:
            ValueError: a field of a later generation.
        """
        check_generation(kwargs)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_noise_heads is None or self.attention_type == "diff_v1":
            self.num_noise_heads = self.num_attention_heads // 2
        static_lambda = self.attention_type in ("gda", "diff_v1")
        self.paired_kv = static_lambda if self.paired_kv is None else self.paired_kv
        self.sub_norm = static_lambda if self.sub_norm is None else self.sub_norm
        self.layer_types = [self.mask_kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def mask_kind(self) -> str:
        """What transformers calls the masks of all layers."""
        windowed = self.use_sliding_window and self.sliding_window is not None
        return "sliding_attention" if windowed else "full_attention"


class PolyNorm(nn.Module):
    """``w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`` with ``n(z) = z / sqrt(mean(z^2) + eps)``, in float32
    (not rounded).
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Takes x (..., N), gives (..., N)."""
        x = _wide(x)
        w0, w1, w2 = self.weight.to(x.dtype)
        return w0 * self._scaled(x**3) + w1 * self._scaled(x**2) + w2 * self._scaled(x) + self.bias.to(x.dtype)

    def _scaled(self, z: Tensor) -> Tensor:
        # Divided before the sum: sixth powers of large inputs would overflow it.
        return z * torch.rsqrt((z.square() / z.shape[-1]).sum(dim=-1, keepdim=True) + self.eps)


class SubNorm(nn.RMSNorm):
    """RMSNorm in its input's dtype, whatever its weight's."""

    def forward(self, x: Tensor) -> Tensor:
        """Takes x (..., N), gives (..., N)."""
        return F.rms_norm(x, tuple(self.normalized_shape), self.weight.to(x.dtype), self.eps)


class MotifMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` with PolyNorm or SiLU."""

    def __init__(self, config: MotifConfig) -> None:
        super().__init__()
        size, width, bias = config.hidden_size, config.intermediate_size, config.use_bias
        self.gate_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = nn.Linear(width, size, bias=bias)
        self.act_fn = PolyNorm(config.poly_norm_eps) if config.hidden_act == "poly_norm" else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Takes x (B, S, E), gives (B, S, E)."""
        up = self.up_proj(x)
        return self.down_proj((self.act_fn(self.gate_proj(x)) * up).to(up.dtype))


class MotifRotaryEmbedding(nn.Module):
    """Cosines and sines of each position's angles: float64 for a float64 model, else float32."""

    def __init__(self, config: MotifConfig) -> None:
        super().__init__()
        parameters = config.rope_parameters or {}
        kind, self._theta = parameters.get("rope_type", "default"), parameters.get("rope_theta", 10_000.0)
        assert config.head_dim is not None  # filled in by the config
        self._head_dim, self._inv_freq, self._scaling = config.head_dim, None, 1.0
        if kind == "default":
            return
        # No buffer: it would be lost on the meta device and rounded by model.bfloat16().
        with torch.device("cpu"):
            self._inv_freq, self._scaling = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
            if kind == "yarn":
                self._inv_freq = _yarn_frequencies(config)
                # vLLM's keys; its factor multiplies the usual one, or stands alone.
                own, usual = parameters.get("attn_factor") or 1.0, parameters.get("apply_yarn_scaling") is not False
                self._scaling = self._scaling * own if usual else own

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> PositionEmbeddings:
        """Positions (B or 1, S) and the model's dtype -> two tables (B or 1, 1, S, D / 2)."""
        dtype = torch.promote_types(dtype, torch.float32)
        if self._inv_freq is None:
            exponents = torch.arange(0, self._head_dim, 2, device=position_ids.device, dtype=dtype) / self._head_dim
            inv_freq = self._theta**-exponents
        else:
            self._inv_freq = self._inv_freq.to(position_ids.device)
            inv_freq = self._inv_freq.to(dtype)
        angles = position_ids[:, None, :, None].to(dtype) * inv_freq
        return angles.cos() * self._scaling, angles.sin() * self._scaling


def _yarn_frequencies(config: MotifConfig) -> Tensor:
    """YaRN's inverse frequencies (arXiv 2309.00071, section 3.2), (D / 2,) float64: transformers'
    own are float32, whose rounding shows at far positions.
    """
    parameters, width = config.rope_parameters or {}, config.head_dim
    assert width is not None  # filled in by the config
    theta, length = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or config.max_position_embeddings / length

    def pair_turning(times: float) -> float:
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(parameters.get("beta_fast") or 32), pair_turning(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float64)
    frequencies = theta ** (-2 * pairs / width)
    slowed = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / factor * slowed


class MotifAttention(nn.Module):
    """``softmax(Q1 K1^T) V - lambda softmax(Q2 K2^T) V``, then sub-norm or gate; or plain softmax
    attention.

    Query heads lie as Hn blocks of [Hs / Hn signal heads, 1 noise head]. All of them go through one
    call of transformers' attention interface, and the difference is taken of what it gives.
    """

    is_causal = True

    def __init__(self, config: MotifConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.kind, self.paired = config.attention_type, config.paired_kv
        heads, kv_heads, noise_heads = config.num_attention_heads, config.num_key_value_heads, config.num_noise_heads
        width = config.head_dim
        assert width is not None  # these three are filled in by the config
        assert kv_heads is not None
        assert noise_heads is not None
        self.head_dim, self.v_head_dim = width, 2 * width if self.paired else width
        self.scaling = width**-0.5
        self.num_key_value_groups = heads * self.v_head_dim // (kv_heads * width)
        self.sliding_window = config.sliding_window if config.use_sliding_window else None
        self.block = 1 if self.kind == "softmax" else heads // noise_heads
        signal_heads = heads if self.kind == "softmax" else heads - noise_heads
        size, bias = config.hidden_size, config.use_bias
        self.q_proj = nn.Linear(size, heads * width, bias=bias)
        self.k_proj = nn.Linear(size, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(size, kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(signal_heads * self.v_head_dim, size, bias=bias)
        self.q_norm = nn.RMSNorm(width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.lambda_init, self.gate_proj, self.subln = 0.0, None, None
        if self.kind == "softmax":
            return
        if self.kind == "diff_v2":
            self.lambda_proj = nn.Linear(size, signal_heads, bias=False)
            if config.attention_gate:
                self.gate_proj = nn.Linear(size, signal_heads * width, bias=False)
        else:
            self.lambda_init = _lambda_init(config, layer_idx)
            self.lambda_q1 = nn.Parameter(0.1 * torch.randn(width))
            self.lambda_k1 = nn.Parameter(0.1 * torch.randn(width))
            self.lambda_q2 = nn.Parameter(0.1 * torch.randn(width))
            self.lambda_k2 = nn.Parameter(0.1 * torch.randn(width))
        if config.sub_norm:
            self.subln = SubNorm(self.v_head_dim, eps=config.attn_rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> Tensor:
        """hidden_states (B, S, E), attention_mask as the attention interface takes it, and further
        options for it -> (B, S, E).
        """
        query = self.q_norm(self._heads(self.q_proj(hidden_states), self.head_dim))
        key = self.k_norm(self._heads(self.k_proj(hidden_states), self.head_dim))
        query, key = _rotate(query, position_embeddings), _rotate(key, position_embeddings)
        key = self._heads(key.transpose(1, 2).flatten(2), self.v_head_dim)  # of a pair, k1 and k2 side by side
        value = self._heads(self.v_proj(hidden_states), self.v_head_dim)
        if self.paired:
            query = self._beside_zeros(query)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        elif (cache := options.pop("cache", None)) is not None:
            key, value = self._update_paged(cache, key, value, options)
        implementation = str(self.config._attn_implementation).removeprefix("paged|")  # the cache is up to date
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager_attention)
        out, _ = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **options,
        )
        out = out.reshape(*hidden_states.shape[:-1], -1, self.v_head_dim)
        if self.kind != "softmax":
            out = self._difference(hidden_states, out)
        return self.o_proj(out.flatten(2).to(hidden_states.dtype))

    def _beside_zeros(self, query: Tensor) -> Tensor:
        """Queries (B, H, S, D) of width 2D, for keys that are k1 and k2 side by side: signal heads
        have zeros for k2, noise heads for k1.
        """
        signal, noise = query.unflatten(1, (-1, self.block)).split((self.block - 1, 1), dim=2)
        width = self.head_dim
        return torch.cat((F.pad(signal, (0, width)), F.pad(noise, (width, 0))), dim=2).flatten(1, 2)

    def _update_paged(self, cache: Any, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values, with those that continuous batching's cache holds: heads of head_dim, as
        it reads in the config.
        """
        key, value = (self._heads(x.transpose(1, 2).flatten(2), self.head_dim) for x in (key, value))
        key, value = cache.update(key_states=key, value_states=value, layer_idx=self.layer_idx, kwargs=options)
        for name in ("k_cache", "v_cache"):  # of a kernel that writes into it: a view, never a copy
            if options.get(name) is not None:
                options[name] = options[name].view(*options[name].shape[:-2], -1, self.v_head_dim)
        key, value = (self._heads(x.transpose(1, 2).flatten(2), self.v_head_dim) for x in (key, value))
        return key, value

    def _difference(self, hidden_states: Tensor, out: Tensor) -> Tensor:
        """Of all heads' outputs (B, S, H, Dv), signal minus noise and what follows, (B, S, Hs, Dv),
        in float32.
        """
        signal, noise = _wide(out).unflatten(2, (-1, self.block)).split((self.block - 1, 1), dim=3)
        out = (signal - self._lambda(hidden_states) * noise).flatten(2, 3)
        if self.subln is not None:
            out = self.subln(out) * (1.0 - self.lambda_init)
        if self.gate_proj is not None:
            out = out * torch.sigmoid(_wide(self.gate_proj(hidden_states).unflatten(-1, (-1, self.v_head_dim))))
        return out

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        """A scalar of the layer, or with "diff_v2" one for each token and signal head,
        (B, S, Hn, Hs / Hn, 1).
        """
        if self.kind == "diff_v2":
            lam = torch.sigmoid(_wide(self.lambda_proj(hidden_states)))
            return lam.unflatten(-1, (-1, self.block - 1))[..., None]
        first = (_wide(self.lambda_q1) * _wide(self.lambda_k1)).sum()
        second = (_wide(self.lambda_q2) * _wide(self.lambda_k2)).sum()
        return first.exp() - second.exp() + self.lambda_init

    @staticmethod
    def _heads(x: Tensor, width: int) -> Tensor:
        """Takes x (B, S, heads * width), gives (B, heads, S, width)."""
        return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """Float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _lambda_init(config: MotifConfig, layer_idx: int) -> float:
    if config.lambda_init is not None:
        return float(config.lambda_init)
    offset = config.lambda_init_depth_offset
    if offset is None:
        offset = -1 if config.attention_type == "gda" else 0  # the released checkpoints count from -1, the paper from 0
    return 0.8 - 0.6 * math.exp(-0.3 * (layer_idx + offset))


def _rotate(x: Tensor, position_embeddings: PositionEmbeddings) -> Tensor:
    cos, sin = position_embeddings
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, S, D) by maps (B, H, S, keys), with a mask that is added: what it gives
    is (B, S, H, Dv), and the maps.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    maps = F.softmax(_wide(logits), dim=-1).to(query.dtype)
    return (maps @ value).transpose(1, 2), maps


# What transformers, its losses and tokenizers hand on, and no attention need read.
_READ_ELSEWHERE = frozenset(TransformersKwargs.__annotations__) | {
    "cache_position",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "token_type_ids",
    "tokenizer",
}


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Raises for what would change the result, and is not computed here."""
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _READ_ELSEWHERE]
    unknown += ["output_attentions"] if kwargs.get("output_attentions") else []
    unknown += ["is_causal"] if kwargs.get("is_causal") is False else []
    if unknown:
        raise ValueError(f"{', '.join(unknown)} was given, which this model does not have; leave it out")


def _packed_positions(
    shape: tuple[int, ...], attention_mask: Any, position_ids: Tensor | None, cu_seq_lens_q: Tensor | None
) -> Tensor | None:
    """Positions (B, S) that restart at each packed document; None if none are packed."""
    if cu_seq_lens_q is not None:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("cu_seq_lens_q and an attention_mask with padding were both given; give one")
        starts, place = cu_seq_lens_q.long(), torch.arange(math.prod(shape), device=cu_seq_lens_q.device)
        return (place - starts[torch.searchsorted(starts, place, right=True) - 1]).view(shape)
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if attention_mask is not None or position_ids is None or recorded or bool((position_ids.diff() == 1).all()):
        return None
    return position_ids.expand(shape)


def _shifted(labels: Tensor, packed: Tensor | None, attention_mask: Any) -> Tensor:
    """Each position's next token, but none for padding and a row's or document's last."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    if packed is not None:
        shifted[:, :-1].masked_fill_(packed.diff() != 1, -100)
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        shifted.masked_fill_(attention_mask[:, -shifted.shape[1] :] == 0, -100)
    return shifted


class MotifDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward block, each added to the residual stream."""

    def __init__(self, config: MotifConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MotifAttention(config, layer_idx)
        self.mlp = MotifMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> Tensor:
        """hidden_states (B, S, E) -> (B, S, E); options are the attention interface's."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(
            normed, position_embeddings, attention_mask, past_key_values, **options
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MotifPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every Motif model."""

    config_class = MotifConfig
    config: MotifConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MotifDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, MotifAttention) and module.kind in ("gda", "diff_v1"):
            for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(vector, mean=0.0, std=0.1)


class MotifModel(MotifPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: MotifConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MotifDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MotifRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, S, E) of input_ids (B, S) or inputs_embeds (B, S, E), after what the
        cache holds.

        Packed documents are given by their bounds, cu_seq_lens_q (documents + 1,), or by
        position_ids that restart.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, padding together with packed
                documents, or an argument that nothing here reads.
        """
        served = self._is_served(kwargs)
        if not served:
            _check_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        packed = None
        if past_key_values is None and not served:
            packed = _packed_positions(hidden_states.shape[:2], attention_mask, position_ids, cu_seq_lens_q)
        if packed is not None:
            attention_mask, position_ids = None, packed
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen)[None]
        mask: Any = attention_mask
        options = {"position_ids": position_ids}
        if served:
            options |= kwargs | {"cu_seq_lens_q": cu_seq_lens_q}
        else:
            mask = self._mask(hidden_states, attention_mask, position_ids, past_key_values)
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)
        every = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, mask, past_key_values, **options)
            every.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*every[:-1], hidden_states) if wanted else None,
        )

    def _is_served(self, options: dict[str, Any]) -> bool:
        """Whether a server's own cache and batch are behind the attention interface: transformers'
        continuous batching, or vLLM.
        """
        return options.get("cache") is not None or self.config._attn_implementation == "vllm"

    def _mask(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
    ) -> Tensor | None:
        """(B, 1, S, keys) of what each token sees; None where that is all up to itself."""
        kind = self.config.mask_kind
        if isinstance(attention_mask, dict):  # generate() makes it for a cache of fixed size
            return attention_mask[kind]
        make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        return make(  # type: ignore[return-value]  # a BlockMask is for another implementation
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )


class MotifForCausalLM(MotifPreTrainedModel, GenerationMixin):
    """A Motif model with its language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MotifConfig) -> None:
        super().__init__(config)
        self.model = MotifModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, vocabulary), of the last ``logits_to_keep`` tokens alone if it is not 0,
        and labels' mean loss.

        Labels (B, S) are aligned with input_ids, -100 for none, and shifted here, but never across
        packed documents or out of padding; ``shift_labels`` are taken as they are.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss, shift_labels = None, kwargs.get("shift_labels")
        if labels is not None and shift_labels is None:
            packed = None
            if past_key_values is None:
                packed = _packed_positions(labels.shape, attention_mask, position_ids, cu_seq_lens_q)
            shift_labels = _shifted(labels, packed, attention_mask)
        if shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                shift_labels=shift_labels,
            )
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states)


# Trainer's label smoothing shifts labels for the class names in this table alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["MotifForCausalLM"] = "MotifForCausalLM"

# `transformers serve` looks an architecture's class up among transformers' own. That module exists
# twice, for transformers imports itself anew to make docstrings; both are of one class. motifarch's
# own class, where it is imported, stays.
if type(transformers).__module__.startswith("transformers.") and not hasattr(transformers, "MotifForCausalLM"):
    type(transformers).MotifForCausalLM = MotifForCausalLM  # type: ignore[attr-defined]
