"""Checkpoints in object storage: what is there is whole, and a run goes on from it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from helpers.distributed import kill_tree, started, train, wait_until
from helpers.object_storage import s3_server
from helpers.tiny import SHORT_RUN, write_recipe
from motifarch.errors import UserError
from motifarch.train import mirror
from motifarch.train.main import main
from motifarch.train.run_folder import read_metrics

EIGHT = ("--run.steps", "8")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder where nothing is yet."""
    if request.param == "s3":
        request.getfixturevalue("server")
    return {"memory": f"memory:/{tmp_path}", "file": f"file://{tmp_path}/far", "s3": f"s3://bucket{tmp_path}"}[
        request.param
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The output of 8 steps that were never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([str(write_recipe(folder, data)), *SHORT_RUN, *EIGHT]) == 0
    return folder / "run"


def run(recipe: Path, url: str, *options: str) -> None:
    assert main([str(recipe), *SHORT_RUN, "--checkpoint.mirror", url, *options]) == 0


def there(url: str) -> list[str]:
    """The files of the run's copy, by their names within it."""
    storage, root = fsspec.url_to_fs(url)
    storage.invalidate_cache()
    return sorted(name.partition(root.strip("/") + "/")[2] for name in storage.find(root))


def losses(output: Path) -> list[tuple[int, Any]]:
    return [(row["step"], row["loss"]) for row in read_metrics(output / "metrics.jsonl")]


def manifests(url: str) -> list[str]:
    return [name.split("/")[1] for name in there(url) if name.endswith("manifest.json")]


def assert_kept(url: str) -> None:
    """Two checkpoints, the last one among them: one between may have been left out, as too many."""
    assert len(manifests(url)) == 2
    assert manifests(url)[-1] == "step_00000008"


def test_an_empty_disk_goes_on_from_there(
    url: str, recipe: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe, url)
    assert manifests(url) == ["step_00000002", "step_00000004"]
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    run(recipe, url, *EIGHT)
    assert "resuming after step 4" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(whole)
    assert_kept(url)
    assert all(name.split("/")[1] in manifests(url) for name in there(url) if name.startswith("checkpoints"))
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 4]
    assert record["ended"] == "complete"


