"""Configuration of the Motif models: the released fields, and those of variants."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from motifarch.auto_map import AutoMapMixin
from motifarch.field_types import is_import_path
from motifarch.layers import SoftmaxAttention
from motifarch.layers.head_counts import check_heads
from motifarch.models.motif.own_attention import layer_class
from motifarch.models.motif.released_fields import read_released, write_released
from motifarch.models.motif.rope_fields import latent_parameters, with_standard_names
from motifarch.models.motif.unsupported import (
    check_latent,
    check_layer_types,
    check_not_latent,
    check_ranges,
    check_rope_agrees,
    check_sparse,
    check_supported,
)

MODEL_TYPES = ("Motif", "motif")
"""A folder's ``model_type``: the released ones say "Motif", and "motif" is accepted as well."""

PAIRED_TYPES = ("gda", "diff_v1")
"""Attention types whose lambda is a parameter of the layer, and whose keys may come in pairs."""

LATENT_TYPES = ("gdla", "mla")
"""Attention types whose queries, keys and values come from low-rank latents."""

FULL, WINDOW = "full_attention", "sliding_attention"
"""transformers' names of layers that see all tokens, and of those with a window."""

SHARED_STYLE = "motif_shared"
"""Name of the style of tensor parallelism that is ours: see `tensor_parallel.py`."""


def tensor_parallel_plan(config: "MotifConfig") -> dict[str, str]:
    """Styles of transformers: heads, feed-forward columns and the vocabulary are shared."""
    if config.attention_type in LATENT_TYPES or config.num_experts or config.mhc_enabled:
        return {}
    plan = {"embed_tokens": "embedding_rowwise", "layers.*.self_attn": SHARED_STYLE}
    columns = ["q_proj", "k_proj", "v_proj"]
    if config.attention_type == "diff_v2":
        columns += ["lambda_proj", "gate_proj"] if config.attention_gate else ["lambda_proj"]
    plan |= {f"layers.*.self_attn.{name}": "colwise" for name in columns}
    plan |= {f"layers.*.mlp.{name}": "colwise" for name in ("gate_proj", "up_proj")}
    if config.hidden_act == "poly_norm":
        plan["layers.*.mlp.act_fn"] = SHARED_STYLE
    return plan | {"layers.*.self_attn.o_proj": "rowwise", "layers.*.mlp.down_proj": "rowwise"}


