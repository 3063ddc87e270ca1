"""What the site's build adds: formulas, pictures that follow the theme, error messages, results.

On a repository's host the same pages are read without it: formulas are ``math`` blocks there,
pictures are images, and the list of messages is missing.
"""

import re
from pathlib import Path
from typing import Any

from error_messages import PLACE, as_html, collect
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod|obj):<code>(~?)([\w.]+)</code>")
PICTURE = re.compile(r'<img alt="[^"]*" src="[^"]*(pictures/[\w-]+\.svg)" ?/?>')


def formula(source: str, *_: Any, **__: Any) -> str:
    """A ``math`` block, in LaTeX, as MathML: browsers show it without a script."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_config(config: Any) -> Any:
    """Blocks of ``math`` are formulas."""
    fence = {"name": "math", "class": "math", "format": formula}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: Any) -> Files:
    """The committed results' page, which lies beside them. Links out of the site become text."""
    text = (DOCS.parent / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)
    files.append(File.generated(config, "results.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The error messages, where a page has a place for them."""
    return markdown.replace(PLACE, as_html(collect())) if PLACE in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Pictures become part of the page, so that the theme's colours are theirs; names that
    docstrings refer to become links where the reference has them.
    """

    def picture(found: re.Match[str]) -> str:
        return f'<div class="picture">{(DOCS / found[1]).read_text(encoding="utf-8")}</div>'

    def link(found: re.Match[str]) -> str:
        shown = found[2].rpartition(".")[2] if found[1] else found[2]
        return f'<autoref identifier="{found[2]}" optional><code>{shown}</code></autoref>'

    return ROLE.sub(link, PICTURE.sub(picture, html))
