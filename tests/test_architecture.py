"""The arrows and no import circles: `make lint` fails where an import against them is planted."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
# Who may import triton as soon as it is imported.
WITH_TRITON = ("motif_kernels/impl/triton", "motif_kernels/impl/gluon")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and their contracts, to plant imports in."""
    copy = tmp_path_factory.mktemp("tree")
    for package in ("motifarch", "kernels/motif_kernels"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", copy / "pyproject.toml")
    return copy


def lint_imports(tree: Path) -> tuple[int, str]:
    """What `make lint` runs: its status and what it says."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_tree_keeps_the_contracts(tree: Path) -> None:
    status, said = lint_imports(tree)
    assert status == 0, said


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("models/motif/rotary.py", "from motifarch.models.motif.modeling_motif import MotifModel", "No import circles"),
        ("layers/mlp.py", "from motifarch.models.motif import MotifConfig", "Packages import from those below"),
        ("data/loader.py", "from motifarch.optim import muon", "Packages import from those below"),
        ("optim/muon.py", "def late():\n    from motifarch.train import recipe", "Packages import from those below"),
        ("layers/mlp.py", "from transformers import Cache", "Layers and kernels stand on torch alone"),
        ("../kernels/motif_kernels/checks.py", "import motifarch.errors", "Kernels know nothing of motifarch"),
    ],
    ids=["circle", "upward", "sideways", "upward in a function", "transformers in a layer", "a kernel upward"],
)
def test_a_planted_import_is_found(tree: Path, module: str, planted: str, contract: str) -> None:
    path = tree / "motifarch" / module
    before = path.read_text(encoding="utf-8")
    path.write_text(f"{before}\n\n{planted}\n", encoding="utf-8")
    try:
        status, said = lint_imports(tree)
    finally:
        path.write_text(before, encoding="utf-8")
    assert status != 0
    assert re.search(f"{contract}.* BROKEN", said), said


def circles(graph: grimp.ImportGraph) -> list[str]:
    """Imports that lead back to where they are, through a package's own __init__ too."""
    return [
        f"{module} -> {imported}"
        for module in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(module))
        if graph.chain_exists(importer=imported, imported=module)
    ]


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("motifarch", "motif_kernels", cache_dir=None)
    assert circles(graph) == []
    graph.add_import(importer="motifarch.errors", imported="motifarch.files")
    assert "motifarch.errors -> motifarch.files" in circles(graph)


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Modules that running a module's code imports: what stands in functions waits."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield str(statement.module)
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from imported_at_once(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from imported_at_once(handler.body)


def needs_triton(source: str) -> bool:
    """Whether a module does, as soon as it is imported."""
    names = imported_at_once(ast.parse(source).body)
    roots = ("triton", *(folder.replace("/", ".") for folder in WITH_TRITON))
    return any(name == root or name.startswith(f"{root}.") for name in names for root in roots)


def test_nothing_but_the_kernels_needs_triton_to_be_imported() -> None:
    files = {
        path.relative_to(folder).as_posix(): path
        for folder in (ROOT, ROOT / "kernels")
        for package in ("motifarch", "motif_kernels")
        for path in (folder / package).rglob("*.py")
    }
    found = {name for name, path in files.items() if needs_triton(path.read_text(encoding="utf-8"))}
    assert found  # the kernels do
    assert {name for name in found if not name.startswith(WITH_TRITON)} == set()
    assert needs_triton("try:\n    import triton.language\nexcept ImportError:\n    pass")
    assert not needs_triton("def launch():\n    import triton")
