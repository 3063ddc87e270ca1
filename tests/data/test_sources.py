import os
import sysconfig
from pathlib import Path

import pytest

from motifarch.data.documents import Document, Skipped
from motifarch.data.sources import FileSource, parse_source
from motifarch.errors import UserError


def parse(spec: str) -> FileSource:
    source = parse_source(spec, text_field="text", hf_split="train", streaming=False)
    assert isinstance(source, FileSource)
    return source


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")


def test_stdlib_is_the_interpreters_own_and_large() -> None:
    source = parse("stdlib")
    names = [name for name, _ in source.files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    assert source.files[names.index("os.py")][1] == Path(sysconfig.get_path("stdlib"), "os.py")
    assert source.state()["bytes"] > 5_000_000


def test_stdlib_yields_text_and_names_what_it_skips() -> None:
    found = list(parse("stdlib").documents())
    texts = {document.name: document.text for document in found if isinstance(document, Document)}
    assert texts["os.py"] == Path(os.__file__).read_text()
    empty = [skipped.name for skipped in found if isinstance(skipped, Skipped) and skipped.reason == "empty"]
    assert "pydoc_data/__init__.py" in empty


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("{a.txt,sub/*.md}", ["a.txt", "sub/d.md"]),
        ("**/*.{md,rst}", ["e.rst", "sub/d.md"]),
        ("{a,{x,e}}.*", ["a.txt", "e.rst"]),
        ("", ["a.txt", "e.rst", "sub/b.txt", "sub/d.md", "sub/deep/c.txt"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    tree(tmp_path, "a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/d.md", "e.rst", ".hidden/f.txt")
    source = parse(f"files:{tmp_path}/{pattern}")
    assert [path.relative_to(tmp_path).as_posix() for _, path in source.files] == expected
    texts = [found.text for found in source.documents() if isinstance(found, Document)]
    assert texts == [f"text of {name}" for name in expected]


def test_state_tells_changes(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", "b.txt")
    states = [parse(f"files:{tmp_path}").state()]
    assert parse(f"files:{tmp_path}").state() == states[0]
    (tmp_path / "b.txt").write_text("changed")
    states.append(parse(f"files:{tmp_path}").state())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    states.append(parse(f"files:{tmp_path}").state())
    (tmp_path / "c.txt").unlink()
    states.append(parse(f"files:{tmp_path}").state())
    assert len({state["stamp"] for state in states}) == 4


@pytest.mark.parametrize("spec", ["stdlibs", "files:", "hf:", "web:x", "", "stdlib:x", "/some/path"])
def test_other_kinds_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"take stdlib, files:GLOB or hf:NAME\[:CONFIG\]"):
        parse(spec)


def test_a_glob_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"files:.*/\*\.none matches no file"):
        parse(f"files:{tmp_path}/*.none")
