"""YAML files and dotted overrides, read into dataclasses by pydantic, with errors for people."""

import dataclasses
import difflib
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from motifarch import packaged_recipes
from motifarch.errors import UserError, first_line
from motifarch.yaml_text import MOST_CHARACTERS, parse_yaml

T = TypeVar("T")

_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "array": "a list",
    "object": "a section of named fields",
}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


class Section:
    """Base of a file's dataclasses: types say what is accepted, docstrings what fields mean."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python, and so to pydantic, true is 1; and 1 and "yes" are true.
        values, kind = value if isinstance(value, list | tuple) else [value], cls.__annotations__[info.field_name or ""]
        if any(isinstance(v, bool) for v in values) and "bool" not in str(kind):
            raise ValueError
        if kind in (bool, bool | None) and not (value is None or str(value).lower() in ("true", "false")):
            raise ValueError
        return value


class TypedYaml(Generic[T]):
    """Reads one kind of file. Where its dataclass has a field `base`, a file may build on another.

    Args:
        root: the dataclass of the whole file, a `Section`.
        noun: what the file is called in messages, such as "recipe".
        usage: how the command is called, for its help.
        description: what the command does.
        examples: lines that show how it is called.
        packaged: the files that come with the package, by the names that stand for them.
    """

    def __init__(
        self,
        root: type[T],
        noun: str,
        *,
        usage: str = "",
        description: str = "",
        examples: Sequence[str] = (),
        packaged: Callable[[], list[str]] = packaged_recipes.names,
    ) -> None:
        self.noun = noun
        self._packaged = packaged
        shown_examples = "".join(["\n\nexamples:", *(f"\n  {line}" for line in examples)]) if examples else ""
        self._help = f"usage: {usage}\n\n{textwrap.fill(description, 100)}{shown_examples}\n"
        self._adapter = TypeAdapter(root)
        schema = self._adapter.json_schema()
        self.fields = dict(_fields(schema, schema.get("$defs", {})))
        """JSON schemas by dotted name, those of list entries too; the whole has the name ""."""

    def read(self, argv: Sequence[str]) -> T:
        """Reads a command line.

        Args:
            argv: ``FILE.yaml --section.field value --section.field=value ...``, the file being
                optional. A file's `base` is read before it.

        Raises:
            UserError: a missing or unreadable file, an unknown field, a value that is not accepted.
        """
        args = list(argv)
        for flag in {"--help", "-h"} & set(args):
            self.print_help(args[args.index(flag) + 1 :])
            raise SystemExit(0)
        if args and not args[0].startswith("-"):
            args = ["--config", str(packaged_recipes.locate(args[0], self._packaged())), *args[1:]]
        sources: list[tuple[str, Any]] = []
        for name, text in _options(args):
            if name == "config":
                sources += self._files(Path(text))
                continue
            # pydantic makes numbers of texts.
            value = parse_yaml(text, f"--{name} {text}") if text.startswith(("[", "{")) or text == "null" else text
            for part in reversed(name.split(".")):
                value = {part: value}
            sources.append((" on the command line", value))
        values: Any = {}
        for _, given in sources:
            values = self._merge("", values, given)
        return self._validate(values, sources)

    def parse(self, values: Any) -> T:
        """What a file of such values would give; fields that are not among them have defaults.

        Raises:
            UserError: an unknown field, or a value that is not accepted.
        """
        return self._validate(values, [])

    def check(self, values: T) -> None:
        """Checks the values of a dataclass that was made or changed in Python.

        Raises:
            UserError: a value that is not accepted.
        """
        self._validate(dataclasses.asdict(values), [])  # type: ignore[call-overload]

    def print_help(self, names: Sequence[str] = ()) -> None:
        """Prints how the command is called and the tree of fields; of those that are named, all.

        Raises:
            UserError: there is no field or section of that name.
        """
        if not names:
            print(self._help)
            print(f"  --config FILE: the {self.noun}; also the first argument\n")
        self.print_fields(names)

    def print_fields(self, names: Sequence[str] = ()) -> None:
        """Prints the tree of fields, a line each; of fields and sections that are named, what they
        accept, their defaults and the whole of their meaning.

        Raises:
            UserError: there is no field or section of that name.
        """
        for name in names:
            bare = name.removeprefix("--")
            if not bare or bare not in self.fields:
                raise UserError(f"--help {shown(name)}: no field or section{self._meant(bare)}; --help alone lists all")
            for field in self.fields:
                if field == bare or field.startswith(f"{bare}."):
                    self._print_whole(field)
        if not names:
            print(f"The {self.noun}'s fields and their defaults; --help SECTION or --help FIELD says all about them.")
            for section, fields in self._tree().items():
                node = self.fields[section]
                print("\n" + textwrap.fill(f"{section or self.noun}: {node.get('description', '')}", 100))
                for field in fields:
                    print(_in_a_line(f"  {self._shown_name(field)}{_default(self.fields[field])}", self.fields[field]))

    def _tree(self) -> dict[str, list[str]]:
        """Names of fields by section; entries of lists are of the section that the list is in."""
        sections: dict[str, list[str]] = {}
        for name, node in self.fields.items():
            if "properties" in node:
                sections[name] = []
                continue
            section = name.rpartition(".")[0]
            while section not in sections:
                section = section.rpartition(".")[0]
            sections[section].append(name)
        return sections

    def _shown_name(self, name: str) -> str:
        of_entries = "items" in self.fields.get(name.rpartition(".")[0], {})
        return f"{'each ' if of_entries else '--'}{name}"

    def _print_whole(self, name: str) -> None:
        node = self.fields[name]
        if "properties" in node:
            print(textwrap.fill(f"{name}: {node.get('description', '')}", 100))
            return
        default = f"; default{_default(node)}" if "default" in node else ""
        print(f"  {self._shown_name(name)}: {accepted(node)}{default}")
        print(textwrap.fill(node.get("description", ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6))

    def _files(self, path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
        """What a file holds, after what its base does, and where that is."""
        this = f"the {self.noun} {path}"
        try:
            if path.resolve() in above:
                raise UserError(f"{this} is its own base; let base name another file, or leave it out")
            with path.open(encoding="utf-8") as file:
                values = parse_yaml(file.read(MOST_CHARACTERS + 1), this)  # a device has no end
        except OSError as error:
            raise UserError(f"{this} can't be read: {error.strerror}; give the path of a YAML file") from None
        except UnicodeDecodeError:
            raise UserError(f"{this} is not UTF-8 text; give the path of a YAML file") from None
        except (ValueError, RuntimeError) as error:  # a NUL byte, a circle of links
            raise UserError(f"{shown(str(path))} is no path: {first_line(error)}; give that of a YAML file") from None
        if not isinstance(values, dict):
            raise UserError(f"{this} holds no sections; it must be a YAML mapping such as `run: {{steps: 100}}`")
        base, files = values.get("base"), [(f" in {path}", values)]
        if isinstance(base, str) and "base" in self.fields:
            return self._files(path.parent / base, (*above, path.resolve())) + files
        return files

    def _merge(self, name: str, below: Any, above: Any) -> Any:
        """Sections are merged field by field; anything else takes the place of what is below."""
        if "properties" not in self.fields.get(name, {}) or not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        return below | {k: self._merge(_join(name, k), below.get(k), value) for k, value in above.items()}

    def _validate(self, values: Any, sources: list[tuple[str, Any]]) -> T:
        try:
            return self._adapter.validate_python(values)
        except ValidationError as error:
            # A misspelt field first: another may be missing because of it.
            first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
            raise UserError(self._explain(first, sources)) from None

    def _explain(self, error: ErrorDetails, sources: list[tuple[str, Any]]) -> str:
        """The field, its value and where that is, and what is accepted."""
        loc, kind = error["loc"], error["type"]
        if kind == "missing" and isinstance(loc[-1], int):  # in a list of fixed length
            loc, kind = loc[:-1], "too_short"
        name = known = ""
        for part in loc:  # after the field may come pydantic's name of a union's branch
            name = _join(name, part)
            known = name if _bare(name) in self.fields else known
        where = next((place for place, given in reversed(sources) if _holds(given, loc)), "")
        if kind == "unexpected_keyword_argument":
            return f"unknown {self.noun} field {shown(name)}{where}{self._meant(_bare(name))}"
        node = self.fields[_bare(known)]
        if kind == "missing":
            return f"{known} is missing; give {accepted(node)}"
        if known.endswith("]"):
            node = node.get("items") or node.get("prefixItems", [node])[0]
        meaning = f" ({' '.join(node['description'].split())})" if "description" in node else ""
        return f"{known} is {shown(error['input'])}{where}; accepted: {accepted(node)}{meaning}"

    def _meant(self, name: str) -> str:
        # A right field in the wrong section is nearer than anything that merely looks alike.
        same = [known for known in self.fields if known and known.rpartition(".")[2] == name.rpartition(".")[2]]
        close = same or difflib.get_close_matches(name, self.fields, n=1, cutoff=0.5)
        return f"; did you mean {close[0]!r}?" if close else ""


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (name without dashes, value) of every option."""
    rest = iter(args)
    for arg in rest:
        if not arg.startswith("--"):
            raise UserError(f"unexpected argument {shown(arg)}; write overrides as --section.field VALUE")
        name, equals, value = arg[2:].partition("=")
        text = value if equals else next(rest, None)
        if text is None:
            raise UserError(f"--{name} has no value; write --{name} VALUE")
        yield name, text


