"""The launch table of a GPU while it is tuned."""

import json
import re
from pathlib import Path

from benchmarks.tuning.kernels import BACKEND, Entry, Kernel
from motif_kernels import tuning
from motifarch.files import atomic_write


class LaunchTable:
    """What launches take on a GPU: the table at ``path``, else the one shipped for it."""

    def __init__(self, path: Path, shipped: Path, gpu: str):
        found = next((p for p in (path, shipped) if p.exists()), None)
        old = json.loads(found.read_text(encoding="utf-8")) if found else {"kernels": {}}
        self.path, self.kernels = path, old["kernels"]
        self.measured: dict[str, list[int | None]] = old.get("measured", {})
        self.sources = {name: old.get("sources", {}).get(name, old["source"]) for name in self.kernels}
        # Without its memory: "NVIDIA H100" serves all of them.
        self.gpu = old.get("gpu", re.sub(r"[ -]+(\d+GB|HBM\d\w*)\b.*", "", gpu))
        backend = [{"up_to": None, "backend": "triton"}]  # what "auto" takes where no table says
        self.present = {BACKEND: backend, **tuning.merged_table(gpu), **self.kernels}

    def entry(self, kernel: str, size: int | None) -> Entry:
        """The entry that serves a size, without its bound; None is beyond every bound."""
        present = self.present[kernel]
        fitting = (e for e in present if e["up_to"] is None or (size is not None and size <= e["up_to"]))
        found = next(fitting, {"backend": "triton"})  # a backend's table may end below
        return {name: value for name, value in found.items() if name != "up_to"}

    def choose(self, kernel: Kernel, up_to: int | None, chosen: Entry, source: str) -> None:
        """Replace a class's entry and write the table, an entry a line; the others stay, but
        backends that were not measured: without an entry, ``auto`` knows better.
        """
        measured = [*self.measured.get(kernel.name, []), up_to]
        self.measured[kernel.name] = [bound for bound in kernel.classes if bound in measured]
        bounds = self.measured[kernel.name] if kernel.name == BACKEND else list(kernel.classes)
        entries = {bound: self.entry(kernel.name, bound) for bound in bounds} | {up_to: chosen}
        self.present[kernel.name] = [{"up_to": bound, **entry} for bound, entry in entries.items()]
        self.kernels[kernel.name], self.sources[kernel.name] = self.present[kernel.name], source
        parts = [
            f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(e)}" for e in entries) + "\n    ]"
            for name, entries in self.kernels.items()
        ]
        others = {name: old for name, old in self.sources.items() if old != source}
        head = json.dumps({"gpu": self.gpu, "source": source, "sources": others}, indent=2).removesuffix("\n}")
        head += f',\n  "measured": {json.dumps(self.measured)}'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write(head + ',\n  "kernels": {\n' + ",\n".join(parts) + "\n  }\n}\n")
