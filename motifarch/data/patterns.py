"""Patterns of file names, as a shell has them."""

import fnmatch
import re
from collections.abc import Sequence


def is_shown(name: str) -> bool:
    """Whether it is no hidden file or folder."""
    return not name.startswith(".")


def expand_braces(pattern: str) -> list[str]:
    """``a{b,c}d`` -> ``abd``, ``acd``, as a shell does; the innermost pair first."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [plain for choice in match[1].split(",") for plain in expand_braces(head + choice + tail)]


def path_matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which ** is any number of them."""
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return path_matches(path, pattern[1:]) or path_matches(path[1:], pattern)
    return fnmatch.fnmatchcase(path[0], pattern[0]) and path_matches(path[1:], pattern[1:])
