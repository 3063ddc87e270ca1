"""What was found, in words, in figures and as a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from motifarch.files import atomic_write
from motifarch.verify.findings import Findings
from motifarch.verify.similarity.alignment import MOST_CHANNELS
from motifarch.verify.similarity.compare import Comparison, PartMatch
from motifarch.verify.similarity.limits import CALIBRATION, LIMITS

_SHOWN = 12
"""Matrices of a layer that a table and a picture have room for."""


def findings(comparisons: Sequence[Comparison]) -> Findings:
    """A check for each other model."""
    found = Findings()
    for comparison in comparisons:
        problems = [
            f"{part.part} is like {comparison.folder.name}'s {part.other} in {part.reason} (channels {part.how})"
            for part in comparison.nearest
            if part.alarm
        ]
        unknown = "" if comparison.parts else "; ".join(comparison.left_out) or "nothing could be compared"
        found.add(f"No part of the weights comes from {comparison.folder.name}.", problems, unknown)
    return found


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """For JSON: everything."""
    return [
        {
            "other": str(one.folder),
            "alarm": bool(one.alarms),
            "parts": [asdict(part) | {"alarm": part.alarm} for part in one.parts],
            "left_out": one.left_out,
            "tokenizer": None if one.tokenizer is None else asdict(one.tokenizer),
        }
        for one in comparisons
    ]


def section(comparisons: Sequence[Comparison]) -> str:
    """The part of a report, as Markdown."""
    lines = [
        "## Likeness to other models' weights",
        "0 is what chance gives, 1 the same. Channels of the two models are matched as they lie, by embeddings "
        f"(permuted or rotated), or else by graph matching, at most {MOST_CHANNELS} of them; shown is the way that "
        f"shows most. An alarm is a layer above {LIMITS.layers} (more for few channels), or embeddings above "
        f"{LIMITS.anchor} on rows that were not matched by. {CALIBRATION}",
    ]
    for one in comparisons:
        lines.append(f"### {one.folder.name}: {_verdict(one)}")
        if one.parts:
            lines.append(_table([_summary(part) for part in one.nearest]))
        for part in one.nearest:
            lines += [f"Layers of {part.part}:", _table(_rows(part))]
        if one.tokenizer is not None:
            lines.append(
                f"The tokenizers share {one.tokenizer.shared:,} tokens (Jaccard index {one.tokenizer.jaccard:.2f}); "
                f"their merges are {'the same' if one.tokenizer.same_merges else 'not the same'}."
            )
        if one.left_out:
            lines.append("Not compared:\n\n" + "\n".join(f"- {line}" for line in one.left_out))
    return "\n\n".join(lines) + "\n"


def _verdict(one: Comparison) -> str:
    if one.alarms:
        return "alarm; from outside: " + ", ".join(part.part for part in one.nearest if part.alarm)
    return "no sign" if one.parts else "nothing could be compared"


def _summary(part: PartMatch) -> dict[str, str]:
    return {
        "part": part.part,
        "beside": part.other,
        "channels": part.how,
        "most alike layer": f"{part.score:.3f}",
        "embeddings": _number(part.anchor),
        "their CKA": _number(part.cka),
        "": f"alarm: {part.reason}" if part.alarm else "no sign",
    }


def _rows(part: PartMatch) -> list[dict[str, str]]:
    return [
        {"layer": str(match.layer), "like": str(match.other), "score": f"{match.score:.3f}"}
        | {"plain cosine": _number(match.cosine)}
        | {_short(name): _number(match.matrices.get(name)) for name in _matrices(part)}
        for match in part.layers
    ]


def _matrices(part: PartMatch) -> list[str]:
    return list(dict.fromkeys(name for match in part.layers for name in match.matrices))[:_SHOWN]


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    cells = [heads, ["---"] * len(heads), *([row.get(name, "") for name in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def draw(comparisons: Sequence[Comparison], path: Path, title: str) -> None:
    """A heat map for each other model and part: the matrices of the layers, 0 to 1, as PNG."""
    from matplotlib.figure import Figure

    shown = [(one.folder.name, part) for one in comparisons for part in one.nearest if part.layers]
    if not shown:
        return
    heights = [1 + 0.28 * len(_matrices(part)) for _, part in shown]
    figure = Figure(figsize=(9, 0.8 + sum(heights) + 0.5 * len(shown)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, part) in zip(axes, shown, strict=True):
        names = _matrices(part)
        values = [[match.matrices.get(matrix, float("nan")) for match in part.layers] for matrix in names]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_yticks(range(len(names)), [_short(matrix) for matrix in names], parse_math=False)
        every = max(1, len(part.layers) // 16)
        axis.set_xticks(range(0, len(part.layers), every), [match.layer for match in part.layers[::every]])
        axis.set_xlabel("layer")
        verdict = f"alarm, channels {part.how}" if part.alarm else "no sign"
        axis.set_title(f"{part.part} beside {name}: {verdict}", fontsize=10, parse_math=False)
        figure.colorbar(image, ax=axis, label="correlation")
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png")
