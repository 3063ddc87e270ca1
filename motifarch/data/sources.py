"""Where text comes from: the standard library, files here or in a store, a Hugging Face dataset."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from motifarch.data.documents import Found, ReadOptions, Skipped, printable
from motifarch.data.find_files import NamedFile, file_state, files_below, matching_files, walk
from motifarch.data.hub_source import HubSource
from motifarch.data.readers import read_file
from motifarch.data.remote_files import AnyFile, RemoteFile, remote_files
from motifarch.errors import UserError
from motifarch.storage import is_url

KINDS = "stdlib, files:GLOB or hf:NAME[:CONFIG], or a URL such as s3://BUCKET/GLOB"
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


class Source(Protocol):
    """A stream of documents in a fixed order."""

    def state(self) -> dict[str, Any]:
        """Its "name", and what tells cheaply, without reading text, whether it is the same."""

    def documents(self, options: ReadOptions) -> Iterator[Found]:
        """Read it from the beginning."""


@dataclass(frozen=True)
class FileSource:
    """Files, in the order of their names."""

    spec: str
    files: Sequence[tuple[str, AnyFile]] = field(repr=False)
    left_out: list[Skipped] = field(default_factory=list, repr=False)
    """What was found beside the files."""

    def state(self) -> dict[str, Any]:
        """Number, size and time stamps of the files."""
        return {"name": printable(self.spec), **file_state(self.files)}

    def documents(self, options: ReadOptions) -> Iterator[Found]:
        """Read the files one after another."""
        yield from self.left_out
        for name, path in self.files:
            yield from read_file(path, name, options)


def each_file_once(sources: Sequence[Source]) -> list[Source]:
    """The sources, of which those that come later lack the files that an earlier one has."""
    owners: dict[str, str] = {}
    result: list[Source] = []
    for source in sources:
        if isinstance(source, FileSource):
            mine = {path: _identity(path) for _, path in source.files}
            files = [(name, path) for name, path in source.files if mine[path] not in owners]
            again = [
                Skipped(name, f"read already by --source {owners[mine[path]]}")
                for name, path in source.files
                if mine[path] in owners
            ]
            owners |= {mine[path]: printable(source.spec) for _, path in files}
            source = replace(source, files=files, left_out=[*source.left_out, *again])
        result.append(source)
    return result


def _identity(file: AnyFile) -> str:
    return file.url if isinstance(file, RemoteFile) else os.path.realpath(file)


def parse_source(spec: str, *, hf_split: str = "train", streaming: bool = False) -> Source:
    """Turn a ``--source`` option (``stdlib``, ``files:GLOB``, a URL, ``hf:NAME[:CONFIG]``) into a
    source.

    Streaming reads a Hugging Face dataset as it downloads.

    Raises:
        UserError: for another kind of source, a glob that matches no file, or a store out of reach.
    """
    kind, _, rest = spec.partition(":")
    if spec == "stdlib":
        return FileSource(spec, _stdlib_files())
    if kind in ("file", "local") and rest.startswith("//"):
        kind, rest = "files", rest[2:]
    if is_url(url := rest if kind == "files" else spec):
        files, left_out = remote_files(url)
        return FileSource(spec, files, left_out)
    if kind == "files" and rest:
        found = matching_files(rest)
        return FileSource(spec, found.files, found.left_out)
    if kind == "hf" and rest:
        local = Path(rest).expanduser()
        if local.is_file():
            return FileSource(spec, [(printable(local.name), local)])
        if local.exists():
            state = {"name": printable(spec), **file_state(files_below(local))}
            return HubSource(spec, str(local), None, hf_split, streaming, state)
        name, _, config = rest.partition(":")
        return HubSource(spec, name, config or None, hf_split, streaming, {"name": spec})
    raise UserError(f"--source {spec!r}: take {KINDS}")


def _stdlib_files() -> list[NamedFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = walk(root, lambda name: name not in _NOT_LIBRARY, lambda name: name.endswith(".py")).files
    if not files:
        raise UserError(
            f"--source stdlib: {root} holds no .py files (this interpreter's library is packed away): "
            "take an interpreter that has them, or another source"
        )
    return files
