"""What patching a model did to it."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Column, Table


@dataclass
class ModuleReport:
    """One module of the model.

    Args:
        name: where it is.
        what: what it is now, in a few words.
        kept: what of it stays as it was.
        added: names of its new parameters.
        grown: names of parameters with new rows, for the noise heads, behind those that they had.
        lost: what it had and has no more, by name.
        merged: how key/value heads were merged; empty if they were not.
        exact: whether it starts as the same function, up to rounding.
    """

    name: str
    what: str
    kept: list[str]
    added: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    merged: str = ""
    exact: bool = True


@dataclass
class PatchReport:
    """What :func:`motifarch.integrations.patch` did, in a sentence and module by module, in the
    model's order; prints as a table with a line for each kind of module.
    """

    summary: str
    modules: list[ModuleReport]

    @property
    def exact(self) -> bool:
        """Whether the model starts as the same function."""
        return all(m.exact for m in self.modules)

    @property
    def added(self) -> list[str]:
        """Names of the model's new parameters."""
        return [f"{m.name}.{parameter}" for m in self.modules for parameter in m.added]

    @property
    def grown(self) -> list[str]:
        """Names of the parameters that have new rows behind those that they had."""
        return [f"{m.name}.{parameter}" for m in self.modules for parameter in m.grown]

    def _kinds(self) -> list[ModuleReport]:
        """Modules that differ in their number alone as one, whose name says how many they are."""
        kinds: dict[str, list[ModuleReport]] = {}
        for m in self.modules:
            pattern = re.sub(r"\d+", "*", m.name)
            kinds.setdefault(repr(replace(m, name=pattern)), []).append(replace(m, name=pattern))
        whole = {repr(replace(m, name=re.sub(r"\d+", "*", m.name))): m for m in self.modules}
        return [
            replace(alike[0], name=f"{alike[0].name} x {len(alike)}") if len(alike) > 1 else whole[kind]
            for kind, alike in kinds.items()
        ]

    def __iter__(self) -> Iterator[ModuleReport]:
        """The modules."""
        return iter(self.modules)

    def __str__(self) -> str:
        """A sentence, and a table of 140 columns."""
        names = ("is now", "kept", "added", "more rows", "lost", "same start")
        columns = [Column(name, overflow="fold") for name in names]
        table = Table(Column("module", no_wrap=True), *columns)
        for m in self._kinds():
            lost = ", ".join([*m.lost, *([m.merged] if m.merged else [])])
            exact = "yes" if m.exact else "no"
            table.add_row(m.name, m.what, ", ".join(m.kept), ", ".join(m.added), ", ".join(m.grown), lost, exact)
        text = io.StringIO()
        Console(file=text, width=140).print(table)
        start = "starts as the same function" if self.exact else "does not start as the same function"
        return f"{self.summary}; the model {start}.\n{text.getvalue()}"
