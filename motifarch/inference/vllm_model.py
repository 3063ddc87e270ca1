"""The class that vLLM builds for Motif models. Importing this needs vLLM."""

from typing import Any

from vllm.model_executor.models.transformers import TransformersForCausalLM


class MotifForCausalLM(TransformersForCausalLM):  # type: ignore[misc, no-any-unimported]
    """vLLM's transformers backend, with how a Motif model's heads are shared among GPUs.

    Each GPU has whole groups of signal and noise heads. The feed-forward block, whose PolyNorm is a
    mean over all of its width, is whole on each.

    Raises:
        ValueError: tensor parallelism does not divide the heads of keys and values.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config, ranks = vllm_config.model_config.hf_text_config, vllm_config.parallel_config.tensor_parallel_size
        kv_heads = config.num_key_value_heads // (2 if config.paired_kv else 1)
        if kv_heads % ranks:
            raise ValueError(
                f"tensor_parallel_size={ranks} does not divide the {kv_heads} heads of keys and values; "
                "choose one that does"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _create_model(self) -> Any:
        model = super()._create_model()
        # What a model without a head leaves aside in a folder, vLLM would keep from the head, too.
        model._keys_to_ignore_on_load_unexpected = None
        return model

    def _tp_plan(self) -> dict[str, str]:
        columns = ("q_proj", "k_proj", "v_proj", "lambda_proj", "gate_proj")
        plan = {rf"layers\.\d+\.self_attn\.{name}": "colwise" for name in columns}
        return plan | {r"layers\.\d+\.self_attn\.o_proj": "rowwise"}
