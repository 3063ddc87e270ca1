"""The cells of docs/compatibility.md's table and the tests in this folder are the same."""

import importlib.util
from pathlib import Path

from helpers.compatibility import COLUMNS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "compatibility.md"


def cells_of_the_page() -> list[tuple[str, str]]:
    lines = [line.strip("| ").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    heads, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return [(row[0].strip("`"), head) for row in rows for head, cell in zip(heads, row[1:], strict=True) if cell]


def cells_of_the_tests() -> list[tuple[str, str]]:
    found = []
    for path in HERE.glob("test_*.py"):
        if path == Path(__file__):
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, function in vars(module).items():
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "parametrize" and mark.args[0] == "name":
                    found += [(name.removeprefix("test_"), getattr(p, "values", [p])[0]) for p in mark.args[1]]
    return found


def test_the_table_and_the_tests_are_the_same() -> None:
    of_tests = cells_of_the_tests()
    rows = {row for row in dict(of_tests) if {(row, column) for column in COLUMNS} <= set(of_tests)}
    page = cells_of_the_page()
    assert len(page) == len(set(page))
    assert set(page) == {(row, column) for row in rows for column in COLUMNS}
