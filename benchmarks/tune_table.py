"""The launch table that `benchmarks.tune` writes: what of it stays, what is replaced, and how it is
laid out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import report
from benchmarks.tune_candidates import BACKEND, Entry, SizeClass
from benchmarks.tune_launch import entry_at
from motif_kernels import tuning

TABLES = report.ROOT / "kernels" / "motif_kernels" / "tuning"
_MEMORY_WORD = r"[ -]+(\d+GB|HBM\d\w*)\b.*"


def splice(present: Sequence[Entry], classes: Sequence[SizeClass], chosen: Mapping[int | None, Entry]) -> list[Entry]:
    """A kernel's entries with those of the chosen classes replaced; neighbours that are equal
    become one.
    """

    def order(bound: int | None) -> float:
        return math.inf if bound is None else bound

    bounds = {e["up_to"] for e in present} | {c.up_to for c in classes}
    spliced: list[Entry] = []
    for bound in sorted(bounds, key=order):
        own = next((c for c in classes if order(bound) <= order(c.up_to)), None)
        fields = (chosen.get(own.up_to) if own else None) or entry_at(present, bound)
        if spliced and {k: v for k, v in spliced[-1].items() if k != "up_to"} == fields:
            spliced.pop()
        spliced.append({"up_to": bound, **fields})
    return spliced


def read_table(path: Path, shipped: Path) -> dict[str, Any]:
    """The table at ``path``, or where there is none the one that is shipped for the GPU, or an
    empty one.
    """
    found = next((p for p in (path, shipped) if p.exists()), None)
    return json.loads(found.read_text(encoding="utf-8")) if found else {"kernels": {}}


def write_table(path: Path, shipped: Path, gpu: str, source: str, kernels: Mapping[str, Sequence[Entry]]) -> None:
    """Write these kernels' entries into the table, one a line.

    What else :func:`read_table` finds stays; "sources" then says for each kernel of those where it
    came from.
    """
    old = read_table(path, shipped)
    sources = {n: old.get("sources", {}).get(n, old["source"]) for n in old["kernels"] if n not in kernels}
    listed = {**old["kernels"], **kernels}
    parts = [
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(dict(e))}" for e in entries) + "\n    ]"
        for name, entries in listed.items()
    ]
    head = {"gpu": old.get("gpu", gpu), "source": source, **({"sources": sources} if sources else {})}
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "kernels": {\n' + ",\n".join(parts) + "\n  }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def gpu_name_part(name: str) -> str:
    """What tells a GPU's name from others', without its memory's size: "NVIDIA H100" of "NVIDIA
    H100 80GB HBM3".
    """
    return re.sub(_MEMORY_WORD, "", name)


def present_table(path: Path, shipped: Path, gpu: str) -> dict[str, list[Entry]]:
    """What launches take now: the table that is to be written, if it exists, over what is shipped
    for the GPU.
    """
    backend = [{"up_to": None, "backend": "triton"}]  # what "auto" takes where no table says
    return {BACKEND: backend, **tuning.merged_table(gpu), **read_table(path, shipped)["kernels"]}
