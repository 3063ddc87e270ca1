"""Other programs' names for rotary parameters, as transformers' own."""

import math
from collections.abc import Mapping
from typing import Any

_VLLM = ("attn_factor", "extrapolation_factor", "apply_yarn_scaling")


def with_standard_names(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """Rotary parameters in which vLLM's keys of YaRN are said in transformers' words.

    There cosines and sines are multiplied by ``attn_factor`` times ``0.1 log(factor) + 1``, or by
    ``attn_factor`` alone with ``apply_yarn_scaling`` false; transformers' ``attention_factor`` is
    the whole product.

    Raises:
        ValueError: naming a value that no computation here honours.
    """
    result = dict(parameters)
    if result.get("rope_type", result.get("type")) != "yarn" or not any(name in result for name in _VLLM):
        return result
    share, extrapolated, scaled = (result.pop(name, None) for name in _VLLM)
    if extrapolated not in (None, 1):
        raise ValueError(f"extrapolation_factor={extrapolated!r} is not supported; only 1 is")
    if not isinstance(scaled, bool | None):
        raise ValueError(f"apply_yarn_scaling={scaled!r} must be true or false")
    if share is None and scaled is not False:
        return result
    if isinstance(share, bool) or not isinstance(share, int | float | None) or not 0 < (share or 1) < math.inf:
        raise ValueError(f"attn_factor={share!r} must be a number above 0")
    others = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if result.get(name) is not None]
    if others:
        raise ValueError(
            f"attn_factor and {' and '.join(others)} are both given; vLLM knows the first, transformers the others: "
            "leave one of the two out"
        )
    factor, length = result.get("factor"), result.get("original_max_position_embeddings")
    if factor is None and isinstance(length, int | float) and length > 0:
        factor = max_position_embeddings / length
    if isinstance(factor, int | float) and factor > 0:  # another value is refused by its own name
        usual = 1.0 if scaled is False or factor <= 1 else 0.1 * math.log(factor) + 1.0
        result["attention_factor"] = usual * (1.0 if share is None else share)
    return result


def latent_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters of latent attention, whose ``mscale`` is the logits' and leaves cosines and
    sines as they are: Motif-3 says so with ``apply_yarn_scaling`` false.

    Raises:
        ValueError: naming a value that no computation here honours.
    """
    result = dict(parameters)
    scaled = result.pop("apply_yarn_scaling", None)
    if scaled not in (None, False):
        raise ValueError(
            f"apply_yarn_scaling={scaled!r} is not supported with latent attention, whose mscale scales the logits; "
            "set it to false"
        )
    return result
