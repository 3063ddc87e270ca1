"""What a config may say that no layer here computes: an error names it, for loading would silently
compute another thing.

Fields that concern training or generation alone, or that no computation reads, are not looked at:
they stay in the config and are written back.
"""

import math
from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

from motifarch.errors import UserError
from motifarch.field_types import is_import_path
from motifarch.layers.grouped_differential_latent_attention import check_rotary_part
from motifarch.model_section import ModelSection
from motifarch.typed_yaml import TypedYaml

ATTENTION_TYPES = ("gda", "diff_v1", "diff_v2", "softmax", "gdla", "mla")
ACTIVATIONS = ("poly_norm", "silu")

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "attention_type": ATTENTION_TYPES,
    "hidden_act": ACTIVATIONS,
    "k_ratio": (1,),
    "attention_dropout": (0,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "sliding_window_pattern": (1, "interleave"),
    "score_func": ("sigmoid",),
    "num_nextn_predict_layers": (0, 1),
    "rope_interleave": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}
"""A field's values; null, like a field that is not there, is always accepted."""

BIASES = ("attention_bias", "qkv_bias", "mlp_bias")
"""Other models' names for parts of use_bias."""

ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Rotary types that ignore a row's length, and what each needs besides rope_theta."""

ROPE_TAKES: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""What they take beside what they need."""

_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

_RANGES = TypedYaml(ModelSection, "model")


def check_supported(fields: Mapping[str, Any]) -> None:
    """Checks the values of a config's fields, its biases and its rotary parameters.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    for name, accepted in ACCEPTED.items():
        value = fields.get(name)
        if name == "attention_type" and is_import_path(str(value)):
            continue
        if value is not None and value not in accepted:
            raise ValueError(f"{name}={value!r} is not supported; {_choice(accepted)}")
    for name in BIASES:
        value = fields.get(name)
        if value is not None and bool(value) != fields["use_bias"]:
            raise ValueError(
                f"{name}={value} is not supported with use_bias={fields['use_bias']}; all linear layers have biases "
                f"(use_bias true) or none has: set {name} to the same, or leave it out"
            )
    _check_quantization(fields.get("quantization_config"))
    _check_rope(fields.get("rope_parameters") or {})


def check_ranges(fields: Mapping[str, Any]) -> None:
    """Checks the fields that a recipe's model section has too, which says what each accepts.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    named = {f.name for f in fields_of(ModelSection)} & fields.keys() - ACCEPTED.keys() - {"sliding_window"}
    try:
        _RANGES.check(ModelSection(**{name: fields[name] for name in named}))
    except UserError as error:
        raise ValueError(str(error)) from None


def check_layer_types(fields: Mapping[str, Any], layer_types: list[str] | None, computed: list[str]) -> None:
    """Checks that a folder's layer_types are those that follow from the other fields.

    Raises:
        ValueError: naming the field and its value.
    """
    if not isinstance(layer_types, list | tuple | None) or not all(isinstance(t, str) for t in layer_types or ()):
        raise ValueError(f"layer_types={layer_types!r} is not supported; give a list of texts, or leave it out")
    # Whoever changes the number of layers may leave the list as it was.
    for i, (said, kind) in enumerate(zip(layer_types or (), computed, strict=False)):
        if said != kind:
            raise ValueError(
                f"layer_types has {said!r} for layer {i} but use_sliding_window={fields['use_sliding_window']}, "
                f"sliding_window={fields['sliding_window']} and a period of {fields['sliding_window_period']} "
                f"make it {kind!r}: change these fields, or leave layer_types out"
            )
    full = fields.get("max_window_layers")
    if full and fields["use_sliding_window"] and fields["sliding_window_period"] is None:
        raise ValueError(
            f"max_window_layers={full} is not supported with use_sliding_window on: it leaves the first {full} layers "
            "without the window, which sliding_window_period alone does here; set it to 0, or use_sliding_window to "
            "false"
        )


def check_latent(config: Any) -> None:
    """Checks the widths and ranks of latent attention.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"):
        if getattr(config, name) is None:
            raise ValueError(f"attention_type {config.attention_type!r} needs {name}, which is not given")
    check_rotary_part(config.head_dim, config.qk_rope_head_dim)
    for name in ("sub_norm", "qk_norm", "use_bias"):
        if getattr(config, name):
            raise ValueError(f"{name} is on, which attention_type {config.attention_type!r} does not have")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ("default", "yarn"):
        raise ValueError(f"rope_type={rope['rope_type']!r} is not supported with latent attention; 'yarn' is")
    for name in ("attention_factor", "mscale_all_dim"):
        if rope.get(name) is not None:
            raise ValueError(
                f"rope_scaling has {name}={rope[name]!r}, which latent attention does not have: its "
                "cosines and sines are not scaled, and mscale scales the logits; leave it out"
            )
    for name, inner in (("rope_factor", "factor"), ("original_seq_len", "original_max_position_embeddings")):
        outer = getattr(config, name, None)
        if rope.get("rope_type") == "yarn" and outer is not None and outer != rope.get(inner):
            raise ValueError(f"{name}={outer} but rope_scaling has {inner}={rope.get(inner)}; make them equal")


def check_not_latent(config: Any) -> None:
    """Checks that no field is of latent attention, where another type is asked for.

    Raises:
        ValueError: naming the field and its value.
    """
    for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)} is not supported with attention_type {config.attention_type!r}; it is "
                "of 'gdla' and 'mla': change attention_type, or leave it out"
            )


