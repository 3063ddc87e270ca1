"""Writes the model code into a Hugging Face folder, and its place into the config."""

from pathlib import Path
from typing import Any

import motifarch
from motifarch.errors import UserError
from motifarch.files import atomic_write, write_json
from motifarch.model_folder import explained, read_object
from motifarch.models.motif import MODEL_TYPES, MotifConfig
from motifarch.portable.modeling_motif import check_generation

CODE_FILE = "modeling_motif.py"
_MARK = "# Written by motifarch"
_HEADER = f"""{_MARK} {motifarch.__version__} (motifarch export --with-code): a copy of its portable/{CODE_FILE}.
# SPDX-License-Identifier: Apache-2.0
"""
_CLASSES = {"AutoConfig": "MotifConfig", "AutoModel": "MotifModel", "AutoModelForCausalLM": "MotifForCausalLM"}


def add_code(folder: Path) -> Path:
    """Make a Motif model's folder load without motifarch, with ``trust_remote_code=True``.

    Writes the code, and names its classes in the config's ``auto_map``; weights and other files are
    not touched. With ``motifarch.models`` imported, the folder still loads as motifarch's own
    classes.

    Args:
        folder: a Hugging Face folder; one that was written by :func:`add_code` is brought up to
            date.

    Returns:
        The file of code.

    Raises:
        UserError: no Motif model is there, or one that brings code of its own.
    """
    config = _read_config(folder / "config.json")
    _check_no_other_code(folder, config)
    target = folder / CODE_FILE
    source = Path(__file__).with_name(CODE_FILE).read_text(encoding="utf-8")
    with atomic_write(target) as file:
        file.write(_HEADER + source)
    # Last: the config must never name code that is not there.
    classes = {auto: f"{target.stem}.{name}" for auto, name in _CLASSES.items()}
    write_json(folder / "config.json", config | {"auto_map": (config.get("auto_map") or {}) | classes})
    return target


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{path} has model_type {kind!r}; code is written for {' and '.join(MODEL_TYPES)} models only")
    with explained(f"{path} is of no model that motifarch can compute"):
        MotifConfig.from_dict(config)
        check_generation(config)
    return config


def _check_no_other_code(folder: Path, config: dict[str, Any]) -> None:
    named = [entry for entry in (config.get("auto_map") or {}).values() if isinstance(entry, str) and "--" not in entry]
    for name in {CODE_FILE, *(f"{entry.partition('.')[0]}.py" for entry in named)}:
        path = folder / name
        if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
            raise UserError(
                f"{path} was not written by motifarch: the folder brings code of its own and should load with "
                "trust_remote_code=True as it is; to have motifarch's instead, move that file away first"
            )
