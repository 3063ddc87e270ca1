"""Configuration of the Motif models: the released fields, and those of variants."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from motifarch.auto_map import AutoMapMixin
from motifarch.layers.head_counts import check_heads
from motifarch.models.motif.rope_fields import with_standard_names
from motifarch.models.motif.unsupported import check_one_window, check_ranges, check_rope_agrees, check_supported

MODEL_TYPES = ("Motif", "motif")
"""A folder's ``model_type``: the released ones say "Motif", and "motif" is accepted as well."""

PAIRED_TYPES = ("gda", "diff_v1")
"""Attention types whose lambda is a parameter of the layer, and whose keys may come in pairs."""

SHARED_STYLE = "motif_shared"
"""Name of the style of tensor parallelism that is ours: see `tensor_parallel.py`."""


def tensor_parallel_plan(config: "MotifConfig") -> dict[str, str]:
    """Styles of transformers: heads, feed-forward columns and the vocabulary are shared."""
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
        attention_type: "gda", "diff_v1" (one noise head for each signal head), "diff_v2" or
            "softmax".
        paired_kv: whether keys come in pairs, one for signal and one for noise, with values of
            twice head_dim; false leaves ordinary key/value heads and their cache. None means yes
            for "gda" and "diff_v1"; no other type has pairs.
        attention_gate: with "diff_v2", an elementwise sigmoid gate on the difference.
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
        sliding_window: tokens a query sees, itself included; used if use_sliding_window.
        use_sliding_window: switch for sliding_window, in all layers.
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
        check_ranges(vars(self))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        layer_types = kwargs.pop("layer_types", None)
        check_rope_agrees(self.rope_parameters, kwargs)
        # Copies, for transformers fills them in. It takes the older field alone, if it is there.
        if kwargs.get("rope_scaling"):
            fields = (self.rope_parameters or {}) | kwargs["rope_scaling"]
            kwargs["rope_scaling"] = with_standard_names(fields, self.max_position_embeddings)
        if self.rope_parameters is not None:
            self.rope_parameters = with_standard_names(self.rope_parameters, self.max_position_embeddings)
        # Of the instance, for it depends on the fields; transformers does not save it.
        self.base_model_tp_plan = tensor_parallel_plan(self)  # type: ignore[misc]
        super().__post_init__(**kwargs)
        # transformers validates as well, but wraps the ValueError in an error of another kind.
        self.validate_architecture()
        check_one_window(vars(self), layer_types, self.layer_type)

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
        return output

    @property
    def noise_heads(self) -> int:
        """Noise heads, with the default filled in; 0 for softmax attention."""
        if self.attention_type == "softmax":
            return 0
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
    def v_head_dim(self) -> int:
        """Width Dv of a value head as attention sees it."""
        assert self.head_dim is not None  # filled in by __post_init__
        return 2 * self.head_dim if self.has_paired_kv else self.head_dim

    @property
    def value_width(self) -> int:
        """The name of :attr:`v_head_dim` in 0.1.0, deprecated."""
        return self.v_head_dim

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches read; without it they would take sliding_window as used."""
        return [self.layer_type] * self.num_hidden_layers

    @property
    def layer_type(self) -> str:
        """Of every layer, in transformers' words."""
        return "full_attention" if self.window_size == (-1, -1) else "sliding_attention"

    @property
    def window_size(self) -> tuple[int, int]:
        """The inclusive (left, right) window of the attention functions."""
        if self.use_sliding_window and self.sliding_window is not None:
            return (self.sliding_window - 1, 0)
        return (-1, -1)

    def validate_architecture(self) -> None:
        """Check that the layers can compute it; transformers calls this when a config is made."""
        check_ranges(vars(self))
        check_supported(vars(self))
        if self.use_sliding_window and (self.sliding_window or 0) < 1:
            raise ValueError(
                f"use_sliding_window is on but sliding_window={self.sliding_window}; give at least 1 token"
            )
        assert self.num_key_value_heads is not None  # filled in by __post_init__
        assert self.head_dim is not None
        if self.head_dim % 2:
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
        if self.attention_type == "softmax":
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                    f"num_key_value_heads={self.num_key_value_heads}"
                )
            return
        if self.attention_type == "diff_v1" and self.num_noise_heads not in (None, self.num_attention_heads // 2):
            raise ValueError(
                f"attention_type 'diff_v1' has one noise head for each signal head, but "
                f"num_noise_heads={self.num_noise_heads} of "
                f"num_attention_heads={self.num_attention_heads}; leave it null, or choose attention_type 'gda'"
            )
        if self.attention_gate and (self.attention_type != "diff_v2" or self.sub_norm):
            raise ValueError("attention_gate works with attention_type 'diff_v2' without sub_norm only")
        check_heads(
            self.num_attention_heads, self.noise_heads, self.num_key_value_heads, paired_keys=self.has_paired_kv
        )
