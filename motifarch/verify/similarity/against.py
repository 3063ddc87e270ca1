"""A model beside others, for `motifarch verify --against`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motifarch.ledger.chain import Ledger
from motifarch.verify.findings import Findings
from motifarch.verify.similarity import report
from motifarch.verify.similarity.compare import Comparer, Comparison
from motifarch.verify.similarity.parts import Model


@dataclass(frozen=True)
class Likeness:
    """What the weights of a folder have in common with others'."""

    folder: Path
    comparisons: list[Comparison]

    @classmethod
    def of(cls, folder: Path, others: Sequence[Path]) -> "Likeness":
        """Compares; where there are no others, nothing is opened.

        Args:
            folder: a model's folder, a run's or a checkpoint's.
            others: the same.

        Raises:
            UserError: one of them holds no weights, or is damaged.
        """
        if not others:
            return cls(folder, [])
        comparer = Comparer(Model(folder))
        return cls(folder, [comparer.compare(Model(other)) for other in others])

    @property
    def findings(self) -> Findings:
        """A check for each other model."""
        return report.findings(self.comparisons)

    @property
    def section(self) -> str:
        """The part of a report, as Markdown; empty where nothing was compared."""
        return f"\n{report.section(self.comparisons)}" if self.comparisons else ""

    def as_json(self) -> list[dict[str, Any]]:
        """For JSON."""
        return report.as_json(self.comparisons)

    def draw(self, file: Path) -> None:
        """Draws the likeness beside a report."""
        report.draw(self.comparisons, file.with_suffix(".png"), self.folder.resolve().name)


def has_ledger(folder: Path) -> bool:
    """Whether a folder is a run's that keeps one."""
    ledger = Ledger.read(folder)
    return bool(ledger.entries or ledger.problems)
