"""Draws pictures of docs/pictures: how the attention kernels walk over queries and keys.

    python docs/tools/tilings.py

Colours of lines and text are the theme's where a picture is part of a page, and the reader's
(light or dark) where it is an image.
"""

from collections.abc import Iterable
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
CELL = 22

STYLE = """
  .tiling { font: 13px system-ui, sans-serif; --ink: var(--md-default-fg-color, #24292f); }
  .tiling text { fill: var(--ink); }
  .tiling .small { font-size: 11.5px; }
  .tiling .middle { text-anchor: middle; }
  .tiling .end { text-anchor: end; }
  .tiling .bold { font-weight: 600; }
  .tiling .out { fill: none; stroke: var(--ink); stroke-opacity: .22; }
  .tiling .whole { fill: #4c8bd6; fill-opacity: .55; stroke: var(--ink); stroke-opacity: .35; }
  .tiling .cut { fill: #4c8bd6; fill-opacity: .22; stroke: var(--ink); stroke-opacity: .35; }
  .tiling .noise { fill: #e08a3c; fill-opacity: .6; stroke: var(--ink); stroke-opacity: .35; }
  .tiling .noise-cut { fill: #e08a3c; fill-opacity: .25; stroke: var(--ink); stroke-opacity: .35; }
  .tiling .sum { fill: #3fa66b; fill-opacity: .55; stroke: var(--ink); stroke-opacity: .35; }
  .tiling .now { fill: none; stroke: var(--ink); stroke-width: 2.2; }
  .tiling .edge { stroke: var(--ink); stroke-width: 1.6; fill: none; }
  .tiling .arrow { stroke: var(--ink); stroke-width: 1.6; fill: none; }
  .tiling .head { fill: var(--ink); }
  @media (prefers-color-scheme: dark) { .tiling { --ink: var(--md-default-fg-color, #e6edf3); } }
"""


class Picture:
    """A picture that is drawn from top to bottom; parts are kept as SVG."""

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.name, self.title, self.width, self.height = name, title, width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        """Text with its baseline at y."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{text}</text>')

    def box(self, x: float, y: float, style: str, width: float = CELL, height: float = CELL) -> None:
        """A rectangle."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{style}"/>')

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        """A line through points, perhaps with a head at its end."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="{path}" class="{"arrow" if arrow else "edge"}"/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            corners = [(x, y), (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)]
            self.parts.append(f'<path d="M{" L".join(f"{a:g} {b:g}" for a, b in corners)}z" class="head"/>')

    def legend(self, x: float, y: float, entries: Iterable[tuple[str, str]]) -> None:
        """A square of each style and what it means, one below the other."""
        for i, (style, meaning) in enumerate(entries):
            self.box(x, y + 22 * i, style, 14, 14)
            self.text(x + 21, y + 22 * i + 11.5, meaning, "small")

    def sides(self, x: float, y: float, size: float) -> None:
        """What the sides of a square are."""
        self.text(x + size / 2, y - 9, "keys", "small middle")
        turned = f"translate({x - 9:g} {y + size / 2:g}) rotate(-90)"
        self.parts.append(f'<text transform="{turned}" class="small middle">queries</text>')

    def save(self) -> None:
        """Write the file."""
        body = "\n  ".join(self.parts)
        PICTURES.mkdir(exist_ok=True)
        (PICTURES / f"{self.name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" class="tiling" '
            f'role="img" aria-label="{self.title}">\n'
            f"  <style>{STYLE}</style>\n  {body}\n</svg>\n",
            encoding="utf-8",
        )


def causal(query: int, key: int, *, window: int | None = None) -> str:
    """The style of a tile of 1 x 1: outside of the mask, cut by it, or whole."""
    if key > query or (window is not None and key < query - window):
        return "out"
    return "cut" if key == query or (window is not None and key == query - window) else "whole"


def grid(picture: Picture, x: float, y: float, size: int, *, window: int | None = None) -> None:
    """A square of tiles, and what its sides are."""
    for i in range(size):
        for j in range(size):
            picture.box(x + j * CELL, y + i * CELL, causal(i, j, window=window))
    picture.sides(x, y, size * CELL)


def forward() -> None:
    """A program's walk over keys, and what it does for the heads of its group."""
    p = Picture("forward", "Forward: a tile of queries walks over the keys it sees", 640, 470)
    for x, window, name in ((34, None, "causal"), (264, 3, "causal, window")):
        p.text(x + 4 * CELL, 18, name, "bold middle")
        grid(p, x, 48, 8, window=window)
        first = 0 if window is None else 6 - window
        p.box(x + first * CELL, 48 + 6 * CELL, "now", (7 - first) * CELL)
        p.line((x + first * CELL + 5, 48 + 6.5 * CELL), (x + 7 * CELL - 5, 48 + 6.5 * CELL), arrow=True)
    p.legend(
        470, 62, (("whole", "whole: no mask"), ("cut", "cut by the mask"), ("out", "not visited"), ("now", "a program"))
    )
    p.text(34, 270, "One program: a tile of queries of a noise head and its g signal heads (here 4:1)", "bold")
    for i in range(5):
        y = 288 + i * 30
        p.text(110, y + 16, "noise" if i == 0 else f"signal {i}", "end")
        for j in range(7):
            p.box(120 + j * CELL, y, ("whole" if i else "noise") if j < 6 else ("cut" if i else "noise-cut"))
        p.line((120 + 7 * CELL + 6, y + 11), (318, y + 11), arrow=True)
        p.box(324, y, "noise" if i == 0 else "sum", 46)
        p.text(347, y + 15.5, "O1" if i else "O2", "small middle")
        if i == 0:
            p.text(384, y + 15.5, "in float32, for all heads of the group", "small")
        else:
            p.line((374, y + 11), (398, y + 11), arrow=True)
            p.text(405, y + 15.5, "O1 − λ O2, sub-norm or gate", "small")
    p.text(
        34,
        458,
        "The noise head is computed once for its g signal heads. Results are rounded once, at the end.",
        "small",
    )
    p.save()


