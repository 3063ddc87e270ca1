"""The config of a patched model: its host's, with a record of the patch and a ``model_type`` of its
own.

transformers does not know that type without motifarch. The saved ``num_hidden_layers`` is a
sentence instead of a number, so that the host's own classes refuse the folder too: they would leave
out what they do not know, and answer as another model.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import transformers
from transformers.configuration_utils import PreTrainedConfig

from motifarch.errors import UserError

MODEL_TYPE = "motifarch_patched"
PATCH = "motifarch_patch"
"""The config's field that says what was patched, and how."""

_LAYERS = "num_hidden_layers"
_REFUSAL = (
    "patched by motifarch: load it with motifarch.integrations.load_patched, or an Auto class after import motifarch"
)


class PatchedConfigMixin:
    """Mixed into a host's config class."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a saved one describes."""
        config_dict = copy.deepcopy(config_dict)
        config_dict[_LAYERS] = config_dict[PATCH].pop(_LAYERS, config_dict[_LAYERS])
        host: Any = super()
        return host.from_dict(config_dict, **kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        """What is saved."""
        host: Any = super()
        saved = json.loads(host.to_json_string(use_diff))
        if PATCH in saved:
            saved[PATCH][_LAYERS], saved[_LAYERS] = getattr(self, _LAYERS), _REFUSAL
        return json.dumps(saved, indent=2, sort_keys=True) + "\n"


class PatchedConfig(PreTrainedConfig):
    """What AutoConfig knows: it gives way to its host's patched class as soon as a saved config is
    read.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a saved one describes, of its host's patched class.

        Raises:
            UserError: no record of a patch, or of a family that this transformers lacks.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from motifarch.integrations.saving import register

        record = config_dict.get(PATCH)
        host: Any = record.get("host") if isinstance(record, dict) else None
        if host not in CONFIG_MAPPING:
            raise UserError(
                f"a config of model_type {MODEL_TYPE!r} whose {PATCH!r} names the family {host!r}, which transformers "
                f"{transformers.__version__} does not have; it must be one that a patched model was saved with"
            )
        return register(CONFIG_MAPPING[host]).from_dict(config_dict, **kwargs)