def _default(node: dict[str, Any]) -> str:
    return f" {json.dumps(node['default'])}" if "default" in node else ""


def _in_a_line(field: str, node: dict[str, Any]) -> str:
    """A field beside the first sentence of its meaning, as far as a line goes."""
    meaning = re.split(r"[.;] ", " ".join(node.get("description", "").split()))[0].removesuffix(".")
    return f"{field:<42}  {textwrap.shorten(meaning, max(20, 98 - max(42, len(field))), placeholder=' ...')}"


def _join(name: str, part: Any) -> str:
    return f"{name}[{part}]" if isinstance(part, int) else f"{name}.{part}".removeprefix(".")


def _bare(name: str) -> str:
    return re.sub(r"\[\d+\]", "", name)


def _holds(values: Any, loc: Sequence[int | str]) -> bool:
    for part in loc:
        try:
            values = values[part]
        except (KeyError, IndexError):
            return False
        except TypeError:  # the rest of the place is within a scalar
            return True
    return True


def _fields(node: dict[str, Any], definitions: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        return definitions[node["$ref"].rpartition("/")[2]] | node if "$ref" in node else node

    node = resolved(node)
    entry = resolved(node.get("items", node))
    yield name, node | ({"items": entry} if "items" in node else {})
    for key, child in entry.get("properties", {}).items():
        yield from _fields(child, definitions, _join(name, key))


def shown(value: Any) -> str:
    """A value as a message shows it: in one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def accepted(node: dict[str, Any]) -> str:
    """What a JSON schema's node takes, in words."""
    if "accepted" in node:
        return str(node["accepted"])
    if "anyOf" in node:
        return " or ".join(map(accepted, node["anyOf"]))
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return ", ".join(map(str, node["enum"]))
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}: " + ", ".join(map(accepted, node["prefixItems"]))
    words = _TYPES.get(node.get("type", ""), "a value")
    if "items" in node:
        fields = ", ".join(node["items"].get("properties", ()))
        return f"{words} of entries with the fields {fields}" if fields else f"{words}, each {accepted(node['items'])}"
    bounds = {
        word: f"{node[key]:,}" if isinstance(node[key], int) else f"{node[key]:g}"
        for key, word in _BOUNDS.items()
        if key in node
    }
    if bounds.keys() == {"at least", "at most"}:
        return f"{words} from {bounds['at least']} to {bounds['at most']}"
    return f"{words} {' and '.join(f'{word} {bound}' for word, bound in bounds.items())}".strip()