def backward() -> None:
    """The two kernels, and the one pass with its order."""
    p = Picture("backward", "Backward: two kernels, or one pass in a fixed order", 690, 330)
    size = 6
    for x, name in ((34, "dK and dV: down a column"), (264, "dQ: along a row"), (494, "one pass, in order")):
        p.text(x + size * CELL / 2, 18, name, "bold middle")
        grid(p, x, 48, size)
    bottom = 48 + size * CELL
    p.box(34 + 2 * CELL, 48 + 2 * CELL, "now", CELL, 4 * CELL)
    p.line((34 + 2.5 * CELL, 48 + 2 * CELL + 5), (34 + 2.5 * CELL, bottom - 5), arrow=True)
    p.box(34 + 2 * CELL, bottom + 26, "sum")
    p.text(34 + 3 * CELL + 8, bottom + 41, "dK, dV of these keys", "small")
    p.box(264, 48 + 4 * CELL, "now", 5 * CELL)
    p.line((264 + 5, 48 + 4.5 * CELL), (264 + 5 * CELL - 5, 48 + 4.5 * CELL), arrow=True)
    p.box(264 + size * CELL + 14, 48 + 4 * CELL, "sum", 30)
    p.text(264 + size * CELL + 29, 48 + 4 * CELL + 15.5, "dQ", "small middle")
    p.text(264, bottom + 41, "computes P and dP again", "small")
    x = 494
    for j in range(size):
        p.text(x + (j + 0.5) * CELL, bottom + 18, str(j + 1), "small middle")
        p.line((x + (j + 0.5) * CELL, bottom - 4), (x + (j + 0.5) * CELL, 48 + j * CELL + 5), arrow=True)
    p.box(x, 48 + 5 * CELL, "now", size * CELL)
    p.box(x + size * CELL + 14, 48 + 5 * CELL, "sum", 30)
    p.text(x + size * CELL + 29, 48 + 5 * CELL + 15.5, "dQ", "small middle")
    p.text(x, bottom + 41, "a program a column, from the", "small")
    p.text(x, bottom + 57, "last queries up; dK, dV likewise", "small")
    y = bottom + 96
    p.text(34, y, "One pass: columns add to a row's dQ one after the other, in every run alike", "bold")
    for j in range(size):
        p.box(40 + j * 78, y + 16, "whole")
        p.text(40 + j * 78 + CELL / 2, y + 31, str(j + 1), "small middle")
        p.line((40 + j * 78 + CELL + 5, y + 27), (40 + (j + 1) * 78 - 5, y + 27), arrow=True)
    p.box(40 + size * 78, y + 16, "sum", 40)
    p.text(60 + size * 78, y + 31, "dQ", "small middle")
    p.save()


def packed() -> None:
    """Documents of one row, and their tiles in one grid."""
    lengths, tile = (5, 2, 7), 3  # tokens
    p = Picture("packed", "Packed documents: one grid for the tiles of all", 640, 330)
    unit, x, y, total = 15, 44, 48, sum(lengths)
    p.text(x + total * unit / 2, 18, "three documents in one row", "bold middle")
    p.sides(x, y, total * unit)
    p.box(x, y, "out", total * unit, total * unit)
    p.text(300, 18, "programs of the grid", "bold")
    for left, name in ((325, "document"), (392, "tile"), (446, "first row")):
        p.text(left, 42, name, "small middle")
    number, start = 0, 0
    for z, length in enumerate((*lengths, 0)):
        for empty in range(number, start // tile + z + (length == 0)):
            p.box(300, 52 + empty * 26, "out", 50)
            p.text(325, 67.5 + empty * 26, "none", "small middle")
        number = start // tile + z
        for i in range(0, length, tile):
            height, top = min(tile, length - i), 52 + number * 26
            for j in range(0, i + 1, tile):
                at = (x + (start + j) * unit, y + (start + i) * unit)
                p.box(*at, "whole" if j < i else "cut", min(tile, length - j) * unit, height * unit)
            p.box(300, top, "whole", 50)
            for left, value in ((325, z), (392, number), (446, i)):
                p.text(left, top + 15.5, str(value), "small middle")
            if height < tile:
                p.text(486, top + 15.5, f"{height} of {tile} tokens", "small")
            number += 1
        start += length
    p.text(x, 296, "Document z begins at tile cu_seqlens[z] // BLOCK + z. The grid has tokens // BLOCK +", "small")
    p.text(x, 313, "documents + 1 tiles: enough for any bounds, so that the host need not read them.", "small")
    p.save()


if __name__ == "__main__":
    forward()
    backward()
    packed()
