"""Attention of the user's own in the models: ``attention_type`` is then its import path, such as
"my_package.attention:GatedAttention".

A class is an attention layer, of those in `motifarch.layers`, and made as they are. A function is
one of transformers' attention interface, under a softmax layer's projections.
"""

import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from motifarch.errors import first_line
from motifarch.field_types import is_import_path
from motifarch.layers import BaseAttention, SoftmaxAttention

TRUSTED = "MOTIF_ATTENTION"
"""The environment variable that names, by commas, what configs and checkpoints may import."""
_REGISTERED: dict[str, Callable[..., Any]] = {}


def register_attention(path: str) -> Callable[..., Any]:
    """Imports an attention, which runs its module's code, and lets configs name it.

    Args:
        path: "module:name", found as Python finds modules or in the working directory. Of a class
            derived from `motifarch.layers.BaseAttention`, which is called with ``hidden_size`` and,
            by name, ``num_heads``, ``num_kv_heads``, ``head_dim``, ``layer_idx``, ``window_size``,
            ``qk_norm``, ``qk_norm_eps``, ``bias`` and, unless it is derived from
            ``SoftmaxAttention`` or a config has none, ``num_noise_heads``. Or of a function
            ``(module, query, key, value, attention_mask, *, scaling, **options)`` that takes
            queries (B, heads, S, D), keys and values (B, key heads, keys, D) and a mask (B, 1, S,
            keys) to add or None, and gives ((B, S, heads, D), maps or None).

    Returns:
        The class or the function.

    Raises:
        ValueError: there is no such thing, or it is neither.
    """
    if path in _REGISTERED:
        return _REGISTERED[path]
    here = os.getcwd()
    if here not in sys.path:  # a console script does not look there
        sys.path.append(here)
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"attention {path!r} can't be imported ({type(error).__name__}: {first_line(error)}); give module:name of "
            "what Python finds, or what lies in the working directory"
        ) from error
    if isinstance(found, type):
        if not issubclass(found, BaseAttention):
            raise ValueError(
                f"attention {path!r} is a class that is not derived from motifarch.layers.BaseAttention; derive it, "
                "mostly from SoftmaxAttention, or give a function of transformers' attention interface"
            )
    elif callable(found):
        AttentionInterface.register(path, found)
        AttentionMaskInterface.register(path, eager_mask)
    else:
        raise ValueError(f"attention {path!r} is neither a class nor a function, but {type(found).__name__}")
    _REGISTERED[path] = found
    return found


def registered(path: str) -> Callable[..., Any]:
    """What was registered under a path, or is trusted by the environment.

    Raises:
        ValueError: neither: a config alone, or a checkpoint, does not import code.
    """
    if path not in _REGISTERED and path not in os.environ.get(TRUSTED, "").split(","):
        raise ValueError(
            f"attention_type {path!r} is code that was not imported; if you trust it, set {TRUSTED}={path} in the "
            f"environment, or call motifarch.models.register_attention({path!r}) first"
        )
    return register_attention(path)


def layer_class(path: str) -> type[BaseAttention]:
    """The class of the layers of an ``attention_type``; a function has a softmax layer's."""
    found = registered(path)
    return found if isinstance(found, type) else SoftmaxAttention


def default_implementation(attention_type: str) -> str:
    """The ``attn_implementation`` of a model where none is asked for: a function's own."""
    is_function = is_import_path(attention_type) and not isinstance(registered(attention_type), type)
    return attention_type if is_function else "auto"
