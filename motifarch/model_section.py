"""The fields of a model with what each accepts: a recipe's section, and configs' ranges."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from motifarch.field_types import Heads, ImportPath, Layers, Length, Multiplier, NormEpsilon, Vocabulary, Width
from motifarch.typed_yaml import Section


@dataclass
class ModelSection(Section):
    """The model: fields of MotifConfig."""

    vocab_size: Vocabulary | None = None
    """Rows of the embedding; null takes the tokenizer's size, rounded up to `vocab_multiple`."""

    vocab_multiple: Width = 64
    """What a vocabulary size taken from the tokenizer is rounded up to."""

    hidden_size: Width = 256
    """Width of the residual stream."""

    intermediate_size: Width = 1024
    """Intermediate size of the feed-forward block."""

    num_hidden_layers: Layers = 6
    """Decoder layers."""

    num_attention_heads: Heads = 10
    """Query heads, signal and noise together."""

    num_noise_heads: Annotated[int, Field(ge=0, le=2**14)] | None = None
    """Noise heads among them; null means half of the heads."""

    num_key_value_heads: Heads | None = None
    """Key/value heads; null means as many as query heads."""

    head_dim: Annotated[int, Field(ge=1, le=2**14)] | None = None
    """Width of a query/key head; null means hidden_size / num_attention_heads."""

    attention_type: Literal["gda", "diff_v1", "diff_v2", "softmax", "gdla", "mla"] | ImportPath = "gda"
    """Grouped differential attention, DIFF V1, DIFF V2, or plain softmax attention; from latents
    `gdla` (Motif-3) and softmax `mla`; or the import path of one of your own.
    """

    paired_kv: bool | None = None
    """`gda`, `diff_v1`: keys in pairs for signal and noise, with values of twice head_dim; null
    means yes, false leaves ordinary key/value heads.
    """

    attention_gate: bool = False
    """`diff_v2`, `gdla`, `mla`: an elementwise sigmoid gate on the difference."""

    q_lora_rank: Width | None = None
    """`gdla`, `mla`: rank of the queries' latent."""

    kv_lora_rank: Width | None = None
    """`gdla`, `mla`: rank of the keys' and values' latent, which the cache holds."""

    qk_rope_head_dim: Annotated[int, Field(ge=2, le=2**14)] | None = None
    """`gdla`, `mla`: columns of a query/key head that are rotated, of head_dim."""

    v_head_dim: Annotated[int, Field(ge=1, le=2**14)] | None = None
    """`gdla`, `mla`: width of a value head; null takes the columns that are not rotated. It follows
    from head_dim with other types.
    """

    sub_norm: bool | None = None
    """RMS-normalise each head's output; null: yes for `gda` and `diff_v1`, no for `diff_v2`."""

    qk_norm: bool = False
    """RMS-normalise query and key heads."""

    lambda_init_depth_offset: Annotated[int, Field(ge=-1, le=2048)] | None = None
    """Added to the layer's index in lambda_init; null means -1 for `gda`, 0 for `diff_v1`."""

    lambda_init: Annotated[float, Field(ge=-1, lt=1)] | None = None
    """The constant of every layer's lambda with `gda` and `diff_v1`; null takes that by depth."""

    hidden_act: Literal["poly_norm", "silu"] = "poly_norm"
    """Activation of the feed-forward block: PolyNorm, or SiLU (SwiGLU)."""

    poly_norm_eps: NormEpsilon = 1e-6
    """PolyNorm's epsilon."""

    max_position_embeddings: Length = 4096
    """Longest sequence the model is meant for, in tokens."""

    rope_theta: Annotated[float, Field(gt=1, le=10**10)] = 10000.0
    """Base of the rotary position embedding."""

    rope_scaling: dict[str, bool | float | str | None] | None = None
    """Scaling as in a model's config.json: a `rope_type` (linear, yarn, llama3) and numbers."""

    rms_norm_eps: NormEpsilon = 1e-6
    """Epsilon of the layers' RMS norms."""

    attn_rms_norm_eps: NormEpsilon = 1e-5
    """Epsilon of the norm after the difference of the two attention maps."""

    tie_word_embeddings: bool = True
    """Whether the output projection is the embedding's matrix."""

    use_bias: bool = False
    """Whether linear layers have biases, as in models made of Qwen2's."""

    sliding_window: Length | None = None
    """Tokens that a token sees, itself included; used with `use_sliding_window`."""

    use_sliding_window: bool = False
    """Whether attention is limited to the sliding window."""

    sliding_window_period: Annotated[int, Field(ge=1, le=2048)] | None = None
    """Every so many layers, from the first, one has no window; null: all have it."""

    swa_rope_theta: Annotated[float, Field(gt=1, le=10**10)] | None = None
    """Base of the rotary position embedding in layers with a window; null: rope_theta and its
    scaling.
    """

    num_experts: Annotated[int, Field(ge=1, le=2**14)] | None = None
    """Routed experts of a layer; null for dense feed-forward blocks alone."""

    experts_top_k: Annotated[int, Field(ge=1, le=2**14)] | None = None
    """Experts that each token takes."""

    num_shared_experts: Annotated[int, Field(ge=0, le=2**10)] = 1
    """Experts that all tokens take, as one block of so many times the width."""

    moe_intermediate_size: Width | None = None
    """Intermediate size of an expert."""

    n_dense_first_layers: Annotated[int, Field(ge=0, le=2048)] = 0
    """Layers at the start without experts."""

    interleave_moe_layer_step: Annotated[int, Field(ge=1, le=2048)] = 1
    """Of the others, each so manyth has experts."""

    route_norm: bool = True
    """Divide the weights of a token's experts by their sum."""

    route_scale: Multiplier = 1.0
    """Multiplies them."""

    polynorm_sigmoid_weight: bool = False
    """PolyNorm's weights are the sigmoid of its parameters."""

    polynorm_output_scale: Multiplier = 1.0
    """Multiplies PolyNorm times up."""

    polynorm_bias_clamp: Multiplier | None = None
    """Bound of the bias in the routed experts' PolyNorm; null for none."""

    hidden_clamp: Annotated[float, Field(ge=1e-3, le=10**9)] | None = None
    """Bound of the routed experts' hidden values; null for none."""

    mhc_enabled: bool = False
    """Hyper-connections around each sublayer in place of a residual stream."""

    mhc_expansion_rate: Annotated[int, Field(ge=1, le=64)] = 4
    """Streams of the hyper-connections."""

    mhc_sinkhorn_iters: Annotated[int, Field(ge=1, le=1000)] = 20
    """Normalisations of the matrix that mixes the streams."""

    mhc_identity_init: bool = False
    """Start as a plain pre-norm model."""

    mhc_h_post_alpha_end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A sublayer's output is multiplied by up to 1 + this, at the end of training."""

    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=1)] = 0
    """1 for a layer that predicts the token after the next one (multi-token prediction)."""

    initializer_range: Annotated[float, Field(ge=1e-10, le=1)] = 0.02
    """Standard deviation of the first weights."""

    attn_implementation: Literal["auto", "triton", "cpu", "flash_attention_2", "sdpa", "eager"] | None = None
    """Which attention carries the model: "triton" is one fused kernel, "cpu" blocked products,
    "flash_attention_2" any flash-attn, "sdpa" torch's, "eager" the plain formula; null or "auto"
    the fastest that serves.
    """
