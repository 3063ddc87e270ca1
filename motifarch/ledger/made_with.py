"""Which code, versions and machine an entry was made with."""

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import motif_kernels
import motifarch
from motifarch.environment import git_state, installed_version

_PACKAGES = ("motifarch", "torch", "triton", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def environment(machine: Mapping[str, Any]) -> dict[str, Any]:
    """For a file beside the ledger; `machine` is what else decides results: devices, ranks."""
    return {
        "code": {"sources": sources_hash(), "git": git_state()},
        "versions": {name: version for name in _PACKAGES if (version := installed_version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        **machine,
    }


@cache
def sources_hash() -> str:
    """The SHA-256 over the names and contents of the two packages' Python files."""
    found = hashlib.sha256()
    for package in (motifarch, motif_kernels):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{root.name}/{path.relative_to(root).as_posix()} {content}\n".encode())
    return found.hexdigest()
