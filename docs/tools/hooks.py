"""What the site's build adds: formulas, pictures that follow the theme, and what lies elsewhere.

On a repository's host the same pages are read without it: formulas are ``math`` blocks there,
pictures are images, and messages, examples and results are missing.
"""

import ast
import re
from typing import Any

from error_messages import ROOT, as_html, collect
from latex2mathml.converter import convert

DOCS = ROOT / "docs"
PLACE = re.compile(r"<!-- site: (\w+) -->")
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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``<!-- site: NAME -->`` is replaced by what lies elsewhere."""
    return PLACE.sub(lambda found: PARTS[found[1]](), markdown)


def messages() -> str:
    """All error messages."""
    return as_html(collect())


def examples() -> str:
    """Each script of examples/ under the first sentence of its docstring."""
    parts = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        sentence = (ast.get_docstring(ast.parse(source)) or path.stem).split("\n\n")[0]
        parts.append(f"## {' '.join(sentence.split()).rstrip('.')}")
        parts.append(f'```python title="examples/{path.name}"\n{source}```')
    return "\n\n".join(parts)


def results() -> str:
    """benchmarks/results/README.md below its heading. Links out of the site become text."""
    text = (ROOT / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8").partition("\n")[2]
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)


PARTS = {"messages": messages, "examples": examples, "results": results}


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
