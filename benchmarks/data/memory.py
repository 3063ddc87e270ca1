"""Peak memory of `data prepare` and `tokenizer train` on a small corpus and one ten times as large.

    python -m benchmarks.data.memory --work runs/data_memory          # 0.2 and 2 GB of text
    python -m benchmarks.data.memory --work runs/data_memory --megabytes 2 20

The text is generated: words drawn by Zipf's law from a fixed list, a half of it in Hangul, so that
a larger corpus has no more different words than the list. A tokenizer's training counts words, so
its memory grows with how many differ; on real text it does grow, with ever rarer words.

Memory is that of the command and its processes together, a page of several counted once, read some
ten times a second (Linux). `own` is what they hold themselves (anonymous and shared pages);
`mapped` are pages of files, which the kernel drops when others need memory: those of the corpus on
disk are among them.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.lib import cli, report

_SECONDS_BETWEEN = 0.1
_DOCUMENT_WORDS = 300
_MEBI = 2**20


def word_list(number: int, seed: int = 0) -> list[str]:
    """Different words, of Hangul and Latin letters by turns, short ones first."""
    rng, words = np.random.default_rng(seed), dict[str, None]()
    while len(words) < number:
        length = 1 + int(np.log1p(len(words)) / 3) + int(rng.integers(2))
        first, letters = (0xAC00, 11_172) if len(words) % 2 else (ord("a"), 26)
        words["".join(chr(first + letter) for letter in rng.integers(letters, size=length))] = None
    return list(words)


def documents(size: int, words: list[str], seed: int = 0) -> Iterator[str]:
    """Documents of about 2 kB, a line each, until their UTF-8 has ``size`` bytes together."""
    rng, names = np.random.default_rng(seed), np.array(words)
    cumulative = np.cumsum(1 / np.arange(1, len(words) + 1))
    while size > 0:
        drawn = names[np.searchsorted(cumulative, rng.random(_DOCUMENT_WORDS) * cumulative[-1], side="right")]
        line = " ".join(drawn) + "\n"
        size -= len(line.encode())
        yield line


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command, and give its seconds and its peaks in MiB.

    Raises:
        CalledProcessError: it failed.
    """
    begin, peaks = time.perf_counter(), {"own": 0, "mapped": 0}
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        now = _memory_of_session(process.pid)
        peaks = {kind: max(peaks[kind], now[kind]) for kind in peaks}
        time.sleep(_SECONDS_BETWEEN)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    peaks_mib = {f"{kind}_mib": round(peak / _MEBI) for kind, peak in peaks.items()}
    return {"seconds": round(time.perf_counter() - begin, 1), **peaks_mib}


def _memory_of_session(leader: int) -> dict[str, int]:
    memory = {"own": 0, "mapped": 0}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == leader:
                lines = (line.split() for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
                values = {line[0]: int(line[1]) * 1024 for line in lines}
                memory["own"] += values["Pss_Anon:"] + values["Pss_Shmem:"]
                memory["mapped"] += values["Pss_File:"]
        except (OSError, KeyError):  # it has just ended
            continue
    return memory


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Generate each corpus, measure both commands on it, and report."""
    environment = report.environment(
        "benchmarks.data.memory", torch.device("cpu"), ["motifarch", "tokenizers", "datasets", "pyarrow"]
    )
    words, results = word_list(arguments.words), []
    arguments.work.mkdir(parents=True, exist_ok=True)
    for megabytes in arguments.megabytes:
        text, tokenizer, data = (arguments.work / f"{megabytes}{name}" for name in (".txt", "_tokenizer", "_data"))
        with text.open("w", encoding="utf-8") as file:
            file.writelines(documents(megabytes * 10**6, words))
        cut = ["--source", f"files:{text}", "--document-separator", r"\n"]
        motifarch = [sys.executable, "-m", "motifarch.cli"]
        train = [*motifarch, "tokenizer", "train", *cut, "--vocab-size", "8192", "--output", str(tokenizer)]
        prepare = [*motifarch, "data", "prepare", *cut, "--tokenizer", str(tokenizer), "--output", str(data)]
        for command in (train, [*prepare, "--num-proc", str(arguments.num_proc)]):
            name = " ".join(command[len(motifarch) : len(motifarch) + 2])
            results.append({"command": name, "megabytes": megabytes, **measure(command)})
            report.write_json(arguments.output, {"environment": environment, "results": results})
    rows = [[one["command"], *(f"{v:,}" for v in list(one.values())[1:])] for one in results]
    columns = ["", "text\nMB", "seconds\n", "own\nMiB", "mapped\nMiB"]
    console.print(report.table("Peak memory, all processes of a command together", columns, rows))
    console.print(f"wrote {arguments.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The benchmark's command line; returns the exit status."""
    parser = cli.bare_parser("benchmarks.data.memory", __doc__)
    add = parser.add_argument
    add("--megabytes", type=int, nargs="+", default=[200, 2000], help="sizes of the text; default: %(default)s")
    add("--words", type=int, default=200_000, help="different words; default: %(default)s")
    add("--num-proc", type=int, default=2, help="processes that tokenise; default: %(default)s")
    add("--work", type=Path, default=report.ROOT / "runs" / "data_memory", help="empty folder for text and outputs")
    add("--output", type=Path, default=report.RESULTS / "data_memory_cpu.json", help="JSON file")
    return cli.exit_status(lambda: run(parser.parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
