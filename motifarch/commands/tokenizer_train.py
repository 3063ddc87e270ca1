"""`motifarch tokenizer train`: a vocabulary of your own, as a Hugging Face folder."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from motifarch.command_line import Parser, loading, option, path
from motifarch.commands.text_sources import add_source_options, shown_texts, text_settings
from motifarch.counted import counted
from motifarch.errors import UserError
from motifarch.field_types import Count, Length, PositiveCount, Seed, Tokens, Vocabulary

_EPILOG = """\
bpe merges within words, superbpe goes on across spaces once it has --stage-1-size tokens. Both normalise text (NFC),
keep groups of at most three digits, counted from the right, and encode any text, byte by byte where they must."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :mod:`motifarch.tokenizer`; returns the exit status.

    Raises:
        UserError: for anything that the user can mend; the output folder is then as it was.
    """
    arguments = build_parser().parse_args(argv)
    output, size = arguments.output, arguments.vocab_size
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: give another folder, or remove it")
    stage_1 = arguments.stage_1_size
    if stage_1 is not None and arguments.method != "superbpe":
        raise UserError(f"--stage-1-size {stage_1} is of --method superbpe: leave it out, or take that")
    if stage_1 is not None and stage_1 >= size:
        raise UserError(f"--stage-1-size {stage_1}: it must be below --vocab-size {size}, the rest is stage 2's")
    with loading():
        from motifarch.files import claim_folder, new_folder
        from motifarch.progress import progress
        from motifarch.tokenizer.special_tokens import SpecialTokens
        from motifarch.tokenizer.superbpe import train_superbpe
        from motifarch.tokenizer.train import as_pretrained, check_vocab_size, least_size, train_bpe
    special, settings = SpecialTokens(reserved=arguments.reserved), text_settings(arguments)
    check_vocab_size(size, special)
    characters = 0
    merging = ExitStack()  # from the last text to the last merge within words

    def texts() -> Iterator[str]:
        nonlocal characters
        for text in shown_texts(settings, "reading"):
            characters += len(text.text)
            yield text.text
        merging.enter_context(progress("merging within words"))

    def shown(tokens: Iterable[str], total: int) -> Iterator[str]:
        merging.close()
        with progress("merging across words", total) as advance:
            for token in tokens:
                yield token
                advance()

    with merging:
        if arguments.method == "bpe":
            trained = train_bpe(texts(), size, special)
        else:
            if stage_1 is None:
                least = least_size(special)
                stage_1 = least + (size - least) * 5 // 8
            options = {"max_words": arguments.max_words, "sample_characters": arguments.sample_characters}
            options |= {"stage_1_size": stage_1, "seed": arguments.seed}
            trained = train_superbpe(texts(), size, special, progress=shown, **options)
    with claim_folder(output, print), new_folder(output) as folder:
        as_pretrained(trained, special, arguments.model_max_length).save_pretrained(folder)
    made = trained.get_vocab_size()
    print(f"{output}: {counted(made, 'token')}, trained on {counted(characters, 'character')}")
    if made < size:
        print(f"  fewer than the {size:,} of --vocab-size: the text has no more pairs that are there twice")
    print(f"  motifarch data prepare --tokenizer {output} ...")
    return 0


def build_parser() -> Parser:
    """The options of ``motifarch tokenizer train``."""
    parser = Parser(
        prog="motifarch tokenizer train",
        description=__doc__ + "\n\n" + _EPILOG,
        examples=[
            "motifarch tokenizer train --source stdlib --vocab-size 4096 --output tokenizers/python",
            "motifarch tokenizer train --method superbpe --vocab-size 65536 --source 'files:ko/**/*.txt' --weight 2 "
            "--source 'files:en.jsonl.gz' --weight 1 --output tokenizers/ko_en",
        ],
    )
    add_source_options(parser)
    group = parser.add_argument_group("what to make")
    add = group.add_argument
    add("--output", type=path, required=True, metavar="DIR", help="the tokenizer's folder; it must not exist")
    add("--vocab-size", type=option(Vocabulary), required=True, metavar="N", help="tokens in all")
    add("--method", choices=("bpe", "superbpe"), default="bpe", help="(%(default)s)")
    add("--reserved", type=option(Count), default=16, metavar="N", help="special tokens for later use (%(default)s)")
    add("--model-max-length", type=option(Length), metavar="N", help="noted in the folder: tokens a model reads")
    group = parser.add_argument_group("superbpe")
    add = group.add_argument
    add("--stage-1-size", type=option(Vocabulary), metavar="N", help="tokens within words (five eighths of all merges)")
    add("--max-words", type=option(PositiveCount), default=4, metavar="N", help="of a token (%(default)s)")
    add(
        "--sample-characters",
        type=option(Tokens),
        default=10_000_000,
        metavar="N",
        help="of a uniform sample of the text, which merges across words are learned on; each takes some 100 bytes "
        "of memory (%(default)s)",
    )
    add("--seed", type=option(Seed), default=0, metavar="N", help="of the sample (%(default)s)")
    return parser
