"""The transformers families that can be patched: what their modules are called and where they
differ.

A patched attention module keeps its own forward, and with it the family's projections, norms,
rotary embeddings (or none in a layer that has none), scale, window and softcap. So little is left
to say of a family here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One transformers ``model_type``.

    Args:
        attention: class name of its attention modules. They have q_proj, k_proj, v_proj and o_proj,
            cut heads by ``view(..., -1, head_dim)``, and hand all keyword arguments on to the
            attention function.
        feed_forward: class name of its gated feed-forward modules: ``down_proj(act_fn(gate_proj(x))
            * up_proj(x))``.
        experts: class name of its routed experts, whose activation is ``act_fn``; None if it has
            none.
        norm_heads_dim: the dimension that counts heads where the query norm sees them; None if it
            has no such norm.
        latent: its attention is multi-head latent attention, with none of those projections but
            o_proj.
    """

    attention: str
    feed_forward: str
    experts: str | None = None
    norm_heads_dim: int | None = None
    latent: bool = False


FAMILIES = {
    "llama": Family("LlamaAttention", "LlamaMLP"),
    "qwen3": Family("Qwen3Attention", "Qwen3MLP", norm_heads_dim=2),
    "gemma2": Family("Gemma2Attention", "Gemma2MLP"),
    "exaone4": Family("Exaone4Attention", "Exaone4MLP", norm_heads_dim=1),
    "exaone_moe": Family("ExaoneMoeAttention", "ExaoneMoeMLP", "ExaoneMoeExperts", norm_heads_dim=1),
    "solar_open": Family("SolarOpenAttention", "SolarOpenMLP", "SolarOpenExperts"),
    "axk1": Family("AXK1Attention", "AXK1MLP", "AXK1Experts", latent=True),
    "hyperclovax": Family("HyperCLOVAXAttention", "HyperCLOVAXMLP"),
}
