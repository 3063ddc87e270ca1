"""Options of commands that read texts."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from motifarch.command_line import option
from motifarch.field_types import Multiplier, Tokens

if TYPE_CHECKING:
    from motifarch.data.texts import Text, TextSettings

_FIELDS = ("text_field", "encoding", "document_separator", "hf_split", "max_documents", "max_characters")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds them, as `motifarch data prepare` has them."""
    group = parser.add_argument_group("what to read")
    add = group.add_argument
    add(
        "--source",
        dest="sources",
        action="append",
        required=True,
        metavar="SOURCE",
        help="stdlib, files:GLOB, a URL or hf:NAME[:CONFIG], as `motifarch data prepare` takes them; may be repeated",
    )
    add(
        "--weight",
        dest="weights",
        action="append",
        default=[],
        type=option(Multiplier),
        metavar="X",
        help="one for each --source, in their order: they take turns, and give characters in proportion to it, until "
        "the first has ended",
    )
    add("--text-field", default="text", metavar="NAME", help="field that holds a record's text (%(default)s)")
    add("--encoding", default="utf-8", metavar="NAME", help="of files without a byte order mark (%(default)s)")
    add(
        "--document-separator",
        metavar="TEXT",
        type=lambda text: text.replace("\\n", "\n").replace("\\t", "\t"),
        help=r"what ends a document within a text file: \n, \n\n (default: a text file is one document)",
    )
    add("--hf-split", default="train", metavar="NAME", help="split of a Hugging Face dataset (%(default)s)")
    add("--max-documents", type=option(Tokens), metavar="N", help="read only the first N documents of each source")
    add("--max-characters", type=option(Tokens), metavar="N", help="read only N characters in all")


def text_settings(arguments: argparse.Namespace) -> "TextSettings":
    """The options as they were given."""
    from motifarch.data.texts import TextSettings

    given = {name: getattr(arguments, name) for name in _FIELDS}
    return TextSettings(tuple(arguments.sources), tuple(arguments.weights), **given)


def shown_texts(settings: "TextSettings", description: str) -> Iterator["Text"]:
    """The texts, with a line that shows how much was read; what was left out is said at the end."""
    from motifarch.data.texts import texts_of
    from motifarch.progress import progress

    with progress(description, settings.max_characters, of="characters") as advance:
        for text in texts_of(settings):
            yield text
            advance(len(text.text))
    if settings.skipped.counts:
        print(f"skipped: {settings.skipped.summary()}", file=sys.stderr)
    for note in settings.notes:
        print(note, file=sys.stderr)
