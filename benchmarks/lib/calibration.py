"""The static model held to figures that others measured, to an audit's predictions, and beside what
an H100 took for our own layers.

``benchmarks/results/calibration.json`` has, for each figure, its source, the counted loops of the
kernel that it is of, and what the model predicted with the constants that stand in the file.
FlashAttention-3's were read from the compiled kernels in the wheels of xformers 0.0.32.post2 and
flash_attn3_jax 0.2.3, Triton's from :mod:`benchmarks.lib.stock_attention`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.lib import report
from benchmarks.lib.predict import CONSTANTS, Compiled, Constants, Shape, Stream, attention_kernel, layer

PATH = report.RESULTS / "calibration.json"
BOUNDS = {"audit": 0.10, "published": 0.30}
"""Of the error, for what the model was made from; what was measured afterwards tells how good it
is."""


class Row(NamedTuple):
    """A figure, in TFLOP/s or as its name says, and what the model makes of its kernel."""

    name: str
    kind: str
    """"published": measured, and published; "audit": predicted by the audit of commit 8e0dfbc;
    "measured": a direction of a layer of ours, by ``benchmarks.ops.attention``."""
    source: str
    figure: float
    recorded: float
    """With the constants in the file."""
    now: float

    @property
    def error(self) -> float:
        """Of the present prediction, as a part of the figure."""
        return self.now / self.figure - 1


def rows(constants: Constants = CONSTANTS) -> tuple[dict[str, float], list[Row]]:
    """The recorded constants, and every figure beside both predictions."""
    content = json.loads(PATH.read_text(encoding="utf-8"))
    found = [
        Row(r["name"], r["kind"], r["source"], r["figure"], r["predicted"], _predict(r, constants))
        for r in content["rows"]
    ]
    return content["constants"], found


def _predict(row: Mapping[str, Any], constants: Constants) -> float:
    if "layer" in row:
        shape = Shape(**row["shape"])
        seconds = sum(part.seconds for part in layer(row["layer"], shape, constants).values())
        return _layer_flops(shape, backward=row["backward"]) / seconds * 1e-12
    kernel = Compiled.of(row["kernel"])
    if "stream" in row:
        return 100 * Stream(*row["stream"]).share(kernel, constants)
    shape = Shape(**row["shape"])
    part = attention_kernel(kernel, shape, constants)
    if not row["whole"]:  # the audit gives the main loop's
        return part.tflops
    d, dv = shape.head_dim, shape.v_head_dim
    flops = 6 * d + 4 * dv if kernel.kernel == "flash_backward" else 2 * (d + dv)
    return shape.pairs * shape.batch * shape.noise_heads * shape.maps * flops / part.seconds * 1e-12


def _layer_flops(shape: Shape, *, backward: bool) -> float:
    d, dv, g, noise = shape.head_dim, shape.v_head_dim, shape.group, shape.noise
    flops = (6 * d + 4 * dv) * g + 6 * d * noise if backward else 2 * (d + dv) * shape.maps
    return shape.pairs * shape.batch * shape.noise_heads * flops


def describe(recorded: Mapping[str, float], found: Sequence[Row]) -> str:
    """A Markdown table of every figure with both predictions, and the constants that changed."""
    lines = ["| kernel | figure | recorded prediction | prediction now | error | source |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.name} | {r.figure:.0f} | {r.recorded:.0f} | {r.now:.0f} | {100 * r.error:+.1f}% | {r.kind}: {r.source} |"
        for r in found
    ]
    changed = {n: (recorded.get(n), now) for n, now in CONSTANTS._asdict().items() if recorded.get(n) != now}
    lines += [f"\n{name} was {was} and is {now}" for name, (was, now) in changed.items()]
    return "\n".join(lines)


def summary() -> str:
    """How far the model is from what was published and what the audit said, in a line."""
    found = rows()[1]
    kinds = dict.fromkeys(r.kind for r in found)
    parts = (f"{kind} figures to {max(abs(r.error) for r in found if r.kind == kind):.0%}" for kind in kinds)
    return "the model gives " + ", ".join(parts)


def write() -> None:
    """Record the present constants and predictions."""
    content = json.loads(PATH.read_text(encoding="utf-8"))
    for row, found in zip(content["rows"], rows()[1], strict=True):
        row["predicted"] = round(found.now, 1)
    report.write_json(PATH, content | {"constants": CONSTANTS._asdict()})
