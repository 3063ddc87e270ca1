"""``motifarch data prepare``: from raw text to packed token blocks, ready for training."""

import argparse
import dataclasses
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from motifarch.command_line import Parser, loading, option, path
from motifarch.counted import counted
from motifarch.data.documents import printable
from motifarch.data.manifest import Manifest
from motifarch.data.settings import PrepareSettings
from motifarch.errors import UserError
from motifarch.field_types import FilePath, Fraction, Length, Probability, Processes, Seed, Tokens, Vocabulary

_DESCRIPTION = """\
Read text, split it by document into training and validation, tokenise it and pack it into blocks for training.
The command may be interrupted and run again at any time: the output folder appears only when it is complete, and a
second run with the same settings and inputs finds it and ends at once."""

_EXAMPLES = """\
examples:
  motifarch data prepare --source stdlib --output data/stdlib
  motifarch data prepare --source 'files:corpus/**/*.{txt,md}' --source files:more.jsonl.gz --output data/mine
  motifarch data prepare --source hf:roneneldan/TinyStories --streaming --max-documents 100000 \\
      --tokenizer openai-community/gpt2 --seq-len 1024 --output data/stories
  motifarch data prepare --source 's3://bucket/corpus/**/*.jsonl.zst' --output data/bucket
  motifarch data prepare --messages --source files:chats.jsonl --tokenizer MODEL --seq-len 4096 --output data/chats"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``motifarch data prepare``."""
    parser = Parser(
        prog="motifarch data prepare",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    inputs = parser.add_argument_group("what to read")
    inputs.add_argument(
        "--source",
        dest="sources",
        action="append",
        required=True,
        metavar="SOURCE",
        help="stdlib (this interpreter's standard library), files:GLOB (text files, one document each; .jsonl, .json, "
        ".parquet, .arrow and .csv, one document a record; .gz, .bz2, .xz and .zst are unpacked; ** and {a,b} work; a "
        "path that exists is taken as it is, a folder means all below it but hidden files), a URL of such "
        "files (s3://BUCKET/GLOB, gs://, hf://datasets/OWNER/NAME/GLOB, read as they come), or hf:NAME[:CONFIG] (a "
        "Hugging Face dataset or a local folder of data files). May be repeated.",
    )
    inputs.add_argument(
        "--text-field",
        metavar="NAME",
        help="field that holds a record's text (%(default)s), or a conversation for the tokenizer's chat template, "
        "which a record without that field may have in `messages`",
    )
    inputs.add_argument(
        "--messages",
        action="store_true",
        help="fine-tuning: read conversations only (records with `messages`, or --text-field), write them by the "
        "tokenizer's chat template, and train on the tokens within its {%% generation %%} marks alone, the "
        "assistant's; conversations stay whole, and one that is longer than a block is cut and named",
    )
    inputs.add_argument(
        "--chat-template",
        type=option(FilePath),
        metavar="FILE",
        help="a Jinja file in place of the tokenizer's chat template, saved with the tokenizer in the output",
    )
    inputs.add_argument("--hf-split", metavar="NAME", help="split of a Hugging Face dataset (%(default)s)")
    inputs.add_argument(
        "--streaming", action="store_true", help="read Hugging Face datasets without downloading them first"
    )
    inputs.add_argument(
        "--max-documents", type=option(Tokens), metavar="N", help="read only the first N documents of each source"
    )
    inputs.add_argument(
        "--shard",
        metavar="K/N",
        help="prepare only the K-th of N parts of the documents, told apart by their text, as one of N machines; "
        "`motifarch data merge` joins the N folders",
    )
    inputs.add_argument(
        "--strict", action="store_true", help="stop at an empty, binary or undecodable document instead of skipping it"
    )
    inputs.add_argument(
        "--encoding",
        metavar="NAME",
        help="of files without a byte order mark (%(default)s), such as cp949; what is not in it is skipped",
    )
    inputs.add_argument(
        "--document-separator",
        metavar="TEXT",
        type=lambda text: text.replace("\\n", "\n").replace("\\t", "\t"),
        help=r"what ends a document within a text file: \n makes each line one, \n\n each paragraph (default: a text "
        "file is one document)",
    )

    inputs.add_argument(
        "--languages",
        nargs="+",
        metavar="CODE",
        help="keep documents in these languages alone, such as ko en, as py3langid tells them; what is too short to "
        "tell is kept",
    )
    inputs.add_argument(
        "--deduplicate",
        choices=("no", "exact", "minhash"),
        help="keep the first of documents with the same text (exact), or nearly the same (minhash), over all sources "
        "(%(default)s)",
    )
    inputs.add_argument(
        "--duplicate-threshold",
        type=option(Probability),
        metavar="F",
        help="for minhash: share of common shingles of 8 characters, of those that either text has, from which on two "
        "are nearly the same (%(default)s)",
    )

    outputs = parser.add_argument_group("what to make")
    outputs.add_argument("--output", type=path, required=True, metavar="DIR", help="the prepared folder")
    outputs.add_argument(
        "--tokenizer",
        type=option(FilePath),
        metavar="NAME_OR_PATH",
        help="a Hugging Face tokenizer (default: a new byte-level BPE on up to 64 Mi characters of the training part)",
    )
    outputs.add_argument(
        "--special-tokens",
        choices=("text", "tokens"),
        help="what the tokenizer's special tokens become where text spells them: text, or the tokens; plain prompts of "
        "`motifarch generate` follow (%(default)s)",
    )
    outputs.add_argument("--vocab-size", type=option(Vocabulary), metavar="N", help="tokens to train (%(default)s)")
    outputs.add_argument("--seq-len", type=option(Length), metavar="N", help="targets in a block (%(default)s)")
    outputs.add_argument(
        "--validation-fraction",
        type=option(Fraction),
        metavar="F",
        help="part of the documents kept for validation, chosen by a seeded hash of their text (%(default)s)",
    )
    outputs.add_argument(
        "--seed", type=option(Seed), metavar="N", help="of the split and the documents' order (%(default)s)"
    )
    outputs.add_argument("--overwrite", action="store_true", help="replace a folder that was prepared differently")
    outputs.add_argument(
        "--num-proc", type=option(Processes), metavar="N", help="processes that tokenise (%(default)s)"
    )
    defaults = {f.name: f.default for f in dataclasses.fields(PrepareSettings) if f.default is not dataclasses.MISSING}
    parser.set_defaults(**defaults | {"num_proc": os.cpu_count() or 1})
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``motifarch data prepare``.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        UserError: for anything that the user can mend.
    """
    options = vars(build_parser().parse_args(argv))
    settings = PrepareSettings(
        **{**options, "sources": tuple(options["sources"]), "languages": tuple(options["languages"])}
    )
    before = settings.output.exists()
    told = False

    def report(line: str) -> None:
        nonlocal told
        told = True
        print(printable(line), flush=True)

    try:
        # These libraries take seconds to import: options come first, and Ctrl-C is answered.
        with loading():
            from motifarch.data.pipeline import prepare

        with _only_own_bars():
            made = prepare(settings, report)
    except KeyboardInterrupt:
        state = "is as it was" if before else "was not made"
        print(f"interrupted: {settings.output} {state}; run the same command to start over", file=sys.stderr)
        return 130
    except OSError as error:
        remedy = "give another --output, or check the permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free some space, or give an --output on another disk"
        raise UserError(f"cannot prepare {settings.output} ({error}): {remedy}") from None
    _summarise(settings.output, made, found=not told)
    return 0


def _summarise(output: Path, made: Manifest, *, found: bool) -> None:
    from motifarch.data.lengths import describe_lengths

    verb = "already prepared with these settings" if found else "prepared"
    print(f"{printable(output)}: {verb}, fingerprint {made.fingerprint[:12]}")
    for split, n in made.splits.items():
        blocks = counted(n.blocks, f"block of {made.seq_len}")
        line = f"  {split}: {counted(n.documents, 'document')}, {counted(n.tokens, 'token')}, {blocks}"
        if n.trained_tokens is not None:
            line += f"; trained: {counted(n.trained_tokens, 'token')}, padding: {n.padding_tokens:,} more"
        print(line)
    skipped = counted(made.skipped["count"], "document")
    print(f"  tokenizer: {made.vocab_size:,} tokens; skipped: {skipped} (see data.json)")
    if made.truncated.get("count"):
        print(f"  truncated: {counted(made.truncated['count'], 'conversation')} (see data.json)")
    if made.filtered.get("count"):
        print(f"  left out by options: {counted(made.filtered['count'], 'document')} (see data.json)")
    for source in made.lengths:
        print(f"  {describe_lengths(source)}")
    for note in made.notes:
        print(f"  {note}")


@contextmanager
def _only_own_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
