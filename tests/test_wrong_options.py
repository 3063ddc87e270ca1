"""Every option of every command, with values that its type does not accept.

The options are those of the commands' own parsers. Whatever a command is given, it ends soon, with
an exit status or with a message for people.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.made_up_study import made_up_results
from helpers.tiny import write_recipe
from helpers.wrong_values import time_limit
from motifarch.cli import COMMANDS
from motifarch.errors import UserError
from motifarch.export import export

WRONG = {
    "nan": "nan",
    "inf": "inf",
    "-inf": "-inf",
    "-1": "-1",
    "0": "0",
    "1e12": "1" + "0" * 12,
    "past int64": "9" * 30,
    "5000 digits": "9" * 5000,
    "1e-320": "1e-320",
    "empty": "",
    "NUL": "a\0b",
    "word": "many",
    "nowhere": "/proc/no/such",
}
NEVER_A_NUMBER = {"nan", "inf", "-inf", "-1", "past int64", "5000 digits", "empty", "NUL", "word"}
NEVER_A_PATH = {"empty", "NUL"}


class _Found(BaseException):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command's main makes."""

    def found(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", found)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", found)
        with pytest.raises(_Found) as caught:
            importlib.import_module(COMMANDS[command][0]).main([])
    return caught.value.parser


@dataclass(frozen=True)
class Option:
    """An option, or an argument by its place, of a command; ``flag`` is None for the latter."""

    command: str
    name: str
    flag: str | None
    place: int
    kind: str

    def __str__(self) -> str:
        return f"{self.command} {self.name}"


def options() -> Iterator[Option]:
    for command in COMMANDS:
        if command == "train":  # its options are the recipe's fields
            continue
        actions = [action for action in parser_of(command)._actions if action.nargs != 0]
        places = [action.dest for action in actions if not action.option_strings]
        for action in actions:
            flag = action.option_strings[-1] if action.option_strings else None
            place = 0 if flag else places.index(action.dest)
            yield Option(command, flag or action.dest, flag, place, _kind(action))


def _kind(action: argparse.Action) -> str:
    """Number, path, choice, mapping or text, by what the type makes of one."""
    if action.choices:
        return "choice"
    if action.type is None:
        return "text"
    assert callable(action.type)
    try:
        made = action.type("1")  # a list is of texts
    except argparse.ArgumentTypeError:
        return "mapping"
    return "path" if isinstance(made, Path) else "number" if isinstance(made, int | float) else "text"


OPTIONS = list(options())


def must_be_refused(option: Option, wrong: str) -> bool:
    match option.kind:
        case "number":
            return wrong in NEVER_A_NUMBER
        case "path":
            return wrong in NEVER_A_PATH
        case "choice" | "mapping":
            return True
    return False


Line = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, data: Path) -> dict[str, Line]:
    """For each command a line of arguments that works, given a folder for what it writes."""
    folder = tmp_path_factory.mktemp("right")
    model, recipe = export(finished_run, folder / "model"), write_recipe(folder, data)
    for i in range(8):
        (folder / f"text{i}.txt").write_text(f"a text of its own, number {i}\n" * 9)
    (folder / "prompts").write_text("a prompt\n")
    results = folder / "results.json"
    results.write_text(json.dumps(made_up_results()))
    texts, tokenizer = ["--source", f"files:{folder}/*.txt"], data / "tokenizer"
    source = [*texts, "--vocab-size", "300", "--seq-len", "8"]
    shard = folder / "shard"
    given = ["--tokenizer", str(tokenizer), "--num-proc", "1", "--shard", "1/1", "--output", str(shard)]
    importlib.import_module(COMMANDS["data prepare"][0]).main([*source, *given])
    lines: dict[str, Callable[[Path], list[Any]]] = {
        "recipes": lambda out: [],
        "recipes copy": lambda out: ["tiny_cpu", out / "recipes"],
        "data prepare": lambda out: [*source, "--num-proc", "1", "--output", out / "data"],
        "data merge": lambda out: [shard, "--output", out / "merged"],
        "data prove": lambda out: [shard, "--row", "0", "--output", out / "row.json"],
        "tokenizer train": lambda out: [*texts, "--vocab-size", "300", "--output", out / "tokenizer"],
        "tokenizer extend": lambda out: [tokenizer, *texts, "--tokens", "5", "--output", out / "tokenizer"],
        "tokenizer measure": lambda out: [tokenizer, *texts, "--output", out / "measured"],
        "runs": lambda out: [finished_run, "--output", out.with_name(f"{out.name}.png")],
        "average": lambda out: [finished_run, "--last", "1", "--output", out / "mean"],
        "verify": lambda out: [finished_run],
        "export": lambda out: [finished_run, "--output", out / "export"],
        "serve": lambda out: [model],  # its one option is the folder, which is always a wrong one here
        "benchmark head-ratio": lambda out: ["tiny_cpu", "--output", out / "study", "--dry-run"],
        "benchmark report": lambda out: [results, "--output", out / "report"],
        "eval": lambda out: [model, "--tasks", "no_such.yaml", "--output", out / "scores.json"],
        "grow": lambda out: [model, out / "grown", "--hidden", "2"],
        "plan": lambda out: [recipe, "--gpus", "1", "--gpu", "h100", "--no-suggestions", "--json", out / "plan.json"],
        "generate": lambda out: [model, "--prompts", folder / "prompts", "--output", out / "made.jsonl"],
    }
    return {command: lambda out, line=line: list(map(str, line(out))) for command, line in lines.items()}  # type: ignore[misc]


def check(right: dict[str, Line], out: Path, option: Option, wrong: str) -> None:
    (file := out.with_name(f"{out.name}.txt")).write_text("a file\n")
    value = {"folder": str(out), "file": str(file)}.get(wrong, WRONG.get(wrong, ""))
    arguments = right[option.command](out)
    if option.flag is None:
        arguments[option.place] = value
    else:
        arguments += [option.flag, value]
    refused = False
    try:
        with time_limit():
            importlib.import_module(COMMANDS[option.command][0]).main(arguments)
    except UserError as error:
        refused = True
        said = str(error)
    except SystemExit as ended:
        refused, said = ended.code == 2, "usage"
    if refused:
        assert len(said.splitlines()) == 1, said
        assert len(said) < 1000 + 3 * len(value), said
    assert refused or not must_be_refused(option, wrong), f"{option}: {wrong} is accepted"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_what_no_type_accepts_is_refused(right: dict[str, Line], out: Path, option: Option) -> None:
    for wrong in WRONG:
        if must_be_refused(option, wrong):
            check(right, out, option, wrong)
    assert not any(out.iterdir()), "something is written though the options are wrong"


@pytest.mark.nightly
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_any_value_ends_well(right: dict[str, Line], out: Path, option: Option) -> None:
    for wrong in (*WRONG, "folder", "file"):
        (place := out / wrong.replace(" ", "_")).mkdir()
        check(right, place, option, wrong)
