"""A document as Markdown: the same statements and tables; drawings give way to their descriptions."""

from __future__ import annotations

from motifarch.study.document import Block, Code, Document, Items, Picture, Pictures, Section, Table, Text


def to_markdown(document: Document) -> str:
    """The whole text."""
    parts = [f"# {document.title}", document.lead, *(_section(s, 2) for s in document.sections)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int) -> str:
    parts = [f"{'#' * level} {section.title}", *(_block(block) for block in section.blocks)]
    return "\n\n".join([*parts, *(_section(s, level + 1) for s in section.sections)])


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
            return _picture(block)
        case Pictures():
            return "\n\n".join([block.caption, *(_picture(p) for p in block.pictures)])


def _picture(picture: Picture) -> str:
    if picture.file:
        return f"![{picture.description}]({picture.file})"
    return f"*Picture in report.html: {picture.title}.* {picture.description}"


def _table(table: Table) -> str:
    rows = [
        ["**" + cell + "**" if i in table.strong and cell else cell for cell in row] for i, row in enumerate(table.rows)
    ]
    marks = [":--" if i < table.text_columns else "--:" for i in range(len(table.columns))]
    lines = [table.columns, marks, *rows]
    return "\n".join([f"**{table.caption}**", "", *("| " + " | ".join(map(_cell, line)) + " |" for line in lines)])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")
