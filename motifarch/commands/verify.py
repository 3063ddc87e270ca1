"""`motifarch verify`: whether weights come from a seed, from data and a recipe."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from motifarch.command_line import Parser, loading, option, path, writing
from motifarch.errors import UserError
from motifarch.field_types import PositiveCount, Ranks
from motifarch.files import atomic_write


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies a run's or a model's folder; 0 where nothing fails, else 1."""
    parser = Parser(
        prog="motifarch verify",
        description="Check that weights come from a seed, data and a recipe: every link of their ledger, of a run "
        "without reading a tensor; and, if asked, the first weights and parts of the training again.",
        examples=[
            "motifarch verify runs/tiny_cpu",
            "motifarch verify runs/tiny_cpu --init --replay 3 --seed 'block 870000 of bitcoin' --report verified.md",
            "motifarch verify runs/tiny_cpu/export --made-of runs/tiny_cpu",
            "motifarch verify a_model --against another_model --against runs/tiny_cpu --report verified.md",
        ],
    )
    parser.add_argument("run", type=path, help="the folder of a run, an average, an export or a grown model")
    parser.add_argument("--init", action="store_true", help="make the first weights again from the seed")
    parser.add_argument(
        "--replay", type=option(PositiveCount), metavar="N", help="train N intervals between saves again, and compare"
    )
    parser.add_argument(
        "--seed", metavar="TEXT", help="what draws the intervals: public, and not known when the run was made"
    )
    parser.add_argument(
        "--data",
        type=path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="where the prepared data is now, in the recipe's order (default: where it was)",
    )
    parser.add_argument("--ranks", type=option(Ranks), help="processes of a replay (default: as many as there were)")
    parser.add_argument(
        "--made-of",
        type=path,
        metavar="FOLDER",
        help="what an export, an average or first weights were made of, to make them again and compare",
    )
    parser.add_argument(
        "--row",
        type=path,
        metavar="FILE.json",
        help="what `motifarch data prove` wrote of a row: whether it is in the data of the ledger",
    )
    parser.add_argument("--key", type=path, action="append", default=[], help="a public key that has to have signed")
    parser.add_argument(
        "--against",
        type=path,
        action="append",
        default=[],
        metavar="OTHER",
        help="another model's folder or run: do the weights, or a part of them, come from there? What is "
        "verified may then be any model's folder; once for each",
    )
    parser.add_argument(
        "--report", type=path, metavar="FILE.md", help="write the report there, JSON and a picture beside it"
    )
    given = parser.parse_args(argv)
    if (given.replay is None) != (given.seed is None):
        parser.error("--replay and --seed go together: the seed draws which intervals are trained again")
    with loading():
        from motifarch.ledger.link import CHECKPOINT
        from motifarch.verify.first_weights import verify_first_weights
        from motifarch.verify.links import chain_of, verify_links, verify_row
        from motifarch.verify.made_of import verify_made_of
        from motifarch.verify.replay import drawn, intervals, replay
        from motifarch.verify.report import report
        from motifarch.verify.similarity.against import Likeness, has_ledger
    try:
        keys = [key.read_text(encoding="utf-8") for key in given.key]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--key can't be read: {error}; give a public key's file, such as key.pub") from None
    likeness = Likeness.of(given.run, given.against)
    head = None
    of_a_ledger = (given.init, given.replay, given.made_of, given.row, keys)
    if given.against and not has_ledger(given.run) and not any(of_a_ledger):
        found, text = likeness.findings, f"# Weights of {given.run.resolve().name}\n"
    else:
        found = verify_links(given.run, keys=keys)
        ledger, chain = chain_of(given.run)
        head = chain[0].hash if chain else None
        if given.init and chain:
            found.found += verify_first_weights(ledger, chain).found
        if given.made_of and chain:
            found.found += verify_made_of(given.run, given.made_of, ledger, chain).found
        if given.row:
            found.found += verify_row(given.row, chain).found
        available = intervals(given.run, chain)
        chosen = drawn(available, given.replay, given.seed, chain[0]) if given.replay and chain else []
        with tempfile.TemporaryDirectory(prefix="motifarch_verify_") as work:
            for i, interval in enumerate(chosen):
                found.found += replay(interval, ledger, Path(work) / str(i), ranks=given.ranks, data=given.data).found
        found.found += likeness.findings.found
        total = sum(entry.link["kind"] == CHECKPOINT for entry in chain)
        counts = {"replayed": len(chosen), "total": total, "available": len(available)}
        text = report(given.run, chain, found, **counts, seed=given.seed)
    text += likeness.section
    print(text, end="")
    if given.report:
        content = {"checks": found.as_json(), "head": head, "similarity": likeness.as_json()}
        with writing("--report"):
            likeness.draw(given.report)
            with atomic_write(given.report) as file:
                file.write(text)
            with atomic_write(given.report.with_suffix(".json")) as file:
                json.dump(content, file, indent=2)
    return 1 if found.failed else 0
