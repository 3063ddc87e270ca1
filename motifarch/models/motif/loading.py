"""Loads a folder whole or not at all, where transformers fills gaps and warns."""

import os
from pathlib import Path
from typing import Any

from motifarch.weight_files import ModelFolderError, WeightFiles, file_names, listed


class WholeOrNothing:
    """Goes before PreTrainedModel among the bases: a strict ``from_pretrained``."""

    new_head: str | None = None
    """A module that starts at random where a folder of another model class lacks it."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The ``from_pretrained`` of transformers, which takes more arguments than are named here.

        ``ignore_mismatched_sizes`` accepts tensors of another shape: they start at random.
        ``output_loading_info`` returns the report too, and accepts missing and unexpected tensors:
        the caller looks. A name may be None with ``state_dict`` and ``config``.

        Raises:
            ValueError: tp_plan for a model that is not cut.
            ModelFolderError: a tensor is missing, unexpected or of another shape; a local folder's
                file is missing or damaged, or its index names what is not there. Nothing is
                written.
        """
        name = pretrained_model_name_or_path
        in_safetensors = kwargs.get("use_safetensors") is not False and kwargs.get("gguf_file") is None
        if name is not None and os.path.isdir(name) and kwargs.get("state_dict") is None and in_safetensors:
            folder, variant = Path(name) / kwargs.get("subfolder", ""), kwargs.get("variant")
            if any((folder / file).is_file() for file in file_names(variant)):
                WeightFiles(folder, variant)  # reads all headers; a folder without is left to transformers
        parent: Any = super()
        model, report = parent.from_pretrained(
            name,
            *model_args,
            # Mismatches are then reported, where transformers would raise without a name.
            ignore_mismatched_sizes=ignore_mismatched_sizes or not output_loading_info,
            output_loading_info=True,
            **kwargs,
        )
        if kwargs.get("tp_plan") is not None and not model.config.base_model_tp_plan:
            raise ValueError(
                f"tp_plan={kwargs['tp_plan']!r} can't cut this model: latent attention, experts and hyper-connections "
                "are not cut over ranks of tensor parallelism; leave it out, or shard with FSDP"
            )
        if output_loading_info:
            return model, report
        optional = None if cls.__name__ in (model.config.architectures or ()) else cls.new_head
        problems = _problems(report, ignore_mismatched_sizes, optional)
        if problems:
            source = "the state_dict" if kwargs.get("state_dict") is not None else str(name)
            raise ModelFolderError(
                f"{source} does not fit {cls.__name__} with its config: {'; '.join(problems)}. Tensors and config must "
                "be one model's; output_loading_info=True loads what fits, and starts what is missing at random"
            )
        return model


def _problems(report: dict[str, Any], ignore_mismatched_sizes: bool, optional: str | None) -> list[str]:
    missing = [key for key in report["missing_keys"] if optional is None or not key.startswith(f"{optional}.")]
    found = {"missing": missing, "unexpected": report["unexpected_keys"]}
    problems = [f"{kind} {listed(keys)}" for kind, keys in found.items() if keys]
    if report["mismatched_keys"] and not ignore_mismatched_sizes:
        shapes = {f"{name} {tuple(theirs)} for {tuple(ours)}" for name, theirs, ours in report["mismatched_keys"]}
        problems.append(f"of another shape {listed(shapes)}")
    return problems
