"""The released Motif-3's names of a config's fields, read and written beside ours."""

from typing import Any

_FIXED: dict[str, tuple[Any, ...]] = {
    "headwise_attn_output_gate": (False, None),
    "score_before_experts": (False, None),
    "polynorm_output_scale_per_layer": ({}, None),
}
"""Fields of which one value alone is computed."""

LATER = (
    *("sliding_window_period", "swa_rope_theta", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"),
    *("num_experts", "experts_top_k", "num_shared_experts", "moe_intermediate_size"),
    *("n_dense_first_layers", "interleave_moe_layer_step", "score_func", "route_norm", "route_scale"),
    *("polynorm_sigmoid_weight", "polynorm_output_scale", "polynorm_bias_clamp", "hidden_clamp"),
    *("mhc_enabled", "mhc_expansion_rate", "mhc_sinkhorn_iters", "mhc_identity_init", "mhc_h_post_alpha_end"),
    "num_nextn_predict_layers",
)
"""Fields that Motif-2's folders do not have."""


def read_released(given: dict[str, Any]) -> dict[str, Any]:
    """Our fields, of those that a released config gives in other words, which are taken out.

    Raises:
        ValueError: naming a field and value that no layer computes.
    """
    fields: dict[str, Any] = {}
    kind = given.pop("attention_cls", None)
    if kind is not None:
        if kind != "gdla":
            raise ValueError(f"attention_cls={kind!r} is not supported; only 'gdla' is: leave it out for others")
        fields["attention_type"] = kind
    differential = given.pop("diff_v2", None)
    if kind is not None and differential is False:
        raise ValueError("diff_v2=False is not supported with attention_cls 'gdla': its lambda is the token's")
    gate = given.pop("elementwise_attn_output_gate", None)
    if gate is not None:
        fields["attention_gate"] = bool(gate)
    for name, accepted in _FIXED.items():
        value = given.pop(name, None)
        if value not in accepted:
            raise ValueError(f"{name}={value!r} is not supported; only {accepted[0]!r} is")
    return fields


def write_released(output: dict[str, Any], config: Any) -> dict[str, Any]:
    """A config's dict with the released names; one without anything of Motif-3 is Motif-2's."""
    defaults = type(config).__dataclass_fields__
    if all(output.get(name) == defaults[name].default for name in LATER):
        for name in LATER:
            output.pop(name, None)
    if not config.is_latent:
        output.pop("v_head_dim", None)
        return output
    output["elementwise_attn_output_gate"] = output.get("attention_gate", False)
    if config.attention_type == "gdla":
        output |= {"attention_cls": "gdla", "diff_v2": True}
    if output.get("rope_scaling"):
        output["rope_scaling"] = output["rope_scaling"] | {"apply_yarn_scaling": False}
    return output