@pytest.mark.parametrize("lost", ["manifest.json", "__0_0.distcp", "changed"])
def test_what_is_not_whole_is_passed_over(
    lost: str, recipe: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory:/{tmp_path}"
    run(recipe, url)
    storage, root = fsspec.url_to_fs(url)
    newest = f"{root}/checkpoints/step_00000004"
    if lost == "changed":
        content = bytearray(storage.cat_file(f"{newest}/__0_0.distcp"))
        content[len(content) // 2] ^= 1
        storage.pipe_file(f"{newest}/__0_0.distcp", bytes(content))
    else:
        storage.rm_file(f"{newest}/{lost}")
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    run(recipe, url, *EIGHT)
    assert "resuming after step 2" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(whole)
    assert_kept(url)


def test_killed_at_any_write_a_whole_one_is_found(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each change of the storage, a machine with an empty disk finds what is newest."""
    from fsspec.implementations.memory import MemoryFileSystem

    from motifarch.train.remote_run import RemoteRun, fetch_newer

    url = f"memory:/{tmp_path}"
    found: list[tuple[Any, str, list[str]]] = []

    def look(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            result = change(*args, **kwargs)
            if complete := RemoteRun(url).complete():
                empty = tmp_path / f"looked{len(found)}"
                passed_over: list[str] = []
                newest = fetch_newer(url, empty, None, passed_over.append)
                # Compared below: what a copy raises in its thread makes it try again.
                found.append((newest and newest.name, f"step_{complete[0]:08d}", passed_over[:-1]))
                shutil.rmtree(empty)
            return result

        return changed

    for name in ("put_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, look(getattr(MemoryFileSystem, name)))
    run(recipe, url, *EIGHT, "--checkpoint.keep_last", "1", "--checkpoint.asynchronous", "false")
    assert all(name == expected and not passed_over for name, expected, passed_over in found)
    assert [name for name, *_ in found] == sorted(name for name, *_ in found)
    assert found[-1][0] == "step_00000008"
    assert manifests(url) == ["step_00000008"]


def test_two_ranks_copy_their_own_shards(
    server: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://bucket{tmp_path}"
    options = (*SHORT_RUN, "--checkpoint.mirror", url)
    train(2, tmp_path, recipe, *options, "--run.steps", "8", "--run.output", tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole/checkpoints")
    expected = losses(tmp_path / "whole")
    fsspec.url_to_fs(url)[0].rm(f"bucket{tmp_path}", recursive=True)
    train(2, tmp_path, recipe, *options)
    shards = [name for name in there(url) if "step_00000004/__" in name]
    assert [Path(name).name for name in shards] == ["__0_0.distcp", "__1_0.distcp"]
    shutil.rmtree(tmp_path / "run")
    assert "resuming after step 4" in train(2, tmp_path, recipe, *options, "--run.steps", "8")
    assert losses(tmp_path / "run") == expected


def test_a_server_that_is_gone_costs_nothing_on_disk(
    recipe: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "WAITS_S", (0.1,))
    monkeypatch.setattr(mirror, "PATIENCE_S", 2.0)
    url = f"memory:/{tmp_path}"
    put, gone = mirror.RemoteRun.put, [True]

    def fail(*args: Any) -> None:
        if gone[0]:
            raise ConnectionRefusedError(111, "Connection refused")
        put(*args)

    monkeypatch.setattr(mirror.RemoteRun, "put", fail)
    run(recipe, url)
    said = " ".join(capsys.readouterr().out.split())
    assert "the server can't be reached" in said
    assert "the same command copies it" in said
    assert (tmp_path / "run/checkpoints/step_00000004/manifest.json").exists()
    assert manifests(url) == []
    gone[0] = False
    run(recipe, url)
    assert manifests(url) == ["step_00000004"]


def test_a_copy_is_tried_again(
    server: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "WAITS_S", (0.1,))
    url, put, failures = f"s3://bucket{tmp_path}", mirror.RemoteRun.put, [3]

    def fail(*args: Any) -> None:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(5, "Input/output error")
        put(*args)

    monkeypatch.setattr(mirror.RemoteRun, "put", fail)
    run(recipe, url)
    assert "is tried again" in " ".join(capsys.readouterr().out.split())
    assert manifests(url)[-1] == "step_00000004"


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server itself stops after the first file, and is there again once that is told."""
    monkeypatch.setattr(mirror, "WAITS_S", (0.5,))
    with contextlib.ExitStack() as stack:
        first = s3_server()
        port = int(first.__enter__().rpartition(":")[2])
        put, say, puts = mirror.RemoteRun.put, mirror.Mirror.__init__, [0]

        def stop_first(*args: Any) -> None:
            put(*args)
            puts[0] += 1
            if puts[0] == 1:
                first.__exit__(None, None, None)
                monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")

        def start_another(self: Any, *args: Any, **options: Any) -> None:
            told = options["say"]

            def hear(line: str) -> None:
                told(line)
                if "tried again" in line and puts[0] == 1:
                    puts[0] = 2
                    stack.enter_context(s3_server(port))

            say(self, *args, **options | {"say": hear})

        monkeypatch.setattr(mirror.RemoteRun, "put", stop_first)
        monkeypatch.setattr(mirror.Mirror, "__init__", start_another)
        url = f"s3://bucket{tmp_path}"
        run(recipe, url, *EIGHT)
        assert "the server can't be reached" in " ".join(capsys.readouterr().out.split())
        assert manifests(url)[-1] == "step_00000008"


@pytest.mark.slow
def test_two_ranks_killed_while_they_copy(server: str, recipe: Path, tmp_path: Path) -> None:
    url, script = f"s3://bucket{tmp_path}", tmp_path / "slow_copy.py"
    script.write_text(
        "import sys, time\n"
        "from motifarch.cli import main\n"
        "from motifarch.train import remote_run\n"
        "put = remote_run.RemoteRun.put\n"
        "def late(self, source, name):\n"
        "    if '/__1' in name and 'step_00000002' not in name:\n"
        "        time.sleep(1000)\n"
        "    put(self, source, name)\n"
        "remote_run.RemoteRun.put = late\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    options = (*SHORT_RUN, "--checkpoint.mirror", url, "--run.steps", "8")
    train(2, tmp_path, recipe, *SHORT_RUN, "--run.steps", "8", "--run.output", tmp_path / "whole")
    with started(2, script, recipe, *options) as process:
        wait_until(lambda: any("/__0" in name for name in there(url) if "step_00000002" not in name), process)
        kill_tree(process.pid)
    assert manifests(url) == ["step_00000002"]
    shutil.rmtree(tmp_path / "run")
    assert "resuming after step 2" in train(2, tmp_path, recipe, *options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_kept(url)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://nowhere/run", "no such bucket"),
        ("s3x://bucket/run", "s3://"),
        ("gs://bucket/run", "motifarch\\[gcs\\]"),
    ],
)
def test_a_place_that_can_not_be_written_stops_the_start(
    place: str, said: str, server: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place.startswith("gs"):
        monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=said):
        run(recipe, place)


def test_another_run_there_is_not_replaced(recipe: Path, tmp_path: Path) -> None:
    url = f"memory:/{tmp_path}"
    run(recipe, url)
    before = there(url)
    with pytest.raises(UserError, match="holds a run"):
        run(recipe, url, "--run.resume", "none", "--run.output", os.fspath(tmp_path / "other"))
    assert there(url) == before


def test_commands_read_what_is_there(
    server: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    from motifarch.commands import average, export, generate, runs

    url = f"s3://bucket{tmp_path}/runs/mine"
    run(recipe, url)
    for source, output in ((url, "far"), (f"{url}/checkpoints/step_00000004", "one"), (str(tmp_path / "run"), "near")):
        assert export.main([source, "--output", str(tmp_path / output)]) == 0
    expected = load_file(tmp_path / "near/model.safetensors")
    for name in ("far", "one"):
        assert all(
            value.equal(expected[key]) for key, value in load_file(tmp_path / name / "model.safetensors").items()
        )
    assert json.loads((tmp_path / "far/export.json").read_text())["checkpoint"] == url
    assert average.main([url, "--last", "2", "--output", str(tmp_path / "mean")]) == 0
    capsys.readouterr()
    assert runs.main([url.removesuffix("/mine"), "--output", str(tmp_path / "runs.png")]) == 0
    assert "complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="--output"):
        export.main([url])
    with pytest.raises(UserError, match="motifarch export URL"):
        generate.main([url, "--prompt", "x"])


@pytest.mark.parametrize("part", ["", "/checkpoints/step_00000004", "model"])
def test_first_weights_from_there(part: str, recipe: Path, tmp_path: Path, whole: Path) -> None:
    from motifarch.export import export

    url, options = f"memory:/{tmp_path}/runs/mine", (*SHORT_RUN, "--run.output", str(tmp_path / "new"))
    run(recipe, url)
    local, remote = str(tmp_path / "run/checkpoints/step_00000004"), url + part
    if part == "model":
        local, remote = str(export(tmp_path / "run", tmp_path / "model")), f"memory:/{tmp_path}/model"
        fsspec.url_to_fs(remote)[0].put(local, str(tmp_path / "model"), recursive=True)
    assert main([str(recipe), *options, "--run.init_from", remote]) == 0
    again = tmp_path / "again"
    assert main([str(recipe), *options, "--run.init_from", local, "--run.output", str(again)]) == 0
    assert losses(tmp_path / "new") == losses(again)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(file.name for file in again.iterdir())


@pytest.mark.parametrize(
    "option", [("--run.output", "s3://b/run"), ("--run.resume", "s3://b/run"), ("--checkpoint.mirror", "runs/copy")]
)
def test_what_is_no_folder_or_no_url_is_told(option: tuple[str, str], recipe: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.mirror"):
        main([str(recipe), *option])
