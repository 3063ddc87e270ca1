"""Which code and machine did it."""

import hashlib
from functools import cache
from pathlib import Path

import motif_kernels
import motifarch


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
