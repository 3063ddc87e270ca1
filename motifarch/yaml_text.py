"""Reads YAML as version 1.2's core schema has it, and refuses what is a slip or an attack."""

import re
from typing import Any

import yaml

from motifarch.errors import UserError, first_line

MOST_CHARACTERS = 2**20
"""Of a text."""

_MOST_VALUES = 100_000  # with aliases written out, which make billions of a few lines


class _Loader(yaml.SafeLoader):
    """Keys are texts. One that is given twice is refused, of which YAML would take the last; so is
    a value that its tag can't be made from.
    """

    # Not version 1.1's, to which no is false, 1:30 is 90, 010 is 8 and 2026-01-01 is a date.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as PyYAML declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice; keep one", problem_mark=key.start_mark)
            seen.append(key.value)
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, AttributeError, KeyError) as error:
            raise yaml.MarkedYAMLError(problem=first_line(error), problem_mark=node.start_mark) from None


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16 if "x" in text else 10)  # 010 is ten, which version 1.1 takes for eight


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str, this: str) -> Any:
    """What a YAML text holds.

    Args:
        text: the text.
        this: what messages call it.

    Raises:
        UserError: it is not valid, a key is there twice, or it is too deep or too large.
    """
    try:
        loader = _Loader(text[: MOST_CHARACTERS + 1])
        node = loader.get_single_node()
        if len(text) > MOST_CHARACTERS or (node is not None and _values(node, {}) > _MOST_VALUES):
            raise UserError(f"{this} is too large; settings of at most {_MOST_VALUES:,} values are accepted")
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{this} is not valid YAML{where}: {problem}") from None
    except RecursionError:
        raise UserError(f"{this} is nested too deep; settings take a few levels") from None


def _values(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """How many values a node stands for, with its aliases written out."""
    if id(node) not in counts:
        counts[id(node)] = None  # unknown as long as its parts are counted
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        counts[id(node)] = 1 + sum(_values(part, counts) for part in parts)
    found = counts[id(node)]
    if found is None:
        raise yaml.MarkedYAMLError(problem="an alias stands within what it names", problem_mark=node.start_mark)
    return found
