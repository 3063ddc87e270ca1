"""What the commands' own options are read with; recipes and studies are read by `typed_yaml`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ConfigDict, TypeAdapter, ValidationError

from motifarch.errors import UserError
from motifarch.field_types import FilePath
from motifarch.typed_yaml import accepted, shown


class Parser(argparse.ArgumentParser):
    """Refuses as the rest of motifarch does, in one line; options are written in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

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


_path = option(FilePath)


def path(text: str) -> Path:
    """An argparse ``type`` for a file's or folder's path: the empty one would be this folder."""
    return Path(_path(text))
