"""What a verification found, one check a line."""

from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "fails", "unknown"]
"""`unknown` is what could not be looked at: what it would need is not there."""


@dataclass(frozen=True)
class Finding:
    """One check."""

    verdict: Verdict
    check: str
    """What was looked at, in words for people who know no torch."""
    detail: str = ""
    """Where it fails, or why it is unknown."""


@dataclass
class Findings:
    """All of a verification."""

    found: list[Finding] = field(default_factory=list)

    def add(self, check: str, problems: list[str] | None = None, unknown: str = "") -> bool:
        """Notes a check, which holds where there are no problems; returns whether it does."""
        problems = problems or []
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        verdict: Verdict = "fails" if problems else "unknown" if unknown else "holds"
        self.found.append(Finding(verdict, check, shown or unknown))
        return verdict == "holds"

    @property
    def failed(self) -> list[Finding]:
        """Those that fail."""
        return [f for f in self.found if f.verdict == "fails"]

    def as_json(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [{"verdict": f.verdict, "check": f.check, "detail": f.detail} for f in self.found]
