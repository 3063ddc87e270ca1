"""Patched models in folders: saved by ``save_pretrained``, loaded by the Auto classes once
``motifarch.integrations`` is imported.

A patched model is of a class of its own, made from its host's, and so is its config
(:mod:`motifarch.integrations.configuration`).
"""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto

from motifarch.errors import UserError
from motifarch.integrations.configuration import MODEL_TYPE, PATCH, patched_config_class
from motifarch.integrations.derived import Derived, derive
from motifarch.integrations.modules import rebuild
from motifarch.integrations.noise_heads import ScalarLambda
from motifarch.integrations.older import read_older
from motifarch.layers import PolyNorm
from motifarch.ledger.derived import note_derived, source_of
from motifarch.transformers_names import add_to_transformers
from motifarch.weight_files import WeightFiles, file_names

_cache: Any = functools.cache  # which mypy thinks has no use for these classes


class PatchedModelMixin(Derived):
    """Mixed into a host's model class: what is built is patched as its config says."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Trainer's label smoothing shifts labels for the class names in this table alone; one made
        # from a causal language model is such a model.
        names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if any(base.__name__ in names.values() for base in cls.__mro__[1:]):
            names[cls.__name__] = cls.__name__

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        host: Any = super()
        host.__init__(config, *arguments, **options)
        model: Any = self
        if not any(isinstance(m, PatchedModelMixin) for m in model.modules() if m is not self):  # made by AutoModel
            rebuild(model)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers' own; a folder of version 0.1.0, too."""
        host: Any = super()
        folder = Path(str(pretrained_model_name_or_path))
        older = read_older(folder) if options.get("state_dict") is None and folder.is_dir() else None
        if older is None:
            return host.from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        made: Any = cls
        options |= {"state_dict": older, "config": options.get("config") or made.config_class.from_pretrained(folder)}
        loaded = host.from_pretrained(None, *arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if (folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return loaded

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As transformers' own; the folder names in its ledger what the model was made of."""
        host: Any = super()
        model: Any = self
        source = Path(model.config._name_or_path or "a model that was made in memory")
        given = source_of(source)  # before it may be written over
        host.save_pretrained(save_directory, *arguments, **options)
        folder = Path(save_directory)
        if options.get("is_main_process", True) and any(folder.glob("*.safetensors")):
            note_derived(folder, "patch", source, given)

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: Tensor | None = None, past_key_values: Any = None, **_: Any
    ) -> Tensor | None:
        """For the mask over a static cache: that of padding, which the model reads itself.

        It is (B, tokens), and after a cache as long as this: one size for all steps, which are
        compiled once. What it says of places behind the tokens is not looked at.
        """
        if attention_mask is None or not isinstance(past_key_values.get_seq_length(), Tensor):
            return attention_mask
        places = max(layer.max_cache_len for layer in past_key_values.layers)
        return nn.functional.pad(attention_mask, (0, max(0, places - attention_mask.shape[1])), value=1)

    def _init_weights(self, module: nn.Module) -> None:
        host: Any = super()
        host._init_weights(module)
        if isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, ScalarLambda):
            for vector in module.parameters():
                init.normal_(vector, std=0.1)


@_cache
def patched_model_class(host: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The patched class of a host's model class."""
    config: Any = host.config_class
    names = {
        "config_class": patched_config_class(config),
        "made_by": (patched_model_class, host),
        "__module__": __name__,
    }
    made = type(f"Patched{host.__name__}", (PatchedModelMixin, host), names)
    add_to_transformers(made)
    return made


@_cache
def register(host: Any) -> type[PreTrainedConfig]:
    """Make the Auto classes know a host's patched classes; returns that of its config."""
    config = patched_config_class(host)
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        found = mapping[host] if isinstance(auto, type) and mapping is not None and host in mapping else None
        # A head may be of a model type of its own, such as Qwen2's for decisions.
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is host:
            auto.register(config, patched_model_class(found), exist_ok=True)
    return config


class PatchedConfig(PreTrainedConfig):
    """What AutoConfig knows; a saved config's host has its own patched class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a saved one describes, of its host's patched class.

        Raises:
            UserError: no record of a patch, or of a family that this transformers lacks.
        """
        record = config_dict.get(PATCH)
        host: Any = record.get("host") if isinstance(record, dict) else None
        if host not in CONFIG_MAPPING:
            raise UserError(
                f"a config of model_type {MODEL_TYPE!r} whose {PATCH!r} names the family {host!r}, which transformers "
                f"{transformers.__version__} does not have; it must be one that a patched model was saved with"
            )
        return register(CONFIG_MAPPING[host]).from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, PatchedConfig, exist_ok=True)


def as_patched(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Make a model that will be patched in place of its patched class, with a config of its own:
    other models may have been made from the one that it had.
    """
    given: Any = model.config
    configs = {id(m.config): m.config for m in model.modules() if isinstance(vars(m).get("config"), PreTrainedConfig)}
    memo: dict[int, Any] = {}
    own = {held: copy.deepcopy(config, memo) for held, config in configs.items()}
    own[id(given)] = config = derive(own[id(given)], register(type(given)))
    # What a config that was loaded has as its own: its class's type, and code without the patch.
    for name in ("model_type", "auto_map"):
        vars(config).pop(name, None)
    setattr(config, PATCH, record)
    for module in model.modules():
        if id(vars(module).get("config")) in own:
            module.config = own[id(vars(module)["config"])]
    model.__class__ = patched_model_class(type(model))
    # The patched model saves the names that it has, not those of the host's checkpoint.
    model._weight_conversions = None  # type: ignore[assignment]


def load_patched(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a patched model that ``save_pretrained`` wrote, of the class that it had, in evaluation
    mode; options are those of transformers' ``from_pretrained`` (dtype, device_map, ...).

    Raises:
        UserError: no patched model there, a transformers without its class, or a tensor missing or
            unexpected.
    """
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; give the folder that a patched model was saved to") from None
    if not isinstance(saved, dict) or saved.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder} holds no model patched by motifarch; load it with transformers, then patch it")
    name = str((saved.get("architectures") or [""])[0]).removeprefix("Patched")
    host = getattr(transformers, name, None)
    if not (isinstance(host, type) and issubclass(host, PreTrainedModel)):
        raise UserError(f"{path} names the architecture {name!r}, which transformers {transformers.__version__} lacks")
    if any((Path(folder) / file).is_file() for file in file_names(options.get("variant"))):
        WeightFiles(Path(folder), options.get("variant"))
    loaded: Any = patched_model_class(host).from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys"):
        if info[kind]:
            raise UserError(f"{folder}: {kind.replace('_keys', '')} tensors: {', '.join(sorted(info[kind])[:5])}")
    return model  # type: ignore[no-any-return]
