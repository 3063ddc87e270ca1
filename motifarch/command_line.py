"""What the commands' own options are read with; recipes and studies are read by `typed_yaml`."""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ConfigDict, TypeAdapter, ValidationError
from rich.console import Console

from motifarch.errors import UserError
from motifarch.field_types import FilePath
from motifarch.storage import is_url
from motifarch.typed_yaml import accepted, shown

_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that warn of a library's own affairs when it is imported."""


class _Help(argparse.HelpFormatter):
    """Fills text, but for what comes as lines: the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        prose, examples, lines = text.partition(_EXAMPLES)
        return (super()._fill_text(prose, width, indent) + "\n\n" * bool(prose and examples) + examples + lines).strip()


class Parser(argparse.ArgumentParser):
    """Refuses as the rest of motifarch does, in one line; options are written in full.

    Its help ends with `examples`, command lines of which a long one may go on in indented lines.
    """

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        if examples:
            options["epilog"] = options.get("epilog", "") + shown_examples(examples)
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        """Raises a UserError."""
        # argparse says "argument --gpus: is ..." of what `option` refuses.
        said = message.removeprefix("argument ").replace(": is ", " is ", 1)
        if len(said) > 300:  # the value that was given
            said = f"{said[:100]}...{said[-200:]}"
        raise UserError(f"{said}; see {self.prog} --help")


def option(kind: Any) -> Callable[[str], Any]:
    """What argparse takes as a ``type`` for an annotated type, its range included."""
    adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))

    def parse(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError:
            words = accepted(adapter.json_schema())
            raise argparse.ArgumentTypeError(f"is {shown(text)}; accepted: {words}") from None

    return parse


def comma_separated(kind: Any) -> Callable[[str], list[Any]]:
    """What argparse takes as a ``type`` for several values of an annotated type."""
    parse = option(kind)
    return lambda text: [parse(part) for part in text.split(",")]


_EXAMPLES = "examples:\n"


def shown_examples(lines: Sequence[str]) -> str:
    """Command lines as a help text shows them."""
    return _EXAMPLES + "\n".join(f"  {line}" for line in lines)


@contextmanager
def loading() -> Iterator[None]:
    """Imports libraries that take seconds, with a spinner on a terminal, and without what they say
    as they are imported.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with Console(stderr=True).status("loading libraries"):
        yield


_path = option(FilePath)


@contextmanager
def writing(flag: str) -> Iterator[None]:
    """Around what writes where an option says: what the disk refuses is an error of the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"can't write {error.filename}: {error.strerror}; give another {flag}") from None


def path(text: str) -> Path:
    """An argparse ``type`` for a file's or folder's path: the empty one would be this folder."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"is {shown(text)}, a URL, where a path on disk is needed: copy it to disk first (a run's model by "
            "`motifarch export URL --output DIR`)"
        )
    return Path(_path(text))


def path_or_url(text: str) -> Path | str:
    """An argparse ``type`` for a path, or a URL in object storage, which stays text."""
    return text if is_url(text) else path(text)
