"""Writes questions and answers about this interpreter's standard library, from its docstrings, as
lines of JSON with `messages`: conversations to try fine-tuning with.

    python recipes/sft/docstrings.py > data/docstrings.jsonl
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def summaries(folder: Path) -> Iterator[tuple[str, str]]:
    """The name and the docstring's first line of each public class and function of a folder's
    modules.
    """
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            if docstring := ast.get_docstring(node):
                yield f"{path.stem}.{node.name}", docstring.partition("\n")[0]


if __name__ == "__main__":
    for name, summary in summaries(Path(sysconfig.get_path("stdlib"))):
        question = {"role": "user", "content": f"What is {name}?"}
        print(json.dumps({"messages": [question, {"role": "assistant", "content": summary}]}))
