"""`motifarch tokenizer measure`: what tokenizers make of the same text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from motifarch.command_line import Parser, loading, option, path
from motifarch.commands.text_sources import add_source_options, shown_texts, text_settings
from motifarch.errors import UserError
from motifarch.field_types import FilePath

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.tokenizer.measure.measure`; returns the exit status.

    Raises:
        UserError: for anything that the user can mend; the output folder is then as it was.
    """
    arguments = build_parser().parse_args(argv)
    with loading():
        from rich.console import Console

        from motifarch.files import claim_folder, new_folder
        from motifarch.tokenizer.loading import open_vocabulary
        from motifarch.tokenizer.measure import measure, write
    output = arguments.output
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: give another folder, or remove it")
    tokenizers = {name: open_vocabulary(name) for name in dict.fromkeys(arguments.tokenizers)}
    settings = text_settings(arguments)
    group_of = language_of if arguments.by == "language" else None

    def texts() -> Iterator[tuple[str, str]]:
        for text in shown_texts(settings, "measuring"):
            yield (group_of(text.text) if group_of else text.source), text.text

    measured = measure(tokenizers, texts())
    if output is not None:
        with claim_folder(output, print), new_folder(output) as folder:
            write(measured, folder)
    console = Console()
    for table in tables(measured.as_dict()):
        console.print(table)
        console.print()
    if output is not None:
        print(f"written: {output}/measure.json, measure.png")
    return 0


def language_of(text: str) -> str:
    """The language of a text, by its code in ISO 639-1.

    Raises:
        UserError: the package that knows them is not installed.
    """
    try:
        import py3langid  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise UserError(
            "--by language: the package py3langid is not installed: pip install 'motifarch[data]'"
        ) from None
    return str(py3langid.classify(text)[0])


def tables(figures: dict[str, Any]) -> "list[Table]":
    """A table of the texts, and one of the vocabularies."""
    from rich.table import Table
    from rich.text import Text

    from motifarch.tokenizer.measure import short_names

    names, groups = short_names(figures), short_names(next(iter(figures.values()))["groups"])
    by_group = Table(box=None, pad_edge=False, header_style="bold")
    by_group.add_column("", overflow="fold")
    by_group.add_column("tokenizer", overflow="fold")
    for name in ("tokens", "bytes\na token", "characters\na token", "tokens\na word", "documents\nchanged"):
        by_group.add_column(name, justify="right")
    for group, shown in groups.items():
        for i, (name, found) in enumerate(figures.items()):
            of_group = found["groups"][group]
            by_group.add_row(
                Text("" if i else shown),
                Text(names[name]),
                f"{of_group['tokens']:,}",
                *(f"{of_group[x]:.3f}" for x in ("bytes_per_token", "characters_per_token", "tokens_per_word")),
                _changed(of_group),
            )
    vocabularies = Table(box=None, pad_edge=False, header_style="bold")
    vocabularies.add_column("tokenizer", overflow="fold")
    for name in ("tokens", "not used"):
        vocabularies.add_column(name, justify="right")
    vocabularies.add_column("longest that are used", overflow="fold")
    for name, found in figures.items():
        longest = "\n".join(
            repr(token if len(token) < 26 else f"{token[:24]}…") for token in found["longest_tokens"][:3]
        )
        vocabularies.add_row(
            Text(names[name]), f"{found['vocab_size']:,}", f"{found['unused_share']:.1%}", Text(longest)
        )
    return [by_group, vocabularies]


def _changed(of_group: dict[str, Any]) -> str:
    changed, composed = of_group["changed_documents"], of_group["composed_documents"]
    return f"{changed:,}" + (f", {composed:,} composed" if composed else "")


def build_parser() -> Parser:
    """The options of ``motifarch tokenizer measure``."""
    parser = Parser(
        prog="motifarch tokenizer measure",
        description=__doc__ + "\n\nTake text that none of them was trained on.",
        examples=[
            "motifarch tokenizer measure tokenizers/ko_en bpe-openai:o200k_base --source files:held_out.jsonl",
            "motifarch tokenizer measure tokenizers/ko_en --source stdlib --by language --output measured",
        ],
    )
    parser.add_argument(
        "tokenizers",
        nargs="+",
        type=option(FilePath),
        metavar="TOKENIZER",
        help="as `motifarch tokenizer extend` takes them: folders, names, lists of ranks, those of packages",
    )
    add_source_options(parser)
    group = parser.add_argument_group("what to make")
    group.add_argument("--by", choices=("source", "language"), default="source", help="(%(default)s)")
    group.add_argument("--output", type=path, metavar="DIR", help="also write measure.json and measure.png there")
    return parser
