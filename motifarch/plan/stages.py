"""Several stages of one run in one report, beside what others report of theirs."""

import base64
import html
import io
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from motifarch.plan.planning import Plan
from motifarch.plan.report import render, table

YARDSTICKS = (
    ("DeepSeek-V3", "Megatron", "256 B200, MXFP8", 3328),
    ("Qwen3-235B", "Megatron", "256 B200, MXFP8", 3776),
    ("78B, 3.5B of them active", "Kolibri", "768 B200", 14350),
)
"""Model, who trained it, on what, and tokens/s a GPU: as others reported them, read second hand."""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{margin: 2vw; background: white}} div {{overflow-x: auto}}
img {{max-width: 70em; min-width: 45em; width: 100%}}
pre {{font-size: 0.85em; line-height: 1.35; overflow-x: auto}}</style></head>
<body><div><img src="data:image/png;base64,PICTURE" alt="Memory and time of a step"></div>
<pre>{code}</pre></body></html>
"""


def summary(plans: list[tuple[str, Plan]]) -> Table:
    """Stages side by side, and what they take together."""
    columns = ("tokens of a row", "memory, GiB", "of", "step, s", "tokens/s a GPU", "tokens", "days", "fits")
    found = table("Stages (estimated)", "", *columns)
    for name, plan in plans:
        found.add_row(
            Text(name),
            f"{plan.seq_len:,}",
            f"{plan.peak / 2**30:.1f}",
            f"{plan.usable / 2**30:.1f}",
            f"{plan.time.total:.2f}",
            f"{plan.tokens_per_second / plan.gpus:,.0f}",
            f"{plan.tokens:.4g}",
            f"{plan.days:,.2f}",
            "yes" if plan.fits else "no",
        )
    tokens, days = (sum(getattr(plan, name) for _, plan in plans) for name in ("tokens", "days"))
    speed = tokens / days / 86400 / plans[0][1].gpus
    fits = "yes" if all(plan.fits for _, plan in plans) else "no"
    found.add_row("together", "", "", "", "", f"{speed:,.0f}", f"{tokens:.4g}", f"{days:,.2f}", fits, style="bold")
    return found


def yardsticks() -> Table:
    """What others report of other models, for scale."""
    found = table("\nOther people's figures, as reported", "", "by", "on", "tokens/s a GPU")
    for model, who, where, speed in YARDSTICKS:
        found.add_row(model, who, where, f"{speed:,}")
    found.caption = "Read second hand: other models, rows and code, none of it measured here."
    found.caption_justify = "left"
    return found


def render_stages(plans: list[tuple[str, Plan]]) -> Group:
    """What `motifarch plan` prints of several recipes."""
    parts: list[RenderableType] = [summary(plans), yardsticks()]
    for name, plan in plans:
        parts += [Text(), Rule(characters="-", style=""), Text(), render(plan, name)]
    return Group(*parts)


def as_page(content: RenderableType, picture: Path, title: str) -> str:
    """A report as an HTML page that has its picture in it."""
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(content)
    # Rich formats its page, so what may have braces comes after, and last what may have any words.
    page = console.export_html(inline_styles=True, code_format=_PAGE)
    page = page.replace("PICTURE", base64.b64encode(picture.read_bytes()).decode(), 1)
    return page.replace("TITLE", html.escape(title), 1)
