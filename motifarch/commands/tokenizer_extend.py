"""`motifarch tokenizer extend`: new tokens for a vocabulary that exists, learned on text."""

from collections.abc import Iterable, Iterator, Sequence

from motifarch.command_line import Parser, loading, option, path
from motifarch.commands.text_sources import add_source_options, shown_texts, text_settings
from motifarch.errors import UserError
from motifarch.field_types import FilePath, Vocabulary


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.tokenizer.extend.extend`; returns the exit status.

    Raises:
        UserError: for anything that the user can mend; the output folder is then as it was.
    """
    arguments = build_parser().parse_args(argv)
    output, wanted = arguments.output, arguments.tokens
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: give another folder, or remove it")
    with loading():
        from motifarch.files import claim_folder, new_folder
        from motifarch.progress import progress
        from motifarch.tokenizer.extend import extend
        from motifarch.tokenizer.loading import open_vocabulary, with_backend
    given, settings = open_vocabulary(arguments.tokenizer), text_settings(arguments)

    def shown(tokens: Iterable[str], total: int) -> Iterator[str]:
        with progress("merging", total) as advance:
            for token in tokens:
                yield token
                advance()

    texts = (text.text for text in shown_texts(settings, "reading"))
    extended, merges = extend(given.backend_tokenizer, texts, wanted, script=arguments.script, progress=shown)
    if not merges:
        raise UserError("the text has no pair of tokens that is there twice, and may be a new one: give more text")
    with claim_folder(output, print), new_folder(output) as folder:
        with_backend(given, extended).save_pretrained(folder)
    last = max(extended.get_vocab(with_added_tokens=True).values())
    print(f"{output}: {len(merges):,} new, of ids {last + 1 - len(merges):,} to {last:,}")
    if len(merges) < wanted:
        print(f"  fewer than the {wanted:,} of --tokens: the text has no more pairs that are there twice")
    print(f"  motifarch grow MODEL OUTPUT --tokenizer {output}")
    return 0


def build_parser() -> Parser:
    """The options of ``motifarch tokenizer extend``."""
    parser = Parser(
        prog="motifarch tokenizer extend",
        description=__doc__ + "\n\nOld ids stay, and text in which no new token is found has the tokens that it had.",
        examples=[
            "motifarch tokenizer extend bpe-openai:o200k_base --tokens 19000 --script Hangul "
            "--source 'files:ko/**/*.txt' --output tokenizers/o200k_ko",
        ],
    )
    parser.add_argument(
        "tokenizer",
        type=option(FilePath),
        help="a Hugging Face folder or name; o200k_base.tiktoken or cl100k_base.tiktoken; a tekken.json; "
        "bpe-openai:o200k_base and the like, of installed packages",
    )
    add_source_options(parser)
    group = parser.add_argument_group("what to make")
    add = group.add_argument
    add("--output", type=path, required=True, metavar="DIR", help="the tokenizer's folder; it must not exist")
    add("--tokens", type=option(Vocabulary), required=True, metavar="N", help="how many new ones")
    add("--script", metavar="NAME", help="of the new tokens' letters, as Hangul: other text then keeps its tokens")
    return parser
