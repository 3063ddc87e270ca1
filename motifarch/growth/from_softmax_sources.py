"""Softmax models of other families as Motif models, which are the same function."""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from motifarch.errors import UserError
from motifarch.growth import from_mla_sources as mla
from motifarch.growth.model_spec import LazyTensor, ModelSpec, Step
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.weight_files import listed

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Their configs' model_type: pre-norm blocks with Motif's tensor names and mathematics."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not change with the sequence's length."""

_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def as_compared(spec: ModelSpec) -> ModelSpec:
    """What a conversion is compared with: with latent attention the source as transformers' own
    layers run it, and else the Motif model that it is.

    Raises:
        UserError: what :func:`as_motif` raises.
    """
    if spec.config.get("model_type") not in mla.FAMILIES:
        return as_motif(spec)
    return dataclasses.replace(spec, tensors=mla.transformers_tensors(spec.tensors, _read_config(spec))[0])


def as_motif(spec: ModelSpec) -> ModelSpec:
    """A softmax model as a Motif model of ``attention_type`` "softmax", or with latent attention
    "mla"; a Motif model of these types is returned as it is.

    Motif models have biases in all linear layers or in none: where a model has some, the others
    start at zero.

    Raises:
        UserError: the model is of another family than :data:`FAMILIES` and those with latent
            attention, its config has a field that MotifConfig cannot honour, or its tensors are not
            those that its config describes.
    """
    if str(spec.config.get("model_type")).lower() == "motif":
        kind = MotifConfig.from_dict(spec.config).attention_type
        if kind not in ("softmax", "mla"):
            raise UserError(
                f"config.json is a Motif model's with attention_type {kind!r}, which is differential already"
            )
        return spec
    source = _read_config(spec)
    latent = source.model_type in mla.FAMILIES
    found, left_out = mla.transformers_tensors(spec.tensors, source) if latent else (spec.tensors, [])
    given = _own_tensors(found, source)
    try:
        config = MotifConfig(
            **{name: getattr(source, name) for name in _SAME_FIELDS},
            num_noise_heads=None,
            **(mla.config_fields(source) if latent else _config_fields(source, given)),
        )
    except ValueError as error:
        raise UserError(f"no Motif model can take this {source.model_type} model's place: {error}") from None
    step = Step(f"{source.model_type} -> Motif with softmax attention")
    if latent:
        given, step = mla.motif_tensors(given, source, config)
    with torch.device("meta"):
        state = MotifForCausalLM(config).state_dict()
    dtype = given["model.embed_tokens.weight"].dtype
    tensors = {
        name: given[name] if name in given else LazyTensor.constant(0.0, tuple(tensor.shape), dtype)
        for name, tensor in state.items()
        if name in given or name.endswith("_proj.bias")
    }
    summary = step.summary
    if absent := sorted({name.split(".")[-2] for name in tensors if name not in given}):
        summary += f"; biases that the source has not start at zero: {', '.join(absent)}"
    if left_out:
        summary += f"; multi-token prediction is left out: {listed(left_out)}"
    # Of the source's other fields only the weights' dtype means anything to a Motif model.
    kept = {name: spec.config[name] for name in ("dtype", "torch_dtype") if name in spec.config}
    fields = config.to_dict() | {"architectures": ["MotifForCausalLM"]} | kept
    return ModelSpec(fields, tensors, (*spec.steps, Step(summary, step.loss)))


def _config_fields(source: PreTrainedConfig, given: dict[str, LazyTensor]) -> dict[str, Any]:
    """MotifConfig's fields of a model without latents, besides those that all families share."""
    windowed = source.model_type == "mistral" or "sliding_attention" in (getattr(source, "layer_types", None) or ())
    window = source.sliding_window if windowed else None
    return {
        "attention_type": "softmax",
        "head_dim": getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        "qk_norm": source.model_type == "qwen3",
        "rope_parameters": dict(source.rope_parameters),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "use_bias": any(name.endswith("_proj.bias") for name in given),
    }


def _read_config(spec: ModelSpec) -> PreTrainedConfig:
    """The source's config as transformers reads it, if a conversion honours all of it."""
    kind = spec.config.get("model_type")
    if kind in mla.REFUSED:
        raise UserError(
            f"config.json has model_type {kind!r}, which no Motif model computes: {mla.REFUSED[kind]}; models of "
            f"{', '.join(mla.FAMILIES)} can be converted"
        )
    if kind not in (*FAMILIES, *mla.FAMILIES):
        raise UserError(
            f"config.json has model_type {kind!r}; softmax models of {', '.join(FAMILIES)} can be converted, and with "
            f"latent attention of {', '.join(mla.FAMILIES)}"
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(spec.config)
    except Exception as error:  # transformers' validation has several kinds of its own
        raise UserError(f"config.json is no valid {kind} config: {' '.join(str(error).split())}") from None
    parameters, rope_types = config.rope_parameters or {}, mla.ROPE_TYPES if kind in mla.FAMILIES else ROPE_TYPES
    accepted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", config.hidden_act, ("silu",)),
        ("attention_dropout", config.attention_dropout, (0, None)),
        ("rope_parameters.rope_type", parameters.get("rope_type", "default"), rope_types),
        ("rope_parameters.partial_rotary_factor", parameters.get("partial_rotary_factor", 1), (1,)),
        ("quantization_config", getattr(config, "quantization_config", None), (None,)),
    ]
    for name, value, values in accepted:
        if value not in values:
            raise UserError(
                f"config.json has {name} {value!r}, which no Motif model computes; "
                f"{' or '.join(str(v) for v in values)} can be converted"
            )
    types = set(getattr(config, "layer_types", None) or ())
    if len(types) > 1 or types - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json has layer_types of {', '.join(sorted(types))} (Qwen's follow from max_window_layers), and "
            "all layers of a Motif model attend alike; full_attention or sliding_attention in every layer can be "
            "converted"
        )
    return config


def _own_tensors(tensors: dict[str, LazyTensor], config: PreTrainedConfig) -> dict[str, LazyTensor]:
    """The folder's tensors, if they are what its config describes; old rotary tables go."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    left_out = ["lm_head.weight"] if config.tie_word_embeddings else []
    for name in left_out:
        del expected[name]
    found = {
        name: lazy
        for name, lazy in tensors.items()
        if name not in left_out and not name.endswith("rotary_emb.inv_freq")
    }
    for problem, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has, in addition,", found.keys() - expected.keys()),
        ("has another shape for", {n for n in expected.keys() & found.keys() if expected[n] != found[n].shape}),
    ):
        if names:
            raise UserError(
                f"the folder's weights are not those of the {type(model).__name__} that config.json describes: it "
                f"{problem} {listed(names)}; give a folder as save_pretrained writes it"
            )
    return found
