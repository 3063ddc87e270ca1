"""Which files a path or a pattern names, each once, and what is left out of them."""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motifarch.data.documents import Skipped, printable
from motifarch.data.patterns import expand_braces, is_shown, path_matches
from motifarch.data.readers import RECORDS, file_kind
from motifarch.data.remote_files import AnyFile, RemoteFile
from motifarch.errors import UserError, first_line

NamedFile = tuple[str, Path]
"""(name in messages, path)"""


@dataclass
class FoundFiles:
    """Files in the order of their names, and what was found beside them."""

    files: list[NamedFile] = field(default_factory=list)
    left_out: list[Skipped] = field(default_factory=list)


def matching_files(pattern: str) -> FoundFiles:
    """The files of ``files:PATTERN``: a path that exists, as it is, or a glob; a folder means all
    below it, through links too. A file that is reached in several ways is taken once.

    Raises:
        UserError: there is no such file.
    """
    found, folders = FoundFiles(), set()
    plain = os.path.expanduser(pattern)
    for path in [Path(plain)] if os.path.lexists(plain) else _expand(plain, found):
        if path.is_dir() and os.path.lexists(plain):
            below = walk(path, is_shown, is_shown)
            found.files += below.files
            found.left_out += below.left_out
        elif path.is_dir():
            folders.add(path)
        elif path.is_file():
            found.files.append((path.name, path))
        else:
            found.left_out.append(Skipped(printable(path), _kind_of(path)))
    # A pattern that meets a folder may mean what is in it.
    folders -= {parent for _, path in found.files for parent in path.parents}
    reason = "a folder, of which a pattern takes nothing: name it, or use **"
    found.left_out += [Skipped(f"{printable(folder)}/", reason) for folder in sorted(folders) if any(folder.iterdir())]
    if not found.files:
        reasons = "".join(f"; {skipped.name} is left out ({skipped.reason})" for skipped in found.left_out[:3])
        raise UserError(
            f"--source files:{printable(pattern)} matches no file{reasons}: check the path, quote the pattern so that "
            "the shell leaves it alone, and use ** for folders at any depth"
        )
    # Names start where all files' folders part, so that they do not depend on where the data lies.
    base = os.path.commonpath([os.path.abspath(path.parent) for _, path in found.files])
    found.files = sorted((printable(os.path.relpath(path, base)), path) for _, path in found.files)
    return _each_once(found)


def files_below(path: Path) -> list[NamedFile]:
    """A file, or all files below a folder."""
    return [(path.name, path)] if path.is_file() else walk(path, is_shown, is_shown).files


def walk(root: Path, enter: Callable[[str], bool], take: Callable[[str], bool]) -> FoundFiles:
    """The files to take in the folders to enter, through links, each folder once."""
    found = FoundFiles()
    seen = {os.path.realpath(root)}

    def cannot_list(error: OSError) -> None:
        found.left_out.append(Skipped(_name(error.filename), f"unreadable folder: {first_line(error)}"))

    def _name(path: str | Path) -> str:
        return printable(os.path.relpath(path, root))

    for folder, subfolders, names in os.walk(root, onerror=cannot_list, followlinks=True):
        entered = []
        for name in sorted(subfolders):
            path = Path(folder, name)
            real = os.path.realpath(path)
            if not enter(name):
                found.left_out.append(Skipped(f"{_name(path)}/", "hidden folder"))
            elif real in seen:
                found.left_out.append(Skipped(f"{_name(path)}/", "link to a folder that is read already"))
            else:
                seen.add(real)
                entered.append(name)
        subfolders[:] = entered
        for name in names:
            path = Path(folder, name)
            if not take(name):
                found.left_out.append(Skipped(_name(path), "hidden file"))
            elif path.is_file():
                found.files.append((_name(path), path))
            else:
                found.left_out.append(Skipped(_name(path), _kind_of(path)))
    found.files.sort()
    found.left_out.sort(key=lambda skipped: skipped.name)
    return found


def file_state(files: Sequence[tuple[str, AnyFile]]) -> dict[str, Any]:
    """Number and size of files, and a hash of their names, sizes and times of change, or of what
    else a store tells their versions by.
    """
    digest, size = hashlib.sha256(), 0
    for name, file in files:
        if isinstance(file, RemoteFile):
            length, version = file.size, file.version
        else:
            stat = file.stat()
            length, version = stat.st_size, str(stat.st_mtime_ns)
        size += length
        digest.update(f"{name}\0{length}\0{version}\n".encode("utf-8", "surrogateescape"))
    return {"files": len(files), "bytes": size, "stamp": digest.hexdigest()[:32]}


def _kind_of(path: Path) -> str:
    return "not a regular file" if path.exists() else "broken link"


def _each_once(found: FoundFiles) -> FoundFiles:
    """One name for each file: one that says what it holds, and of these rather no link."""
    names: dict[str, list[NamedFile]] = {}
    for name, path in found.files:
        names.setdefault(os.path.realpath(path), []).append((name, path))
    kept = []
    for same in names.values():
        first, *others = sorted(same, key=lambda f: (file_kind(f[1]) not in RECORDS, f[1].is_symlink(), f[0]))
        kept.append(first)
        found.left_out += [Skipped(name, f"same file as {first[0]}") for name, path in others if path != first[1]]
    return FoundFiles(sorted(kept), found.left_out)


def _expand(pattern: str, found: FoundFiles) -> Iterator[Path]:
    """What a glob matches: its beginning as it is, as far as that exists, then braces and stars."""
    parts = pattern.split("/")
    known = next((n for n in range(len(parts) - 1, 0, -1) if os.path.isdir("/".join(parts[:n]) or "/")), 0)
    literal = "".join(f"{part}/" for part in parts[:known])
    for plain in expand_braces("/".join(parts[known:])):
        yield from map(Path, _glob(literal, plain.split("/"), found))


def _glob(folder: str, parts: list[str], found: FoundFiles) -> Iterator[str]:
    """The files and folders below a folder whose path the parts match, one part a level."""
    stars = parts.index("**") if "**" in parts else len(parts)
    matches = glob.iglob(glob.escape(folder) + "/".join(parts[:stars])) if stars else iter([folder or "."])
    if stars == len(parts):
        yield from matches
        return
    # Not by glob, which goes round in circles where links do.
    hidden = any(part.startswith(".") for part in parts[stars:])
    for root in filter(os.path.isdir, matches):
        below = walk(Path(root), *[lambda name: hidden or is_shown(name)] * 2)
        found.left_out += [skipped for skipped in below.left_out if not skipped.reason.startswith("hidden")]
        yield from (str(path) for _, path in below.files if path_matches(path.relative_to(root).parts, parts[stars:]))