@strict
class MotifConfig(AutoMapMixin, PreTrainedConfig):
    """Configuration of a Motif model. The defaults are Motif-2-12.7B's.

    Args:
        vocab_size: vocabulary size (tokens).
        hidden_size: e.
        intermediate_size: width of the feed-forward block.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads, signal and noise together.
        num_key_value_heads: key/value heads; with paired_kv they come in pairs. Default:
            num_attention_heads.
        head_dim: width D of a query/key head; default hidden_size // num_attention_heads.
        num_noise_heads: noise heads; None means half of the heads.
        attention_type: "gda", "diff_v1" (one noise head for each signal head), "diff_v2",
            "softmax"; with latents "gdla" (Motif-3) or "mla" (softmax); or the import path of one
            that `motifarch.models.register_attention` was told of.
        paired_kv: whether keys come in pairs, one for signal and one for noise, with values of
            twice head_dim; false leaves ordinary key/value heads and their cache. None means yes
            for "gda" and "diff_v1"; no other type has pairs.
        attention_gate: with "diff_v2", "gdla" and "mla", an elementwise sigmoid gate on the
            difference. The released files' ``elementwise_attn_output_gate`` is accepted.
        sub_norm: RMS-normalise each head's output; None means yes for "gda" and "diff_v1", no for
            "diff_v2".
        qk_norm: RMS-normalise query and key heads.
        lambda_init_depth_offset: added to the layer index (from 0) in
            ``0.8 - 0.6 exp(-0.3 depth)``; None means -1 for "gda", which is how the released
            checkpoints count, and 0 for "diff_v1", the paper's count.
        lambda_init: the constant of every layer's lambda with "gda" and "diff_v1", instead of the
            one by depth.
        hidden_act: "poly_norm" (PolyNorm times up) or "silu" (SwiGLU).
        poly_norm_eps: PolyNorm's epsilon.
        rms_norm_eps: epsilon of the layer norms.
        attn_rms_norm_eps: epsilon of the sub-norm.
        max_position_embeddings: positions the model was made for.
        rope_parameters: transformers' rotary parameters; the released files' ``rope_theta`` and
            ``rope_scaling`` are accepted.
        sliding_window: tokens a query sees, itself included; with latent attention it is one more,
            as Motif-3 counts. Used if use_sliding_window.
        use_sliding_window: switch for sliding_window, in all layers or those that the period
            leaves.
        sliding_window_period: every so many layers, from the first, one sees all tokens; None for
            none.
        swa_rope_theta: theta of layers with a window, which then have no other rotary scaling; None
            means those of all layers.
        q_lora_rank: rank of the queries' latent, with "gdla" and "mla".
        kv_lora_rank: rank of the keys' and values' latent.
        qk_rope_head_dim: columns of a query/key head that are rotated: its last ones.
        v_head_dim: width of a value head; default the columns that are not rotated. Of other types
            it follows from head_dim.
        num_experts: experts of a layer; None for dense feed-forward blocks alone.
        experts_top_k: of which each token takes so many.
        num_shared_experts: and all tokens these, as one feed-forward block of so many times the
            width.
        moe_intermediate_size: width of an expert.
        n_dense_first_layers: layers at the start without experts.
        interleave_moe_layer_step: of the others, each so manyth has experts.
        score_func: what makes scores of the router's logits: "sigmoid".
        route_norm: divide a token's weights by their sum.
        route_scale: multiplies them.
        polynorm_sigmoid_weight: PolyNorm's weights are the sigmoid of its parameters.
        polynorm_output_scale: multiplies PolyNorm's product, before the down projection.
        polynorm_bias_clamp: bound of the routed experts' PolyNorm bias.
        hidden_clamp: bound of the routed experts' hidden values.
        mhc_enabled: hyper-connections around each sublayer in place of a residual stream.
        mhc_expansion_rate: streams.
        mhc_sinkhorn_iters: normalisations of the matrix that mixes them.
        mhc_identity_init: start as a plain pre-norm model.
        mhc_h_post_alpha_end: a sublayer's output is multiplied by up to 1 + this.
        num_nextn_predict_layers: 1 for a layer that predicts the token after the next one.
        use_bias: biases in the linear layers.
        tie_word_embeddings: share the embedding with the output projection.
        initializer_range: standard deviation of the initial weights.
        k_ratio: a field of the released files; only 1 is supported.
        attention_dropout: only 0 is supported.
        use_cache: keep keys and values in generation.

    Raises:
        ValueError: heads that do not divide, or a field, other models' included, that asks for what
            no layer computes.
    """

    model_type = "Motif"
    default_theta = 1_000_000.0
    keys_to_ignore_at_inference = ["past_key_values", "z_loss"]

    vocab_size: int = 219_520
    hidden_size: int = 4096
    intermediate_size: int = 16_384
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 16
    head_dim: int | None = 128
    num_noise_heads: int | None = 8
    attention_type: str = "gda"
    paired_kv: bool | None = None
    attention_gate: bool = False
    sub_norm: bool | None = None
    qk_norm: bool = False
    lambda_init_depth_offset: int | None = None
    lambda_init: float | int | None = None
    hidden_act: str = "poly_norm"
    poly_norm_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    attn_rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32_768
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    sliding_window_period: int | None = None
    swa_rope_theta: float | int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_experts: int | None = None
    experts_top_k: int | None = None
    num_shared_experts: int = 1
    moe_intermediate_size: int | None = None
    n_dense_first_layers: int = 0
    interleave_moe_layer_step: int = 1
    score_func: str = "sigmoid"
    route_norm: bool = True
    route_scale: float | int = 1.0
    polynorm_sigmoid_weight: bool = False
    polynorm_output_scale: float | int = 1.0
    polynorm_bias_clamp: float | int | None = None
    hidden_clamp: float | int | None = None
    mhc_enabled: bool = False
    mhc_expansion_rate: int = 4
    mhc_sinkhorn_iters: int = 20
    mhc_identity_init: bool = False
    mhc_h_post_alpha_end: float | int = 0.0
    num_nextn_predict_layers: int = 0
    use_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    k_ratio: float | int | None = 1
    attention_dropout: float | int | None = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields."""
        for name, value in read_released(kwargs).items():
            setattr(self, name, value)
        check_ranges(vars(self))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._fill_v_head_dim()
        layer_types = kwargs.pop("layer_types", None)
        check_rope_agrees(self.rope_parameters, kwargs)
        # Copies, for transformers fills them in. It takes the older field alone, if it is there.
        if kwargs.get("rope_scaling"):
            kwargs["rope_scaling"] = self._standard_rope((self.rope_parameters or {}) | kwargs["rope_scaling"])
        if self.rope_parameters is not None:
            self.rope_parameters = self._standard_rope(self.rope_parameters)
        # Of the instance, for it depends on the fields; transformers does not save it.
        self.base_model_tp_plan = tensor_parallel_plan(self)  # type: ignore[misc]
        super().__post_init__(**kwargs)
        # transformers validates as well, but wraps the ValueError in an error of another kind.
        self.validate_architecture()
        check_layer_types(vars(self), layer_types, self.layer_types)

    @classmethod
    def get_config_dict(cls, *arguments: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """A folder's fields, and the options that are left over, as transformers reads them."""
        fields, unused = super().get_config_dict(*arguments, **options)
        if fields.get("model_type") == cls.model_type.lower():
            fields["model_type"] = cls.model_type  # transformers would warn of a model of another kind
        return fields, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from a saved one.

        Heads that it does not name follow from its other fields, not from 12.7B's; a theta that it
        does not name is 10,000, as for every reader of such files.
        """
        absent: dict[str, Any] = dict.fromkeys(("num_noise_heads", "num_key_value_heads", "head_dim"))
        if not any("rope_theta" in (fields or {}) for fields in (config_dict, config_dict.get("rope_parameters"))):
            absent["rope_theta"] = 10_000.0
        return super().from_dict(absent | config_dict | {"model_type": cls.model_type}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields; rotary parameters under the released files' names too."""
        output = super().to_dict()
        parameters = dict(output.get("rope_parameters") or {})
        output["rope_theta"] = parameters.pop("rope_theta", self.default_theta)
        output["rope_scaling"] = parameters if parameters.get("rope_type", "default") != "default" else None
        output["layer_types"] = self.layer_types
        return write_released(output, self)

    def _standard_rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Rotary parameters in transformers' words."""
        if self.is_latent:
            parameters = latent_parameters(parameters)
        return with_standard_names(parameters, self.max_position_embeddings)

    def _fill_v_head_dim(self) -> None:
        """Set the width of a value head where it follows from others."""
        assert self.head_dim is not None
        if self.is_latent:
            if self.v_head_dim is None and self.qk_rope_head_dim is not None:
                self.v_head_dim = self.head_dim - self.qk_rope_head_dim
        else:
            self.v_head_dim = 2 * self.head_dim if self.has_paired_kv else self.head_dim

    @property
    def is_latent(self) -> bool:
        """Whether attention is over latents."""
        return self.attention_type in LATENT_TYPES

    @property
    def noise_heads(self) -> int:
        """Noise heads, with the default filled in; 0 for softmax attention."""
        if self.attention_type in ("softmax", "mla"):
            return 0
        if is_import_path(self.attention_type):
            return 0 if issubclass(layer_class(self.attention_type), SoftmaxAttention) else self.num_noise_heads or 0
        if self.num_noise_heads is None or self.attention_type == "diff_v1":
            return self.num_attention_heads // 2
        return self.num_noise_heads

    @property
    def has_paired_kv(self) -> bool:
        """Whether key/value heads come in pairs, with the default filled in."""
        if self.paired_kv is None:
            return self.attention_type in PAIRED_TYPES
        return self.paired_kv

    @property
    def value_width(self) -> int | None:
        """The name of ``v_head_dim`` in 0.1.0, deprecated."""
        return self.v_head_dim

    @property
    def rotary_dim(self) -> int:
        """Columns of a query/key head that are rotated."""
        width = self.qk_rope_head_dim if self.is_latent else self.head_dim
        assert width is not None  # filled in by __post_init__
        return width

    @property
    def layer_types(self) -> list[str]:
        """Of each layer, in transformers' words, what its caches read; without it they would take
        sliding_window as used.
        """
        if not self.use_sliding_window or self.sliding_window is None:
            return [FULL] * self.num_hidden_layers
        period = self.sliding_window_period
        return [WINDOW if period is None or i % period else FULL for i in range(self.num_hidden_layers)]

    def window_of(self, layer_type: str) -> tuple[int, int]:
        """The inclusive (left, right) window of the attention functions, in layers of a type."""
        if layer_type == FULL:
            return (-1, -1)
        assert self.sliding_window is not None
        return (self.sliding_window if self.is_latent else self.sliding_window - 1, 0)

    @property
    def windows(self) -> list[tuple[int, int]]:
        """The window of each layer."""
        return [self.window_of(kind) for kind in self.layer_types]

    def has_experts(self, layer_idx: int) -> bool:
        """Whether a layer's feed-forward block is a mixture of experts."""
        after = layer_idx - self.n_dense_first_layers
        return bool(self.num_experts) and after >= 0 and after % self.interleave_moe_layer_step == 0

    def validate_architecture(self) -> None:
        """Check that the layers can compute it; transformers calls this when a config is made."""
        check_ranges(vars(self))
        check_supported(vars(self))
        self._fill_v_head_dim()
        check_sparse(self)
        if self.use_sliding_window and (self.sliding_window or 0) < 1:
            raise ValueError(
                f"use_sliding_window is on but sliding_window={self.sliding_window}; give at least 1 token"
            )
        assert self.num_key_value_heads is not None  # filled in by __post_init__
        assert self.head_dim is not None
        if self.is_latent:
            check_latent(self)
        else:
            check_not_latent(self)
        if not self.is_latent and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs")
        if self.attention_type not in PAIRED_TYPES:
            only = f"with attention_type {' and '.join(PAIRED_TYPES)} only, not {self.attention_type!r}; leave it null"
            if self.paired_kv:
                raise ValueError(f"paired_kv is on, but keys come in pairs {only}")
            if self.lambda_init is not None:
                raise ValueError(f"lambda_init={self.lambda_init} works {only}")
        if self.lambda_init is not None and self.lambda_init_depth_offset is not None:
            raise ValueError(
                f"lambda_init={self.lambda_init} and lambda_init_depth_offset={self.lambda_init_depth_offset} are both "
                "given; give the constant or where its depth is counted from"
            )
        if self.attention_type in ("softmax", "mla"):
            if self.attention_gate and self.attention_type == "softmax":
                raise ValueError("attention_gate works with attention_type 'diff_v2', 'gdla' and 'mla' only")
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                    f"num_key_value_heads={self.num_key_value_heads}"
                )
            return
        if is_import_path(self.attention_type):  # its class checks its heads
            return
        if self.attention_type == "diff_v1" and self.num_noise_heads not in (None, self.num_attention_heads // 2):
            raise ValueError(
                f"attention_type 'diff_v1' has one noise head for each signal head, but "
                f"num_noise_heads={self.num_noise_heads} of "
                f"num_attention_heads={self.num_attention_heads}; leave it null, or choose attention_type 'gda'"
            )
        if self.attention_gate and (self.attention_type in PAIRED_TYPES or self.sub_norm):
            raise ValueError("attention_gate works with attention_type 'diff_v2', 'gdla' and 'mla' without sub_norm")
        check_heads(
            self.num_attention_heads, self.noise_heads, self.num_key_value_heads, paired_keys=self.has_paired_kv
        )
