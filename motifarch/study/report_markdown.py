"""A document as Markdown: the same statements and tables; its drawings are in the page alone, which
it links to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from motifarch.study.document import Block, Code, Document, Items, Picture, Pictures, Section, Table, Text


def to_markdown(document: Document, *, page: str) -> str:
    """The whole text.

    Args:
        document: what to write.
        page: the same as a page, relative to where the text will lie; named once, for its drawings.
    """
    link = f"All charts, in one page that needs no network: [{page}]({page})."
    top = filter(None, [f"# {document.title}", document.lead, document.more, link])
    return "\n\n".join([*top, *_sections(document.sections, 2)]) + "\n"


def _sections(sections: Sequence[Section], level: int) -> Iterator[str]:
    for section in sections:
        parts = [*filter(None, map(_block, section.blocks)), *_sections(section.sections, level + 1)]
        # One of drawings and how to read them has nothing left.
        if parts and not all(isinstance(b, Picture) or (isinstance(b, Text) and b.note) for b in section.blocks):
            yield f"{'#' * level} {section.title}"
            yield from parts


def _block(block: Block) -> str:
    match block:
        case Text():
            return block.text
        case Items():
            return "\n".join(f"- {item}" for item in block.items)
        case Code():
            return f"```\n{block.text}\n```"
        case Table():
            return _table(block)
        case Picture():
            return f"![{block.description}]({block.file})" if block.file else ""
        case Pictures():
            return ""


def _table(table: Table) -> str:
    rows = [
        ["**" + cell + "**" if i in table.strong and cell else cell for cell in row] for i, row in enumerate(table.rows)
    ]
    marks = [":--" if i < table.text_columns else "--:" for i in range(len(table.columns))]
    lines = [table.columns, marks, *rows]
    return "\n".join([f"**{table.caption}**", "", *("| " + " | ".join(map(_cell, line)) + " |" for line in lines)])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")
