"""YAML files and dotted overrides, read into typed dataclasses by jsonargparse.

jsonargparse does the reading and the type checks; this module turns its refusals into one message
for people.
"""

import copy
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jsonargparse
import yaml

from motifarch import packaged_recipes
from motifarch.errors import UserError

T = TypeVar("T")
_MISSING = object()


class TypedYaml(Generic[T]):
    """Reads one kind of file. Where its dataclass has a field `base`, a file may name another that
    it builds on.
    """

    def __init__(self, root: type[T], noun: str, *, prog: str, usage: str, description: str) -> None:
        """Says what is read.

        Args:
            root: the dataclass of the whole file; its sections are dataclasses, or lists of them.
            noun: what the file is called in messages, such as "recipe".
            prog: the command whose help the fields are listed in.
            usage: that command's usage line.
            description: what the command does.
        """
        self.root, self.noun = root, noun
        self._help: dict[str, Any] = {"prog": prog, "usage": usage, "description": description}

    def parser(self) -> jsonargparse.ArgumentParser:
        """Returns the parser of all fields, `--config` among them."""
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
        parser = jsonargparse.ArgumentParser(**self._help, exit_on_error=False)
        parser.add_argument("--config", action="config", help=f"The {self.noun}, a YAML file; also the first argument.")
        parser.add_class_arguments(self.root)  # type: ignore[arg-type]
        return parser

    def read(self, argv: Sequence[str]) -> T:
        """Reads a command line.

        Args:
            argv: ``FILE.yaml --section.field value --section.field=value ...``, the file being
                optional. A file's `base` is read before it.

        Returns:
            The dataclass, types checked.

        Raises:
            UserError: a missing or unreadable file, an unknown field, a value of the wrong type.
        """
        args = list(argv)
        if args and not args[0].startswith("-"):
            args = ["--config", str(packaged_recipes.locate(args[0])), *args[1:]]
        parser = self.parser()
        if "--help" in args or "-h" in args:
            parser.print_help()
            raise SystemExit(0)
        args = list(self._with_bases(args))
        for name, value in _pairs(args):
            if name == "config":
                self._check_names(self._load(Path(value)), self.root, value)
            elif name.rstrip("+") not in set(_field_names(self.root)):
                raise UserError(self._unknown(name, " on the command line"))
        try:
            values = parser.instantiate_classes(parser.parse_args(args))
            return self.root(**{f.name: values[f.name] for f in dataclasses.fields(self.root)})  # type: ignore[arg-type]
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise UserError(self._explain(args, error)) from None

    def _with_bases(self, args: list[str]) -> Iterator[str]:
        """The same arguments, each file preceded by those that it names as its base."""
        for name, value in _pairs(args):
            files = self._bases(Path(value), []) if name == "config" else [value]
            yield from (f"--{name}={file}" for file in files)

    def _bases(self, path: Path, above: list[Path]) -> list[Path]:
        if path.resolve() in above:
            raise UserError(f"the {self.noun} {path} is its own base; let base name another file, or leave it out")
        base = self._load(path).get("base")
        # Left out, null, or refused with the other values.
        if not isinstance(base, str) or "base" not in typing.get_type_hints(self.root):
            return [path]
        return [*self._bases(path.parent / base, [*above, path.resolve()]), path]

    def _load(self, path: Path) -> dict[str, Any]:
        this = f"the {self.noun} {path}"
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{this} can't be read: {error.strerror}; give the path of a YAML file") from None
        except UnicodeDecodeError:
            raise UserError(f"{this} is not UTF-8 text; give the path of a YAML file") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}" if mark else ""
            raise UserError(f"{this} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None
        if not isinstance(loaded, dict):
            raise UserError(f"{this} holds no sections; it must be a YAML mapping such as `run: {{steps: 100}}`")
        return loaded

    def _check_names(self, values: dict[Any, Any], section: type, where: str, prefix: str = "") -> None:
        hints = typing.get_type_hints(section)
        for key, value in values.items():
            name = f"{prefix}{key}"
            if key not in hints:
                raise UserError(self._unknown(name, f" in {where}"))
            hint = hints[key]
            if inner := _section(hint):
                if not isinstance(value, dict):
                    raise UserError(f"{name} is {value!r} in {where}; it is a section and takes named fields")
                self._check_names(value, inner, where, f"{name}.")
            elif typing.get_origin(hint) is list and isinstance(value, list):
                inner = _section(typing.get_args(hint)[0])
                for i, entry in enumerate(value):
                    if inner and isinstance(entry, dict):
                        self._check_names(entry, inner, where, f"{name}[{i}].")

    def _unknown(self, name: str, where: str) -> str:
        bare = ".".join(part.partition("[")[0] for part in name.split("."))
        known = list(_field_names(self.root))
        close = difflib.get_close_matches(bare, known, n=1, cutoff=0.5)
        # A right field in the wrong section is nearer than anything that merely looks alike.
        last = bare.rpartition(".")[2]
        same = [k for k in known if k.rpartition(".")[2] == last]
        hint = (same or close or [""])[0]
        return f"unknown {self.noun} field {name!r}{where}" + (f"; did you mean {hint!r}?" if hint else "")

    def _explain(self, args: list[str], error: Exception) -> str:
        """Finds the one value that is refused by offering each alone."""
        for name, value in _pairs(args):
            leaves = _leaves(self._load(Path(value)), self.root) if name == "config" else iter([(name, value)])
            for leaf, given in leaves:
                where = f" (in {value})" if name == "config" else ""
                accepted = _words(_hint(self.root, leaf))
                if given is _MISSING:
                    return f"{leaf} is missing{where}; give {accepted}"
                if not _fits(_hint(self.root, leaf), given, from_file=name == "config"):
                    return f"{leaf} is {given!r}{where}; accepted: {accepted}"
        first = str(error).strip().splitlines()
        return f"the {self.noun} can't be read: {first[0] if first else error}"


def _pairs(args: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (name without dashes, value) of every option."""
    rest = iter(args)
    for arg in rest:
        if not arg.startswith("--"):
            raise UserError(f"unexpected argument {arg!r}; write overrides as --section.field VALUE")
        name, equals, value = arg[2:].partition("=")
        if not equals:
            found = next(rest, None)
            if found is None:
                raise UserError(f"--{name} has no value; write --{name} VALUE")
            value = found
        yield name, value


def _section(hint: Any) -> type | None:
    """The dataclass that a field's type hint stands for, if it does."""
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _field_names(section: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(section).items():
        yield prefix + name
        inner = _section(hint)
        if inner is None and typing.get_origin(hint) is list:
            inner = _section(typing.get_args(hint)[0])
        if inner:
            yield from _field_names(inner, f"{prefix}{name}.")


def _fits(hint: Any, value: Any, from_file: bool) -> bool:
    probe: jsonargparse.ArgumentParser = jsonargparse.ArgumentParser(exit_on_error=False)
    try:
        probe.add_argument("--value", type=hint)
        if from_file:
            probe.parse_object({"value": copy.deepcopy(value)})
        else:
            probe.parse_args([f"--value={value}"])
    except (jsonargparse.ArgumentError, TypeError, ValueError):
        return False
    return True


def _leaves(values: dict[str, Any], section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field given, inside lists too, and those that are needed
    and missing.
    """
    for f in dataclasses.fields(section):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.name not in values:
            if needed:
                yield prefix + f.name, _MISSING
            continue
        value, hint = values[f.name], typing.get_type_hints(section)[f.name]
        entry = _section(typing.get_args(hint)[0]) if typing.get_origin(hint) is list else None
        if inner := _section(hint):
            yield from _leaves(value, inner, f"{prefix}{f.name}.")
        elif entry and isinstance(value, list) and all(isinstance(v, dict) for v in value):
            for i, v in enumerate(value):
                yield from _leaves(v, entry, f"{prefix}{f.name}[{i}].")
        else:
            yield prefix + f.name, value


def _hint(root: type, name: str) -> Any:
    """The type of the field with a dotted name."""
    hint: Any = root
    for part in name.rstrip("+").split("."):
        key, bracket, _ = part.partition("[")
        hint = typing.get_type_hints(hint)[key]
        if bracket:
            hint = typing.get_args(hint)[0]
    return hint


def _words(hint: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in simple:
        return simple[hint]
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, args))
    if typing.get_origin(hint) is tuple and Ellipsis in args:
        return f"a list of any length: {_words(args[0])}"
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(args)}: " + ", ".join(map(_words, args))
    if typing.get_origin(hint) is list:
        inner = _section(args[0])
        fields = [f.name for f in dataclasses.fields(inner)] if inner else []
        return "a list" + (f" of entries with the fields {', '.join(fields)}" if fields else "")
    if args:
        return " or ".join(map(_words, args))
    return str(hint)