def check_sparse(config: Any) -> None:
    """Checks experts, hyper-connections, the window's period and multi-token prediction.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    if config.num_experts:
        for name in ("experts_top_k", "moe_intermediate_size"):
            if getattr(config, name) is None:
                raise ValueError(f"num_experts={config.num_experts} needs {name}, which is not given")
        if config.experts_top_k > config.num_experts:
            raise ValueError(
                f"experts_top_k={config.experts_top_k} is more than num_experts={config.num_experts}; each token takes "
                f"1 to {config.num_experts} experts"
            )
        if config.use_bias:
            raise ValueError("use_bias is on, which experts do not have; set it to false")
    elif config.polynorm_bias_clamp is not None or config.hidden_clamp is not None:
        name = "hidden_clamp" if config.polynorm_bias_clamp is None else "polynorm_bias_clamp"
        raise ValueError(f"{name} is of routed experts, and num_experts is {config.num_experts}; leave it null")
    of_poly_norm = {"polynorm_sigmoid_weight": False, "polynorm_output_scale": 1, "polynorm_bias_clamp": None}
    for name, plain in of_poly_norm.items():
        if config.hidden_act != "poly_norm" and getattr(config, name) != plain:
            raise ValueError(
                f"{name}={getattr(config, name)} is of PolyNorm, and hidden_act is {config.hidden_act!r}; set it to "
                f"{plain!r}, or hidden_act to 'poly_norm'"
            )
    if config.mhc_enabled and config.mhc_expansion_rate < 2:
        raise ValueError(
            f"mhc_expansion_rate={config.mhc_expansion_rate} with mhc_enabled; hyper-connections mix two streams or "
            "more: a single one is mhc_enabled false"
        )
    period = config.sliding_window_period
    if period is not None and not config.use_sliding_window:
        raise ValueError(f"sliding_window_period={period} without use_sliding_window; leave it null")
    if getattr(config, "sliding_window_pattern", None) == "interleave" and config.use_sliding_window and period is None:
        raise ValueError("sliding_window_pattern is 'interleave' without sliding_window_period; give the period")


def check_rope_agrees(parameters: Mapping[str, Any] | None, older: Mapping[str, Any]) -> None:
    """Checks that rope_parameters and a config's older rope_theta and rope_scaling say the same.

    Folders are written with both, and one edited by hand may say what would be overlooked.

    Raises:
        ValueError: naming the field and both values.
    """
    for name, value in (("rope_parameters", parameters), ("rope_scaling", older.get("rope_scaling"))):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} is not supported; give an object such as {{'rope_type': 'default'}}")
    said = dict(older.get("rope_scaling") or {})
    if older.get("rope_theta") is not None:
        said["rope_theta"] = older["rope_theta"]
    for name, value in said.items():
        newer = (parameters or {}).get(name, value)
        if newer != value:
            field = "rope_theta" if name == "rope_theta" else f"rope_scaling's {name}"
            raise ValueError(
                f"{field} is {value!r} but rope_parameters has {name}={newer!r}; make them equal, or leave "
                "rope_parameters out"
            )


def _choice(accepted: tuple[Any, ...]) -> str:
    if not accepted:
        return "leave it out if the model does without"
    return f"only {accepted[0]} is" if len(accepted) == 1 else f"choose one of {', '.join(map(str, accepted))}"


def _check_quantization(settings: Any) -> None:
    """Raises for a method of which transformers would only warn."""
    if not isinstance(settings, Mapping):  # an object is one that transformers made
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    if not AutoHfQuantizer.supports_quant_method(dict(settings)):
        raise ValueError(
            f"quantization_config has quant_method={settings.get('quant_method')!r}, which the installed transformers "
            "does not know; load the folder of unquantized weights"
        )


def _check_rope(parameters: Mapping[str, Any]) -> None:
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"rope_parameters is given by kind of layer ({', '.join(nested)}); all layers share one set here: give "
            "rope_type and rope_theta themselves"
        )
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        raise ValueError(f"rope_type={kind!r} is not supported; choose one of {', '.join(ROPE_NEEDS)}")
    missing = [name for name in ROPE_NEEDS[kind] if name not in parameters]
    if missing:
        raise ValueError(f"rope_type={kind!r} needs {' and '.join(missing)}, which rope_scaling does not have")
    unknown = [name for name in parameters if name not in (*_ROPE_COMMON, *ROPE_NEEDS[kind], *ROPE_TAKES.get(kind, ()))]
    if unknown:
        known = ", ".join((*ROPE_NEEDS[kind], *ROPE_TAKES.get(kind, ()))) or "nothing else"
        raise ValueError(
            f"rope_scaling has {', '.join(unknown)}, which rope_type={kind!r} does not take; it takes {known}"
        )
    for name, value in parameters.items():
        if name in ("rope_type", "type", "partial_rotary_factor"):
            continue
        # transformers then divides the two lengths, and takes its own for the others.
        if value is None and kind == "yarn" and name not in ("rope_theta", "original_max_position_embeddings"):
            continue
        if name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"truncate={value!r} must be true or false")
            continue
        least = 1 if name == "rope_theta" else 0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least < value < math.inf:
            raise ValueError(f"{name}={value!r} must be a number above {least}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if (parameters.get(low) or 0) >= (parameters.get(high) or math.inf):
            raise ValueError(f"{low}={parameters[low]} must be below {high}={parameters[high]}")
    rotated = parameters.get("partial_rotary_factor")
    if rotated not in (None, 1):
        raise ValueError(f"partial_rotary_factor={rotated} is not supported; only 1 is: whole heads are rotated")
