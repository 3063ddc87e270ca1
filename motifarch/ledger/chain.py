"""The ledger of a run or of a model's folder: an entry for the first weights, for each checkpoint
and for what was made of it, each with the hash of the entry that it goes on from.

`ledger/entries.jsonl` is only ever appended to. An entry says what was saved (the manifest's hash,
and Merkle roots over the tensors) and what it was made with (recipe, data, tokenizer, code,
environment, the metrics' rows since its parent). It stays when the checkpoint is deleted. What is
long lies beside it in a file that is named by its hash.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from motifarch.files import SEAL, atomic_write
from motifarch.ledger.link import KEPT, is_link

FOLDER, ENTRIES = "ledger", "entries.jsonl"
FORMAT = 1
_LONGEST = 1 << 20
"""Bytes, more than a line has."""


def canonical(content: Any) -> bytes:
    """JSON as it is hashed: keys sorted, no space, UTF-8."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(content: Any) -> str:
    """The SHA-256 of JSON."""
    return hashlib.sha256(canonical(content)).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One line."""

    step: int
    """Optimizer steps done."""
    manifest: str | None
    """The hash that the checkpoint's manifest has of itself; None of first weights."""
    link: Mapping[str, Any]
    """What it was made from and with; ``parent`` is the hash of the entry before it."""
    hash: str
    """Of all that."""
    signature: Mapping[str, str] | None = None
    """``key`` and ``signature``, over the hash."""

    @property
    def parent(self) -> str | None:
        """The hash of the entry that it goes on from; None of the first."""
        parent: str | None = self.link["parent"]
        return parent

    def line(self) -> bytes:
        """As the file has it."""
        content = {"format": FORMAT, "step": self.step, "manifest": self.manifest, "link": dict(self.link)}
        signed = {} if self.signature is None else {"signature": dict(self.signature)}
        return canonical(content | {SEAL: self.hash} | signed) + b"\n"


def outside(chain: Iterable[Entry]) -> list[str]:
    """What came from outside, by name, of what entries were made of."""
    origins = (entry.link.get("origin") or {} for entry in chain)
    return [origin["outside"] for origin in origins if "outside" in origin]


def make_entry(step: int, manifest: str | None, link: Mapping[str, Any]) -> Entry:
    """An entry, with its hash."""
    content = {"format": FORMAT, "step": step, "manifest": manifest, "link": dict(link)}
    return Entry(step, manifest, link, digest(content))


@dataclass
class Ledger:
    """What a ledger's file holds."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    """In the file's order."""
    problems: list[str] = field(default_factory=list)
    """Lines that are no entries, and entries that do not hold together."""

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """Reads the ledger in a run's or an export's folder; one that is not there has no entries.

        A last line that a crash has cut short is left out.
        """
        found = cls(folder / FOLDER / ENTRIES)
        try:
            lines = found.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return found
        except OSError as error:
            found.problems.append(f"{found.path.name} can't be read: {error.strerror}")
            return found
        known: set[str] = set()
        for number, line in enumerate(lines[:-1], 1):
            entry = _parsed(line)
            if isinstance(entry, str):
                found.problems.append(f"line {number} {entry}")
                continue
            if entry.parent is not None and entry.parent not in known:
                found.problems.append(f"line {number} (step {entry.step}) goes on from an entry that is not before it")
            if entry.parent is None and entry.step and not entry.link.get("origin"):
                found.problems.append(f"line {number} (step {entry.step}) goes on from nothing")
            known.add(entry.hash)
            found.entries.append(entry)
        return found

    def of_manifest(self, manifest: str) -> Entry | None:
        """The entry of a checkpoint."""
        return next((e for e in reversed(self.entries) if e.manifest == manifest), None)

    def back_from(self, entry: Entry) -> Iterator[Entry]:
        """Yields an entry and those that it stands on, back to the first or to a gap."""
        by_hash = {e.hash: e for e in self.entries}
        at: Entry | None = entry
        while at is not None:
            yield at
            at = by_hash.get(at.parent) if at.parent is not None else None

    def take_over(self, other: "Ledger", last: Entry) -> None:
        """Adds the entries that another ledger's entry stands on, with it, and what lies beside
        them; what is missing there is missing here.

        Raises:
            OSError: they can't be written.
        """
        known = {entry.hash for entry in self.entries}
        for entry in reversed([entry for entry in other.back_from(last) if entry.hash not in known]):
            for name in KEPT:
                with contextlib.suppress(ValueError, KeyError):
                    self.keep(other.kept(entry.link[name]))
            self.append(entry)

    def append(self, entry: Entry) -> None:
        """Adds an entry, on the disk before this returns.

        Raises:
            OSError: it can't be written.
        """
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a+b") as file:
            _cut_to_whole_lines(file)
            file.write(entry.line())
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def keep(self, content: Any) -> str:
        """Writes JSON into a file of its hash, unless it is there; returns the hash.

        Raises:
            OSError: it can't be written.
        """
        name = digest(content)
        path = self.path.with_name(f"{name}.json")
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path, binary=True) as file:
                file.write(canonical(content))
        return name

    def kept(self, name: str) -> Any:
        """What was kept under a hash.

        Raises:
            ValueError: it is missing, or has changed.
        """
        try:
            content = self.path.with_name(f"{name}.json").read_bytes()
        except OSError as error:
            raise ValueError(f"{name}.json can't be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != name:
            raise ValueError(f"{name}.json has changed since it was written")
        return json.loads(content)


def _parsed(line: bytes) -> Entry | str:
    """An entry, or what is wrong with it."""
    try:
        content = json.loads(line)
        if content.get("format") != FORMAT:
            return f"is of format {content.get('format')!r}, which this version does not know"
        entry = make_entry(content["step"], content["manifest"], content["link"])
        if entry.hash != content[SEAL]:
            return f"(step {entry.step}) has changed since it was written (its SHA-256 differs)"
        if not is_link(entry.link):
            return f"(step {entry.step}) lacks what an entry of its kind says"
        signature = content.get("signature")
        signed = signature is None or {type(signature["key"]), type(signature["signature"])} == {str}
        if type(entry.step) is not int or not isinstance(entry.manifest, str | None) or not signed:
            return "is damaged"
        return Entry(entry.step, entry.manifest, entry.link, entry.hash, signature)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "is damaged"


def _cut_to_whole_lines(file: BinaryIO) -> None:
    """Removes the beginning of a line that a crash has cut short: it never was an entry."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - _LONGEST)
    file.seek(start)
    tail = file.read()
    if tail and not tail.endswith(b"\n"):
        file.truncate(start + tail.rfind(b"\n") + 1)
