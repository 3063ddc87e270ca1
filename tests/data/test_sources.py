import os
import sysconfig
from pathlib import Path

import pytest

from motifarch.data.documents import Document, ReadOptions, Skipped
from motifarch.data.sources import FileSource, each_file_once, parse_source
from motifarch.errors import UserError


def parse(spec: str) -> FileSource:
    source = parse_source(spec, hf_split="train", streaming=False)
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
    found = list(parse("stdlib").documents(ReadOptions()))
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
    texts = [found.text for found in source.documents(ReadOptions()) if isinstance(found, Document)]
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


def names(spec: str) -> list[str]:
    return [name for name, _ in parse(spec).files]


def left_out(spec: str) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in parse(spec).left_out}


@pytest.mark.parametrize("name", ["data [v2]", "a*b", "{x,y}", "sp ace", "a:b", "q?", "~home", "line\nend", "**"])
def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    tree(tmp_path, f"{name}/x.txt", f"{name}/sub/y.txt", f"{name}.txt", "data v/x.txt", "aab/x.txt", "x", "qq/x.txt")
    assert names(f"files:{tmp_path}/{name}") == ["sub/y.txt", "x.txt"]
    assert [path for _, path in parse(f"files:{tmp_path}/{name}.txt").files] == [tmp_path / f"{name}.txt"]
    assert [path for _, path in parse(f"files:{tmp_path}/{name}/*.txt").files] == [tmp_path / name / "x.txt"]
    assert names(f"files:{tmp_path}/{name}/**/*.txt") == ["sub/y.txt", "x.txt"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    tree(tmp_path, "data/a.txt", "data/sub/b.txt", "far/sub/c.txt", "far/d.txt")
    (tmp_path / "data" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "sub" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "sub" / "self").symlink_to(".")
    (tmp_path / "data" / "again.txt").symlink_to("a.txt")
    (tmp_path / "data" / "gone.txt").symlink_to("nowhere")
    files = ["a.txt", "far/d.txt", "far/sub/c.txt", "sub/b.txt"]
    for spec in (f"files:{tmp_path}/data", f"files:{tmp_path}/data/**", f"files:{tmp_path}/data/**/*.txt"):
        assert names(spec) == files
        assert left_out(spec) == {
            "again.txt": "same file as a.txt",
            "gone.txt": "broken link",
            "sub/self/": "link to a folder that is read already",
            "sub/up/": "link to a folder that is read already",
        }


def test_what_lies_beside_the_files_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", ".hidden.txt", ".git/config", "sub/b.txt")
    os.mkfifo(tmp_path / "pipe")
    reasons = {".git/": "hidden folder", ".hidden.txt": "hidden file", "pipe": "not a regular file"}
    assert left_out(f"files:{tmp_path}") == reasons
    found = list(parse(f"files:{tmp_path}").documents(ReadOptions()))
    assert {one.name for one in found if isinstance(one, Skipped)} == set(reasons)
    (folder,) = left_out(f"files:{tmp_path}/*.txt") | left_out(f"files:{tmp_path}/[as]*")
    assert folder == f"{tmp_path}/sub/"
    with pytest.raises(UserError, match="pipe is left out"):
        parse(f"files:{tmp_path}/pipe")


def test_a_name_that_says_what_a_file_holds_is_preferred(tmp_path: Path) -> None:
    tree(tmp_path, "blobs/0a1b")  # as in the cache of a hub
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to("../blobs/0a1b")
    assert names(f"files:{tmp_path}") == ["snapshot/train.jsonl"]


def test_a_file_of_two_sources_is_read_once(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", "sub/b.txt")
    sources = each_file_once([parse(f"files:{tmp_path}/sub"), parse(f"files:{tmp_path}")])
    found = [one for source in sources for one in source.documents(ReadOptions())]
    assert found[::2] == [Document("b.txt", "text of sub/b.txt"), Document("a.txt", "text of a.txt")]
    assert isinstance(found[1], Skipped)
    assert found[1].name == "sub/b.txt"


def test_absolute_and_relative_paths_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "one/a.txt", "two/b.txt")
    monkeypatch.chdir(tmp_path)
    assert names(f"files:{{{tmp_path}/one/a.txt,two/b.txt}}") == ["one/a.txt", "two/b.txt"]


def test_a_file_is_no_name_on_the_hub(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt")
    (found,) = parse(f"hf:{tmp_path}/a.txt").documents(ReadOptions())
    assert found == Document("a.txt", "text of a.txt")
