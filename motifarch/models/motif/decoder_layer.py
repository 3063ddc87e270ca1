"""A decoder layer of any Motif model, made as its config says."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from motifarch.field_types import is_import_path
from motifarch.layers import (
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    GroupedDifferentialLatentAttention,
    HyperConnections,
    MixtureOfExperts,
    MultiTokenPrediction,
    PolyNormMLP,
    RMSNorm,
    SoftmaxAttention,
    SwiGLUMLP,
    default_lambda_init,
)
from motifarch.models.motif import tensor_parallel as tensor_parallel  # makes its style known to transformers
from motifarch.models.motif.configuration_motif import MotifConfig
from motifarch.models.motif.own_attention import layer_class
from motifarch.models.motif.rotary import mtp_layer_type, softmax_scale


def build_attention(config: MotifConfig, layer_idx: int) -> Any:
    """The attention layer that ``config.attention_type`` names; past the last layer, that of
    multi-token prediction.
    """
    kind = config.layer_types[layer_idx] if layer_idx < config.num_hidden_layers else mtp_layer_type(config)
    common: dict[str, Any] = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "layer_idx": layer_idx,
        "window_size": config.window_of(kind),
    }
    if config.is_latent:
        assert config.q_lora_rank is not None  # checked by the config
        assert config.kv_lora_rank is not None
        assert config.qk_rope_head_dim is not None
        return GroupedDifferentialLatentAttention(
            config.hidden_size,
            **common,
            num_noise_heads=config.noise_heads,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            gate=config.attention_gate,
            norm_eps=config.rms_norm_eps,
            softmax_scale=softmax_scale(config, kind),
        )
    common |= {"qk_norm": config.qk_norm, "qk_norm_eps": config.rms_norm_eps, "bias": config.use_bias}
    if is_import_path(config.attention_type):
        own: Any = layer_class(config.attention_type)
        noise = {"num_noise_heads": config.noise_heads} if config.noise_heads else {}
        return own(config.hidden_size, **common, **noise)
    if config.attention_type == "softmax":
        return SoftmaxAttention(config.hidden_size, **common)
    differential: dict[str, Any] = {"num_noise_heads": config.noise_heads, "norm_eps": config.attn_rms_norm_eps}
    if config.attention_type == "diff_v2":
        return DifferentialAttentionV2(
            config.hidden_size, **common, **differential, gate=config.attention_gate, sub_norm=bool(config.sub_norm)
        )
    return GroupedDifferentialAttention(
        config.hidden_size,
        **common,
        **differential,
        paired_kv=config.has_paired_kv,
        sub_norm=config.sub_norm is not False,
        lambda_init=lambda_init_of(config, layer_idx),
    )


def lambda_init_of(config: MotifConfig, layer_idx: int) -> float:
    """The constant in a layer's lambda, with "gda" and "diff_v1"."""
    if config.lambda_init is not None:
        return float(config.lambda_init)
    offset = config.lambda_init_depth_offset
    if offset is None:
        offset = -1 if config.attention_type == "gda" else 0
    return default_lambda_init(layer_idx + offset)


def build_mlp(config: MotifConfig) -> nn.Module:
    """A dense feed-forward block."""
    size, width, bias = config.hidden_size, config.intermediate_size, config.use_bias
    if config.hidden_act != "poly_norm":
        return SwiGLUMLP(size, intermediate_size=width, bias=bias)
    return PolyNormMLP(size, intermediate_size=width, bias=bias, **_poly_norm_options(config))


def build_experts(config: MotifConfig) -> MixtureOfExperts:
    """A feed-forward block of routed and shared experts."""
    assert config.num_experts is not None
    assert config.experts_top_k is not None
    assert config.moe_intermediate_size is not None
    return MixtureOfExperts(
        config.hidden_size,
        num_experts=config.num_experts,
        top_k=config.experts_top_k,
        intermediate_size=config.moe_intermediate_size,
        num_shared_experts=config.num_shared_experts,
        activation=config.hidden_act,
        score_func=config.score_func,
        route_norm=config.route_norm,
        route_scale=config.route_scale,
        bias_clamp=config.polynorm_bias_clamp,
        hidden_clamp=config.hidden_clamp,
        **_poly_norm_options(config),
    )


def _poly_norm_options(config: MotifConfig) -> dict[str, Any]:
    return {
        "eps": config.poly_norm_eps,
        "sigmoid_weight": config.polynorm_sigmoid_weight,
        "output_scale": config.polynorm_output_scale,
    }


class MotifMultiTokenPrediction(GradientCheckpointingLayer, MultiTokenPrediction):
    """As motifarch.layers', with transformers' gradient checkpointing."""


def build_mtp(config: MotifConfig) -> MultiTokenPrediction:
    """What predicts the token after the next one: a plain layer with a dense feed-forward block."""
    attention = build_attention(config, config.num_hidden_layers)
    return MotifMultiTokenPrediction(
        config.hidden_size, attention=attention, mlp=build_mlp(config), norm_eps=config.rms_norm_eps
    )


def build_hyper_connections(config: MotifConfig) -> HyperConnections | None:
    """What joins a sublayer to the streams; None for a plain residual stream."""
    if not config.mhc_enabled:
        return None
    return HyperConnections(
        config.hidden_size,
        num_streams=config.mhc_expansion_rate,
        sinkhorn_iters=config.mhc_sinkhorn_iters,
        identity_init=config.mhc_identity_init,
        post_alpha=config.mhc_h_post_alpha_end,
    )


class MotifDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward block, each added to the residual stream or joined to
    the streams of hyper-connections.
    """

    def __init__(self, config: MotifConfig, layer_idx: int) -> None:
        super().__init__()
        attention = build_attention(config, layer_idx)
        # What functions of transformers' attention interface read of a module.
        attention.config, attention.is_causal = config, True
        kv_width = attention.num_kv_heads * attention.head_dim
        attention.num_key_value_groups = attention.num_heads * attention.v_head_dim // kv_width
        self.layer_type: str = config.layer_types[layer_idx]
        self.self_attn: nn.Module = attention
        # A dense block or experts, under the released models' names.
        self.moe = build_experts(config) if config.has_experts(layer_idx) else None
        self.mlp = build_mlp(config) if self.moe is None else None
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mhc_attn, self.mhc_ffn = build_hyper_connections(config), build_hyper_connections(config)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One layer.

        Args:
            hidden_states: (B, S, E); with hyper-connections (B, S, streams, E).
            position_embeddings: of this type of layer.
            **options: those of ``BaseAttention.forward``.

        Returns:
            A tensor like hidden_states; of experts in training mode also the losses of each token's
            sequence, (B, S, 2) float32.
        """

        def attend(x: Tensor) -> Tensor:
            attended = self.self_attn(self.input_layernorm(x), position_embeddings, **options)
            # With the maps, which transformers takes from the layer itself.
            return attended[0] if isinstance(attended, tuple) else attended  # type: ignore[no-any-return]

        def feed_forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            normed = self.post_attention_layernorm(x)
            if self.moe is None:
                assert self.mlp is not None
                return self.mlp(normed), None
            padding = options.get("padding")
            return tuple(self.moe(normed, padding=None if padding is None else padding.queries))  # type: ignore[return-value]

        if self.mhc_attn is None or self.mhc_ffn is None:
            hidden_states = hidden_states + attend(hidden_states)
            out, losses = feed_forward(hidden_states)
            hidden_states = hidden_states + out
        else:
            hidden_states = self.mhc_attn(hidden_states, attend)
            hidden_states, losses = self.mhc_ffn(hidden_states, feed_forward)
        return hidden_states if losses is None else (hidden_states, losses)
