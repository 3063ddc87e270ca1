"""Motif models in vLLM: what its plugin entry point calls in each of its processes.

vLLM has a backend that runs a transformers model with vLLM's own attention, cache and linear
layers. The code that travels with exported folders fits it: one call of the attention interface a
layer, of signal and noise heads together. Where keys come in pairs, k1 and k2 lie side by side in
one head of twice the width, and so does the cache.
"""

from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from motifarch.models.motif import MODEL_TYPES
from motifarch.portable.modeling_motif import MotifConfig, MotifForCausalLM, MotifModel

ARCHITECTURE = "MotifForCausalLM"


def register() -> None:
    """Makes vLLM know the Motif models; it may be called more than once.

    In this process transformers' Auto classes load the portable model from then on.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    class MotifArchitecture(ModelArchConfigConvertorBase):  # type: ignore[misc, no-any-unimported]
        """Heads as attention and its cache see them."""

        def get_head_size(self) -> int:
            config: MotifConfig = self.hf_text_config
            assert config.head_dim is not None
            return config.head_dim * (2 if config.paired_kv else 1)

        def get_total_num_kv_heads(self) -> int:
            config: MotifConfig = self.hf_text_config
            assert config.num_key_value_heads is not None
            return config.num_key_value_heads // (2 if config.paired_kv else 1)

    for model_type in MODEL_TYPES:
        CONFIG_MAPPING.register(model_type, MotifConfig, exist_ok=True)
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = MotifArchitecture
    AutoModel.register(MotifConfig, MotifModel, exist_ok=True)
    AutoModelForCausalLM.register(MotifConfig, MotifForCausalLM, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: vLLM imports it where it may initialise CUDA.
        ModelRegistry.register_model(ARCHITECTURE, "motifarch.inference.vllm_model:MotifForCausalLM")
