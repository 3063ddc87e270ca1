"""A document as one HTML page that needs nothing else: no script, no font, no picture from
elsewhere.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from html import escape

from motifarch.study.document import Block, Code, Document, Items, Picture, Pictures, Section, Table, Text
from motifarch.study.report_style import STYLE


def to_html(document: Document) -> str:
    """The whole page."""
    contents = "".join(f'<li><a href="#{_anchor(s.title)}">{escape(s.title)}</a></li>' for s in document.sections)
    body = "\n".join(_section(s, 2) for s in document.sections)
    # The icon is said to be empty, or a browser would ask for one.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="{escape(document.lead)}">
<link rel="icon" href="data:,">
<title>{escape(document.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(document.title)}</h1>
<p class="lead">{_inline(document.lead)}</p>
{f"<p>{_inline(document.more)}</p>" if document.more else ""}
<nav aria-label="Contents"><ol>{contents}</ol></nav>
</header>
{body}
</main>
</body>
</html>
"""


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _inline(text: str) -> str:
    """Escaped, with `code` between backquotes."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _section(section: Section, level: int) -> str:
    heading = f'<h{level} id="{_anchor(section.title)}">{escape(section.title)}</h{level}>'
    blocks = "\n".join(_block(block) for block in section.blocks)
    inner = "\n".join(_section(s, level + 1) for s in section.sections)
    return f"<section>\n{heading}\n{blocks}\n{inner}\n</section>"


def _block(block: Block) -> str:
    match block:
        case Text():
            return f'<p class="note">{_inline(block.text)}</p>' if block.note else f"<p>{_inline(block.text)}</p>"
        case Items():
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
        case Code():
            return f"<pre><code>{escape(block.text, quote=False)}</code></pre>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Pictures():
            pictures = "".join(_picture(p) for p in block.pictures)
            return f'<p class="note">{_inline(block.caption)}</p><div class="grid">{pictures}</div>'


def _picture(picture: Picture) -> str:
    drawn = picture.svg
    if not drawn:
        data = base64.b64encode(picture.png).decode("ascii")
        drawn = f'<img src="data:image/png;base64,{data}" alt="{escape(picture.description)}">'
    note = f". {_inline(picture.note)}" if picture.note else ""
    return f"<figure><figcaption><b>{_inline(picture.title)}</b>{note}</figcaption>{drawn}</figure>"


def _table(table: Table) -> str:
    def kind(column: int) -> str:
        return "w" if column < table.text_columns else "n"

    head = "".join(f'<th scope="col" class="{kind(i)}">{_inline(name)}</th>' for i, name in enumerate(table.columns))
    rows = "".join(_row(row, kind, strong=i in table.strong) for i, row in enumerate(table.rows))
    # A box that scrolls has to be reachable with the keyboard, and to say what it is.
    label = escape(table.caption, quote=True)
    return (
        f'<div class="box" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption><span>{_inline(table.caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: Sequence[str], kind: Callable[[int], str], *, strong: bool) -> str:
    cells = [f'<th scope="row" class="w">{_inline(row[0])}</th>']
    cells += [f'<td class="{kind(i)}">{_inline(cell)}</td>' for i, cell in enumerate(row) if i]
    return f"{'<tr class=strong>' if strong else '<tr>'}{''.join(cells)}</tr>"
