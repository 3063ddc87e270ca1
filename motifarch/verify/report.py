"""A verification in words, for people who know no torch."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from motifarch.ledger.chain import Entry
from motifarch.verify.findings import Findings
from motifarch.verify.replay import confidence

_MARKS = {"holds": "✓", "fails": "✗", "unknown": "?"}
SHARES = (0.5, 0.1, 0.01)
"""Of intervals that were cheated with, for which the report says how likely it is found."""


def report(
    folder: Path,
    chain: Sequence[Entry],
    found: Findings,
    *,
    replayed: int,
    total: int,
    available: int,
    seed: str | None,
) -> str:
    """The report of a verification, as Markdown.

    Args:
        folder: what was verified.
        chain: its entries, the newest first.
        found: the checks.
        replayed: intervals that were trained again.
        total: intervals of the chain.
        available: those that could have been drawn.
        seed: what they were drawn with.
    """
    head = f"entry {chain[0].hash}, step {chain[0].step:,}" if chain else "no entry holds"
    outcome = (
        f"**{len(found.failed)} of {len(found.found)} checks fail.**"
        if found.failed
        else f"**All {sum(f.verdict == 'holds' for f in found.found)} checks that could be made hold.**"
    )
    lines = [
        f"# Verification of {folder.resolve().name}",
        f"{outcome} {head}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        "\n".join(f"- {_MARKS[f.verdict]} {f.check}{f' — {f.detail}' if f.detail else ''}" for f in found.found),
        "## What this shows",
        _shown(chain, found, replayed, total, available, seed),
        "## What it does not show",
        "Where the text of the data comes from, and that it may be used. That code and machine are what they say of "
        "themselves: who trains the intervals again shows that of the intervals. What was tried before this run began.",
    ]
    return "\n\n".join(lines) + "\n"


def _shown(chain: Sequence[Entry], found: Findings, replayed: int, total: int, available: int, seed: str | None) -> str:
    if found.failed:
        return "Not that these weights come from this seed, data and recipe: see what fails."
    words = [
        f"The ledger has {len(chain)} entries that hold together: whoever changed one would have had to change all "
        "that follow, and each signature."
    ]
    if not replayed:
        words.append(
            "Nothing was trained again (`--replay N`), so that only the record was looked at: a record that was made "
            "up as a whole would hold together too."
        )
        return " ".join(words)
    words.append(
        f"{replayed} of {total} intervals between saves, drawn with the seed {seed!r}, were trained again and came "
        "to the same."
    )
    if available < total:
        words.append(f"Only {available} could be drawn: of the others, the checkpoint that they begin with is gone.")
    chances = ", ".join(f"{confidence(share, replayed, available):.1%} if {share:.0%} were" for share in SHARES)
    words.append(f"Had some of those that could be drawn been cheated with, this would have found it with {chances}.")
    return " ".join(words)
