"""A document, or the reason why there is none: what every source yields."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_NAMES_KEPT = 100


@dataclass(frozen=True)
class Document:
    """One text: a file, or a record of a file or dataset."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A file or record that holds no usable text."""

    name: str
    reason: str


def document(name: str, content: object) -> Document | Skipped:
    """Check a file's bytes or a record's text."""
    if isinstance(content, bytes):
        if b"\0" in content:
            return Skipped(name, "binary")
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Skipped(name, "not UTF-8")
    if not isinstance(content, str):
        return Skipped(name, "no text")
    if "\0" in content:
        return Skipped(name, "binary")
    if not content.strip():
        return Skipped(name, "empty")
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return Skipped(name, "not valid Unicode")
    return Document(name, content)


@dataclass
class SkipLog:
    """Counts what was skipped, by reason, and keeps the first names."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, skipped: Skipped) -> None:
        """Note one more."""
        self.counts[skipped.reason] += 1
        names = self.names.setdefault(skipped.reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(skipped.name)

    def summary(self, shown: int = 3) -> str:
        """One line for people: counts by reason, each with its first names."""
        parts = []
        for reason, count in self.counts.most_common():
            more = ", ..." if count > shown else ""
            parts.append(f"{count:,} {reason} ({', '.join(self.names[reason][:shown])}{more})")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """What ``data.json`` holds."""
        reasons = {reason: {"count": count, "names": self.names[reason]} for reason, count in self.counts.most_common()}
        return {"count": self.counts.total(), "reasons": reasons}
