"""Which files a URL or a pattern of one names: s3://, gs://, hf://, memory://, by fsspec."""

import io
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from motifarch.data.documents import Skipped, printable
from motifarch.data.patterns import expand_braces, is_shown, path_matches
from motifarch.errors import UserError
from motifarch.storage import explained, filesystem

_BLOCK_BYTES = 2**23
"""Of a file, that are fetched and kept at once."""

# What tells that a file's content has changed, the best first; stores name it differently.
_VERSIONS = (
    "ETag",
    "etag",
    "blob_id",
    "md5Hash",
    "generation",
    "mtime",
    "LastModified",
    "updated",
    "modified",
    "created",
)


@dataclass(frozen=True)
class RemoteFile:
    """A file of an object store, with as much of a `Path` as readers need."""

    url: str
    filesystem: Any = field(repr=False, compare=False)
    path: str
    size: int
    """Bytes."""
    version: str
    """What changes with the content: an entity tag, or a time."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """The last suffix, with its point."""
        return PurePosixPath(self.path).suffix

    @property
    def stem(self) -> str:
        """The name without that."""
        return PurePosixPath(self.path).stem

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open it to read, from a place to place; some megabytes of it are kept at once.

        Raises:
            UserError: it can't be read, now or later.
        """
        with explained(self.url):
            file = self.filesystem.open(self.path, mode, block_size=_BLOCK_BYTES)
        return io.BufferedReader(_Explained(file, self.url), 2**16)


AnyFile = Path | RemoteFile


class _Explained(io.RawIOBase):
    """A network that fails in the middle of a file is an error, while damaged text is skipped."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with explained(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def remote_files(url: str) -> tuple[list[tuple[str, RemoteFile]], list[Skipped]]:
    """The files of a URL, by name: a file, all below a folder, or what a pattern matches, in which
    ``*``, ``**``, ``?``, ``[ab]`` and ``{a,b}`` mean what they do for local files; and what is left
    out.

    Raises:
        UserError: there is no such file; the store can't be reached, or refuses.
    """
    found: dict[str, RemoteFile] = {}
    left_out: dict[str, str] = {}
    for plain in expand_braces(url):
        system, path = filesystem(plain)
        with explained(plain):
            system.invalidate_cache()  # of what another call listed before
            for entry in _listed(system, path.rstrip("/"), left_out):
                name = entry["name"]
                found[name] = RemoteFile(
                    system.unstrip_protocol(name), system, name, entry["size"] or 0, _version(entry)
                )
            bucket = path.lstrip("/").partition("/")[0]
            if not found and bucket and not system.exists(bucket):
                raise UserError(f"--source {printable(url)}: there is no {bucket!r}; check the name")
    if not found:
        reasons = "".join(f"; {name} is left out ({reason})" for name, reason in list(left_out.items())[:3])
        raise UserError(
            f"--source {printable(url)} matches no file{reasons}: check bucket and path, quote the pattern so that the "
            "shell leaves it alone, and use ** for folders at any depth"
        )
    base = posixpath.commonpath([f"/{posixpath.dirname(path)}" for path in found])
    named = sorted((printable(posixpath.relpath(f"/{path}", base)), file) for path, file in found.items())
    return named, [Skipped(printable(name), reason) for name, reason in sorted(left_out.items())]


def _listed(system: Any, path: str, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Files as the store describes them."""
    parts = path.split("/")
    # A name may hold a pattern's letters, so what exists is taken as it is.
    if found := _existing(system, path):
        if found["type"] == "file":
            yield found
            return
        pattern, folder, depth = ["**"], path, None
    else:
        plain = next((n for n, part in enumerate(parts) if any(letter in part for letter in "*?[")), len(parts))
        if plain == len(parts):
            return
        folder, pattern = "/".join(parts[:plain]), parts[plain:]
        depth = None if "**" in pattern else len(pattern)
    begin = len(folder) + 1 if folder else 0
    hidden = any(part.startswith(".") for part in pattern)
    entries = system.find(folder, maxdepth=depth, withdirs=depth is not None, detail=True)
    for name, entry in sorted(entries.items()):
        below = name[begin:].split("/") if name[begin:] else []
        if not below or not below[-1] or not path_matches(below, pattern):
            continue  # some stores list folders as empty files
        if entry["type"] == "directory":
            left_out[f"{name}/"] = "a folder, of which a pattern takes nothing: name it, or use **"
        elif hidden or all(map(is_shown, below)):
            yield entry
        elif found:
            left_out[name[begin:]] = "hidden file"


def _existing(system: Any, path: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = system.info(path)
    except (FileNotFoundError, ValueError):  # the second where a pattern's letters are no name
        return None
    return found


def _version(entry: dict[str, Any]) -> str:
    return next((str(entry[key]) for key in _VERSIONS if entry.get(key)), "")
