"""``auto_map``, in a config: the code that a model's folder brings, for those who lack ours."""

import os
import shutil
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files


class AutoMapMixin:
    """Mixed into the config classes of models that transformers does not have.

    transformers gives ``auto_map`` to configs made by a folder's own code. TRL, given a folder,
    reads it of every model that transformers does not have.
    """

    _name_or_path: str

    @cached_property
    def auto_map(self) -> dict[str, Any]:
        """An Auto class -> "module.Class" of the folder's code; empty where it brings none."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """All fields, with ``auto_map`` if it says something."""
        config: Any = super()
        output: dict[str, Any] = config.to_dict()
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers does. The code that ``auto_map`` names goes along, from the folder that
        the config was loaded from: it then loads without motifarch as that did.
        """
        source, target = self._name_or_path, Path(save_directory)
        entries = [entry for entry in (self.auto_map or {}).values() if isinstance(entry, str)]
        own = [entry for entry in entries if "--" not in entry]  # others are in a folder that they name
        names = {f"{entry.partition('.')[0]}.py" for entry in own}
        found = [Path(source) / name for name in names if source and (Path(source) / name).is_file()]
        if names - {file.name for file in found} - {name for name in names if (target / name).is_file()}:
            warnings.warn(
                f"{source or 'its folder'} lacks the code that the config's auto_map names: {target} is saved without, "
                "and loads after `import motifarch.models`; `motifarch export FOLDER --with-code` adds code",
                stacklevel=2,
            )
            self.auto_map, found = {}, []
        target.mkdir(parents=True, exist_ok=True)
        for file in found:
            for part in (file, *map(Path, get_relative_import_files(file))):
                if part.resolve() != (target / part.name).resolve():
                    shutil.copyfile(part, target / part.name)
        config: Any = super()
        config.save_pretrained(save_directory, push_to_hub, **kwargs)  # last: it never names code that is not there
