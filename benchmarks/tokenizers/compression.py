"""Bytes a token on held-out text: BPE, SuperBPE, and vocabularies that packages have.

    python -m benchmarks.tokenizers.corpus unpacked --output corpora
    python -m benchmarks.tokenizers.compression corpora     # three minutes on two cores

BPE and SuperBPE of 16,384 tokens are trained on the same text, Korean and English help pages in
equal parts by characters, and measured on held-out pages and on Python, which they never saw.
o200k_base is also measured with tokens that were learned for it on the Korean pages. The text of
the vocabularies in packages is not known, nor whether it held these pages.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.lib import cli, report
from motifarch.commands.tokenizer_measure import tables
from motifarch.data.texts import TextSettings, texts_of
from motifarch.errors import UserError
from motifarch.tokenizer.extend import extend
from motifarch.tokenizer.loading import open_vocabulary, with_backend
from motifarch.tokenizer.measure import draw, measure
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.superbpe import train_superbpe
from motifarch.tokenizer.tiktoken_files import PACKAGES
from motifarch.tokenizer.train import as_pretrained, least_size, train_bpe

MODULE = "benchmarks.tokenizers.compression"
LANGUAGES = ("korean", "english", "python")
O200K = "bpe-openai:o200k_base"


def texts(corpora: Path, part: str, languages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Language and text of documents; of several languages as many characters each.

    Raises:
        UserError: the corpora are not there.
    """
    for language in languages:
        if not (corpora / f"{language}_{part}.jsonl").is_file():
            raise UserError(f"{corpora} has no {language}_{part}.jsonl: make it with benchmarks.tokenizers.corpus")
    sources = {f"files:{corpora / f'{language}_{part}.jsonl'}": language for language in languages}
    weights = (1.0,) * len(sources) if part == "train" else ()
    for text in texts_of(TextSettings(tuple(sources), weights)):
        yield sources[text.source], text.text


def unseen(corpora: Path, languages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Held-out text without the lines that training text of its language has."""
    for language in languages:
        seen = {line for _, text in texts(corpora, "train", [language]) for line in text.split("\n")}
        for _, text in texts(corpora, "held_out", [language]):
            if lines := [line for line in text.split("\n") if line not in seen]:
                yield language, "\n".join(lines)


def vocabularies(arguments: argparse.Namespace, console: Console) -> dict[str, PreTrainedTokenizerFast]:
    """All that are compared, by name."""
    special, size = SpecialTokens(), arguments.vocab_size
    stage_1 = least_size(special) + (size - least_size(special)) * 5 // 8

    def prose() -> Iterator[str]:
        return (text for _, text in texts(arguments.corpora, "train", LANGUAGES[:2]))

    def trained(name: str, tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
        console.print(f"{name}: {tokenizer.get_vocab_size():,} tokens")
        return as_pretrained(tokenizer, special)

    found = {
        "BPE": trained("BPE", train_bpe(prose(), size, special)),
        "SuperBPE": trained("SuperBPE", train_superbpe(prose(), size, special, stage_1_size=stage_1)),
    }
    found |= {name: open_vocabulary(name) for name in PACKAGES}
    korean = (text for _, text in texts(arguments.corpora, "train", LANGUAGES[:1]))
    extended, merges = extend(found[O200K].backend_tokenizer, korean, arguments.tokens, script="Hangul")
    console.print(f"o200k_base: {len(merges):,} new tokens")
    found[f"o200k_base + {len(merges):,} Korean"] = with_backend(found[O200K], extended)
    return found


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train, measure, write and print."""
    env = cli.introduce(MODULE, torch.device("cpu"), ("motifarch", "tokenizers", "transformers"), console)
    compared = vocabularies(arguments, console)
    held_out = texts(arguments.corpora, "held_out", LANGUAGES)
    figures = measure(compared, unseen(arguments.corpora, LANGUAGES[:2]) if arguments.unseen else held_out).as_dict()
    settings: dict[str, Any] = {"vocab_size": arguments.vocab_size, "new_tokens_wanted": arguments.tokens}
    settings["unseen_lines_only"] = arguments.unseen
    content = {"benchmark": "tokenizers", "environment": env, "settings": settings, "results": figures}
    path = arguments.output or report.RESULTS / "tokenizers.json"
    report.write_json(path, content)
    draw(figures, path.with_suffix(".png"))
    for table in tables(figures):
        console.print(table)
        console.print()
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser(MODULE, __doc__)
    add = made.add_argument
    add("corpora", type=Path, help="what benchmarks.tokenizers.corpus wrote")
    add("--vocab-size", type=int, default=16384, help="of BPE and SuperBPE; default %(default)s")
    add("--tokens", type=int, default=19000, help="new ones for o200k_base; default %(default)s")
    add("--unseen", action="store_true", help="measure the lines of held-out pages that no training page has")
    add("--output", type=Path, help="JSON file, a plot beside it; default benchmarks/results/tokenizers.json")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: run(parser().parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
