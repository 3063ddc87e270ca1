"""The error messages of motifarch and motif_kernels, collected from their source.

A raise statement gives its message; where a function writes it, or a table of rules, the sentences
of that function are taken. What stands in braces is filled in where the error is raised.
"""

import ast
import functools
import hashlib
import html
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "motifarch", ROOT / "kernels" / "motif_kernels")

SUBJECTS = {
    "Recipes and options": (
        *("cli", "command_line", "commands", "field_types", "layout", "model_section", "packaged_recipes"),
        *("typed_yaml", "yaml_text"),
    ),
    "Data and tokenizers": ("data", "tokenizer"),
    "Runs and checkpoints": ("train", "average", "checkpoint_reader", "runs", "locks", "files", "shards", "storage"),
    "Several processes": ("parallel", "die_with_parent"),
    "Optimizers": ("optim",),
    "Models and their folders": (
        *("auto_map", "export", "forward_arguments", "lazy_names", "model_folder", "models", "portable"),
        "weight_files",
    ),
    "Layers": ("layers",),
    "Attention, PolyNorm and backends": ("motif_kernels",),
    "Patching": ("integrations",),
    "Growth": ("growth",),
    "Plans": ("plan", "hardware"),
    "Studies": ("study",),
    "Ledgers and their verification": ("ledger", "verify"),
    "Generation, evaluation and serving": ("inference",),
}
"""Headings, and the packages and modules whose messages stand below them."""


@dataclass(frozen=True)
class Message:
    """A message, with {names} for what is filled in, and the file that it comes from."""

    text: str
    path: str

    @property
    def subject(self) -> str:
        """The heading that it stands below.

        Raises:
            StopIteration: its package has no subject yet.
        """
        package = Path(self.path).with_suffix("").parts[1]
        return next(name for name, packages in SUBJECTS.items() if package in packages)

    def matches(self, said: str) -> bool:
        """Whether an error that was raised says this."""
        pieces = re.split(r"\{[^{}]*\}", self.text)
        pattern = ".*".join(re.escape(" ".join(piece.split())) for piece in pieces)
        return re.search(pattern.replace(r"\ ", " *"), " ".join(said.split())) is not None


@functools.cache
def collect() -> tuple[Message, ...]:
    """All messages, each once a file, in the order of files and lines."""
    modules = {path: ast.parse(path.read_text(encoding="utf-8")) for root in PACKAGES for path in root.rglob("*.py")}
    functions = {path: _functions(tree) for path, tree in modules.items()}
    everywhere: dict[str, list[ast.AST]] = {}
    for own in functions.values():
        for name, nodes in own.items():
            everywhere.setdefault(name, []).extend(nodes)
    found: dict[Message, None] = {}
    for path in sorted(modules):
        for text in _of_module(functions[path], everywhere):
            found[Message(" ".join(text.split()), str(path.relative_to(ROOT)))] = None
    return tuple(found)


def _functions(tree: ast.Module) -> dict[str, list[ast.AST]]:
    """A module's functions and methods by their names, and what it does when it is imported."""
    statements = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found: dict[str, list[ast.AST]] = {"<module>": [ast.Module(statements, [])]}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def _of_module(functions: dict[str, list[ast.AST]], everywhere: dict[str, list[ast.AST]]) -> Iterator[str]:
    for function in itertools.chain.from_iterable(functions.values()):
        for node in ast.walk(function):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            given = [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]
            message = " ".join(filter(None, map(_template, given)))
            if _words(message) >= 2:
                yield message
            if _words(message) >= 3:
                continue
            yield from _sentences(function)
            for called in _names_called(node.exc):
                for writer in functions.get(called, everywhere.get(called, [])):
                    yield from _sentences(writer)


def _template(node: ast.expr) -> str:
    """What a string expression says, with {names}; empty for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_template(value) or _placeholder(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (_template(left) or "{...}") + (_template(right) or "{...}")
        case ast.IfExp(body=body):
            return _template(body)
    return ""


def _placeholder(node: ast.expr) -> str:
    """A name for a value that is filled in."""
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Name):
        return f"{{{value.id}}}"
    if isinstance(value, ast.Attribute):
        return "{type}" if value.attr == "__name__" else f"{{{value.attr}}}"
    return "{...}"


def _words(text: str) -> int:
    """How many there are besides what is filled in."""
    return len(re.findall(r"[A-Za-z]{2,}", re.sub(r"\{[^{}]*\}", "", text)))


def _sentences(function: ast.AST) -> Iterator[str]:
    """Of a function's strings those of three words, or of two where it returns them; its docstring
    is left out.
    """
    inner: set[int] = set()  # parts of a string that was taken whole
    docstrings = {id(node.value) for node in ast.walk(function) if isinstance(node, ast.Expr)}
    returned = {id(node.value) for node in ast.walk(function) if isinstance(node, ast.Return)}
    for node in ast.walk(function):
        if id(node) in inner or id(node) in docstrings or not isinstance(node, ast.expr):
            continue
        text = _template(node)
        if " " in text and _words(text) >= (2 if id(node) in returned else 3):
            inner.update(id(part) for part in ast.walk(node))
            yield text


def _names_called(node: ast.AST) -> Iterator[str]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            function = call.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def as_html(messages: Sequence[Message]) -> str:
    """Headings by subject, below them each file's messages; each is a heading too, so that the
    search finds it by itself and an address leads to it.
    """
    lines = []
    for subject in SUBJECTS:
        own = [message for message in messages if message.subject == subject]
        lines.append(f"### {subject}\n")
        for path in dict.fromkeys(message.path for message in own):
            lines.append(f"`{path}`\n")
            lines.extend(_heading(message) for message in own if message.path == path)
    return "\n".join(lines)


def _heading(message: Message) -> str:
    """A message with what is filled in slanted."""
    name = hashlib.sha256(f"{message.path} {message.text}".encode()).hexdigest()[:8]
    text = re.sub(r"\{([^{}]*)\}", r"<em>\1</em>", html.escape(message.text)).replace("<em>...", "<em>…")
    return f'<h4 class="message" id="m-{name}">{text}</h4>\n'
