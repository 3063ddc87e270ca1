"""Where text comes from: the standard library, local files, or a Hugging Face dataset."""

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from motifarch.data.documents import Document, Skipped
from motifarch.data.hub_source import HubSource
from motifarch.data.readers import read_file
from motifarch.errors import UserError

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


class Source(Protocol):
    """A stream of documents in a fixed order."""

    def state(self) -> dict[str, Any]:
        """Its "name", and what tells cheaply, without reading text, whether it is the same."""

    def documents(self) -> Iterator[Document | Skipped]:
        """Read it from the beginning."""


@dataclass(frozen=True)
class FileSource:
    """Local files, in the order of their names."""

    spec: str
    text_field: str
    files: list[tuple[str, Path]] = field(repr=False)
    """(name in messages, path) of each file."""

    def state(self) -> dict[str, Any]:
        """Number, size and time stamps of the files."""
        return {"name": self.spec, **file_state(self.files)}

    def documents(self) -> Iterator[Document | Skipped]:
        """Read the files one after another."""
        for name, path in self.files:
            yield from read_file(path, name, self.text_field)


def parse_source(spec: str, *, text_field: str, hf_split: str, streaming: bool) -> Source:
    """Turn a ``--source`` option (``stdlib``, ``files:GLOB``, ``hf:NAME[:CONFIG]``) into a source.

    A record's text is in ``text_field``. Streaming reads a Hugging Face dataset as it downloads.

    Raises:
        UserError: for another kind of source, or a glob that matches no file.
    """
    kind, _, rest = spec.partition(":")
    if spec == "stdlib":
        return FileSource(spec, text_field, _stdlib_files())
    if kind == "files" and rest:
        return FileSource(spec, text_field, _matching_files(rest))
    if kind == "hf" and rest:
        local = Path(rest).expanduser()
        if local.exists():
            state = {"name": spec, **file_state(_files_below(local))}
            return HubSource(spec, str(local), None, hf_split, text_field, streaming, state)
        name, _, config = rest.partition(":")
        return HubSource(spec, name, config or None, hf_split, text_field, streaming, {"name": spec})
    raise UserError(f"--source {spec!r}: take stdlib, files:GLOB or hf:NAME[:CONFIG]")


def file_state(files: list[tuple[str, Path]]) -> dict[str, Any]:
    """Number and size of files, and a hash of their names, sizes and times of change."""
    digest, size = hashlib.sha256(), 0
    for name, path in files:
        stat = path.stat()
        size += stat.st_size
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return {"files": len(files), "bytes": size, "stamp": digest.hexdigest()[:32]}


def path_state(path: Path) -> dict[str, Any]:
    """The same for a file or for all files below a folder."""
    return file_state(_files_below(path))


def _files_below(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        return [(path.name, path)]
    return _walk(path, lambda name: not name.startswith("."), lambda name: not name.startswith("."))


def _walk(root: Path, enter: Callable[[str], bool], take: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """(name below the root, path) of the files to take in the folders to enter, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = filter(enter, subfolders)
        found += [Path(folder, name) for name in filter(take, names)]
    return sorted((file.relative_to(root).as_posix(), file) for file in found if file.is_file())


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, lambda name: name not in _NOT_LIBRARY, lambda name: name.endswith(".py"))
    if not files:
        raise UserError(
            f"--source stdlib: {root} holds no .py files (this interpreter's library is packed away): "
            "take an interpreter that has them, or another source"
        )
    return files


def _matching_files(pattern: str) -> list[tuple[str, Path]]:
    files: dict[str, Path] = {}
    for plain in _expand_braces(os.path.expanduser(pattern)):
        if os.path.isdir(plain):
            found = [path for _, path in _files_below(Path(plain))]
        else:
            found = [Path(match) for match in glob.iglob(plain, recursive=True) if os.path.isfile(match)]
        files.update((str(path), path) for path in found)
    if not files:
        raise UserError(
            f"--source files:{pattern} matches no file: check the path, quote the pattern so that the shell leaves it "
            "alone, and use ** for folders at any depth"
        )
    # Names start where all files' folders part, so that they do not depend on where the data lies.
    base = os.path.commonpath([str(path.parent) for path in files.values()])
    return sorted((path.relative_to(base).as_posix(), path) for path in files.values())


def _expand_braces(pattern: str) -> list[str]:
    """``a{b,c}d`` -> ``abd``, ``acd``, as a shell does; the innermost pair first."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [plain for choice in match[1].split(",") for plain in _expand_braces(head + choice + tail)]
