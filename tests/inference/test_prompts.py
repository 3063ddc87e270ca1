"""Files of prompts and of results: what is read, what is refused, and what a failure leaves."""

import json

import pytest

from helpers.prompt_files import prompt_file, results
from motifarch.cli import main, run
from motifarch.errors import UserError
from motifarch.export import export


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    return export(finished_run, tmp_path_factory.mktemp("prompts") / "model")


def test_text_files_have_a_prompt_a_line(folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffalpha\r\n\n  beta\u2028 one \n\t\ntwo".encode())
    assert run(["generate", str(folder), "--prompts", str(path), "--max-new-tokens", "3", "--batch-size", "2"]) == 0
    captured = capsys.readouterr()
    made = results(captured.out.replace("\u2028", "\\u2028"))
    assert [line["prompt"] for line in made] == ["alpha", "  beta\u2028 one ", "two"]
    assert "[3 prompts, " in captured.err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'prompt': 1}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["alpha"]', "is a JSON list, not an object"),
        ("{}", "neither of"),
        ('{"prompt": "a", "messages": []}', "both of"),
        ('{"prompt": 3}', 'a "prompt" that is no string: 3'),
        ('{"messages": []}', r"no list with messages in it: \[\]"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}', "message 2 has no"),
        ('{"messages": ["hello"]}', 'message 1 has no .*"hello"'),
        ('{"prompt": "a", "text": "b"}', 'a key "text"'),
        ('{"prompt": "a \\ud800"}', "surrogate"),
        (json.dumps({"prompt": "alpha " * 40_000}), "positions; shorten the prompt"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_made(folder, tmp_path, capsys, line, reason):
    path = prompt_file(tmp_path, {"prompt": "fine"}, "", line)
    output = tmp_path / "out.jsonl"
    for options in ([], ["--output", str(output)]):
        with pytest.raises(UserError, match=rf"prompts\.jsonl, line 3.*{reason}"):
            run(["generate", str(folder), "--prompts", str(path), *options])
        assert capsys.readouterr().out == ""
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_a_file_without_prompts(folder, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="holds no prompt"):
        run(["generate", str(folder), "--prompts", str(tmp_path / name)])


def test_files_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "latin.txt").write_bytes("alpha\ncaf\u00e9\n".encode("latin-1"))
    (tmp_path / "list.json").write_text('["alpha"]')
    for name, reason in (
        ("latin.txt", "line 2 is not UTF-8"),
        ("missing.txt", "No such file"),
        (".", "Is a directory"),
        ("list.json", "is JSON; give"),
    ):
        with pytest.raises(UserError, match=reason):
            run(["generate", str(folder), "--prompts", str(tmp_path / name)])


def test_output_replaces_a_file_once_all_is_there(folder, tmp_path, capsys):
    path, output = (
        prompt_file(tmp_path, "alpha beta gamma", "one", "( ) = alpha", "", "two", name="p.txt"),
        tmp_path / "out.jsonl",
    )
    output.write_text("old")
    options = ["--prompts", str(path), "--batch-size", "2", "--max-new-tokens", "4"]
    assert run(["generate", str(folder), *options, "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert run(["generate", str(folder), *options]) == 0
    assert output.read_text() == capsys.readouterr().out
    assert [line["prompt"] for line in results(output.read_text())] == ["alpha beta gamma", "one", "( ) = alpha", "two"]
    assert sorted(tmp_path.iterdir()) == sorted([path, output])


@pytest.mark.parametrize(("passes", "kept"), [(0, 0), (40, 16)])
def test_a_failure_leaves_the_old_output_and_what_was_done(folder, tmp_path, capsys, monkeypatch, passes, kept):
    path, output = prompt_file(tmp_path, *["alpha"] * 20, name="p.txt"), tmp_path / "out.jsonl"
    output.write_text("old")
    from motifarch.models.motif import MotifForCausalLM

    forward, left = MotifForCausalLM.forward, iter(range(passes))

    def interrupted(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(MotifForCausalLM, "forward", interrupted)
    options = ["--batch-size", "2", "--max-new-tokens", "5", "--temperature", "0", "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(folder), "--prompts", str(path), *options])
    assert stop.value.code == 130
    assert output.read_text() == "old"
    partial = tmp_path / "out.jsonl.partial"
    assert partial.exists() == bool(kept)
    if kept:
        assert len(results(partial.read_text())) == kept
        assert f"{partial} keeps the {kept} results so far" in capsys.readouterr().err


def test_outputs_that_cannot_be_written(folder, tmp_path):
    path = prompt_file(tmp_path, "alpha", name="p.txt")
    for output, reason in (
        (tmp_path / "missing" / "out", "cannot be written: No such file"),
        (tmp_path, "is no regular file"),
        ("/dev/null", "is no regular file"),
        (path, "is the file of --prompts"),
    ):
        with pytest.raises(UserError, match=reason):
            run(["generate", str(folder), "--prompts", str(path), "--output", str(output)])
    with pytest.raises(UserError, match="for the results of --prompts"):
        run(["generate", str(folder), "--output", str(tmp_path / "out")])
    assert path.read_text() == "alpha\n"
