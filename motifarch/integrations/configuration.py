"""The config of a patched model: its host's, with a record of the patch and a ``model_type`` of its
own.

transformers does not know that type without motifarch. The saved ``num_hidden_layers`` is a
sentence instead of a number, so that the host's own classes do not load the folder either: they
would leave out what they do not know, and answer as another model.
"""

import copy
import functools
import json
from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from motifarch.auto_map import AutoMapMixin
from motifarch.integrations.derived import Derived

MODEL_TYPE = "motifarch_patched"
PATCH = "motifarch_patch"
"""The config's field that says what was patched, and how."""

_LAYERS = "num_hidden_layers"
_NOT_LOADABLE = (
    "patched by motifarch: load it with motifarch.integrations.load_patched, or with an Auto class after "
    "import motifarch.integrations"
)


def _with_layers(saved: dict[str, Any]) -> dict[str, Any]:
    """The saved config, or its part, that says how many layers the language model has."""
    return saved.get("text_config", saved)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PatchOptions:
    """What ``patch`` was asked for; a patched model's config records it."""

    attention: str | None
    ratio: int
    feed_forward: str | None
    sub_norm: bool
    lambda_init: float
    experts: str | None

    @property
    def attention_is_exact(self) -> bool:
        """Whether attention starts as what it was."""
        if self.attention == "gda":
            return not self.sub_norm and self.lambda_init == 0.0
        return not self.sub_norm and self.ratio == 1


class PatchedConfigMixin(AutoMapMixin, Derived):
    """Mixed into a host's config class."""

    # The host's plan would cut signal from noise heads.
    base_model_tp_plan = None
    base_model_ep_plan = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a saved one describes."""
        config_dict = copy.deepcopy(config_dict)
        named = _with_layers(config_dict)
        named[_LAYERS] = config_dict[PATCH].pop(_LAYERS, named[_LAYERS])
        host: Any = super()
        return host.from_dict(config_dict, **kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        """What is saved."""
        host: Any = super()
        saved = json.loads(host.to_json_string(use_diff))
        if PATCH in saved:
            saved[PATCH][_LAYERS] = getattr(host.get_text_config(), _LAYERS)
            _with_layers(saved)[_LAYERS] = _NOT_LOADABLE
        return json.dumps(saved, indent=2, sort_keys=True) + "\n"


@functools.cache
def patched_config_class(host: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The patched class of a host's config class."""
    names: dict[str, Any] = {"model_type": MODEL_TYPE, "made_by": (patched_config_class, host), "__module__": __name__}
    if host.model_type == "hyperclovax":
        # TRL knows by this type that logits_scaling multiplies logits (Granite's divides them); a
        # logit_scale multiplies them whatever the type.
        names["logit_scale"] = property(lambda config: config.logits_scaling)
    return type(f"Patched{host.__name__}", (PatchedConfigMixin, host), names)
