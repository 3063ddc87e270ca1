"""Korean and English prose, and Python, in training and held-out documents.

    apt-get download libreoffice-help-ko libreoffice-help-en-us
    for package in libreoffice-help-*.deb; do dpkg -x $package unpacked; done
    python -m benchmarks.tokenizers.corpus unpacked --output corpora

LibreOffice's help (Debian's packages) is the same pages in both languages; Python is this
interpreter's standard library. A page is held out in both languages, or in none: one in ten, by a
hash of its name. Pages of less than 200 characters, and copies, are left out.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lxml import html  # type: ignore[import-untyped]
from rich.console import Console

from benchmarks.lib import cli
from motifarch.data.texts import TextSettings, texts_of
from motifarch.errors import UserError

MODULE = "benchmarks.tokenizers.corpus"
HELP = {"korean": "ko", "english": "en-US"}
PARTS = ("train", "held_out")
_LEAST = 200
_BLOCKS = ".//p|.//h1|.//h2|.//h3|.//h4|.//h5|.//li|.//td"


def is_held_out(name: str) -> bool:
    """One name of ten."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of a folder's pages: what a reader sees, a line for each block."""
    for path in sorted(folder.rglob("*.html")):
        page = html.parse(str(path)).getroot()
        if page is None:
            continue
        shown = (page.xpath('//*[@id="DisplayArea"]') or page.xpath("//body") or [page])[0]
        for hidden in shown.xpath(".//script|.//style"):
            hidden.getparent().remove(hidden)
        blocks = (re.sub(r"\s+", " ", block.text_content()).strip() for block in shown.xpath(_BLOCKS))
        yield path.relative_to(folder).as_posix(), "\n".join(block for block in dict.fromkeys(blocks) if block)


def write(documents: Iterable[tuple[str, str]], output: Path, language: str) -> dict[str, int]:
    """Writes a language's two files of records; the number of documents in each."""
    seen, found = set(), dict.fromkeys(PARTS, 0)
    files = {part: (output / f"{language}_{part}.jsonl").open("w", encoding="utf-8") for part in PARTS}
    for name, text in documents:
        if len(text) < _LEAST or text in seen:
            continue
        seen.add(text)
        part = PARTS[is_held_out(name)]
        files[part].write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
        found[part] += 1
    for file in files.values():
        file.close()
    return found


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Write all files."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for language, code in HELP.items():
        folder = arguments.unpacked / "usr" / "share" / "libreoffice" / "help" / code
        if not folder.is_dir():
            raise UserError(f"{folder} is not there: unpack Debian's libreoffice-help-{code.lower()} (dpkg -x)")
        console.print(f"{language}: {write(pages(folder), arguments.output, language)}")
    library = ((text.name, text.text) for text in texts_of(TextSettings(("stdlib",))))
    console.print(f"python: {write(library, arguments.output, 'python')}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser(MODULE, __doc__)
    made.add_argument("unpacked", type=Path, help="folder that the packages were unpacked into")
    made.add_argument("--output", type=Path, required=True, help="folder for the records")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: run(parser().parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
