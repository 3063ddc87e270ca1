"""Model folders with damaged files, as each command that reads one takes them."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.wrong_values import time_limit
from motifarch.cli import COMMANDS
from motifarch.errors import UserError
from motifarch.export import export

VALUES = [None, "many", "", 3, -1, 0.5, 10**12, True, [], ["many"], {}, {"many": 1}]


def change(name: str, field: str, value: Any) -> Callable[[Path], None]:
    """Gives a JSON file's field a value; "a.b" is a field within one, "" the whole."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        *outer, last = field.split(".")
        place = content
        for part in outer:
            place = place[part]
        if field:
            place[last] = value
        (folder / name).write_text(json.dumps(content if field else value))

    return spoil


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def become_folder(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def index_of_a_list(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

# Damages that every command that reads the file must refuse, naming what is wrong.
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"{name} empty": (write(name, b""), name.partition(".")[0]) for name in FILES},
    **{f"{name} a folder": (become_folder(name), name.partition(".")[0]) for name in FILES},
    **{f"{name} a list": (change(name, "", []), name) for name in FILES[:-1]},
    **{f"{name} no JSON": (write(name, b'{"a": '), name) for name in FILES[:-1]},
    **{f"{name} no UTF-8": (write(name, b'{"a": "\xff"}'), name) for name in FILES[:-1]},
    **{f"{name} deep": (write(name, b"[" * 10_000), name) for name in FILES[:-1]},
    "layers as a word": (change("config.json", "num_hidden_layers", "two"), "num_hidden_layers"),
    "no heads": (change("config.json", "num_attention_heads", 0), "num_attention_heads"),
    "a negative epsilon": (change("config.json", "rms_norm_eps", -1.0), "rms_norm_eps"),
    "an activation of null": (change("config.json", "hidden_act", None), "hidden_act"),
    "a rotary key that nothing reads": (
        change("config.json", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "odd": 1}),
        "odd",
    ),
    "an end that is a word": (change("generation_config.json", "eos_token_id", "end"), "eos_token_id"),
    "ends that are words": (change("generation_config.json", "eos_token_id", ["end"]), "eos_token_id"),
    "an index of a list": (index_of_a_list, "model.safetensors.index.json"),
}


@pytest.fixture(scope="module")
def whole(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished_run, tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a model's folder, to be spoilt."""
    return shutil.copytree(whole, tmp_path / "model")


def run(command: str, folder: Path) -> str | None:
    """What a command says of a folder; None where it works."""
    arguments = {
        "generate": [folder, "--prompt", "a", "--max-new-tokens", "2"],
        "grow": [folder, folder.parent / "grown", "--hidden", "2"],
        "export": [folder, "--with-code"],
        "eval": [folder, "--tasks", "arc_easy"],
    }[command]
    shutil.rmtree(folder.parent / "grown", ignore_errors=True)
    try:
        with time_limit():
            importlib.import_module(COMMANDS[command][0]).main(list(map(str, arguments)))
    except UserError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, said
        assert len(said) < 1000
        return said
    return None


@pytest.mark.parametrize(("spoil", "named"), REFUSED.values(), ids=list(REFUSED))
def test_generation_names_what_is_damaged(folder: Path, spoil: Callable[[Path], None], named: str) -> None:
    spoil(folder)
    said = run("generate", folder)
    assert said is not None
    assert named in said


@pytest.mark.parametrize("command", ["grow", "export"])
@pytest.mark.parametrize("case", [case for case in REFUSED if "config.json" in case and "_" not in case.split()[0]])
def test_other_commands_name_what_is_damaged(folder: Path, command: str, case: str) -> None:
    spoil, named = REFUSED[case]
    spoil(folder)
    said = run(command, folder)
    assert said is not None
    assert named in said


def fields_of(content: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of an object's fields, and of those within them, a few deep."""
    names = []
    for name, value in content.items():
        names.append(prefix + name)
        if isinstance(value, dict) and prefix.count(".") < 2 and len(value) < 20 and "." not in name:
            names += fields_of(value, f"{prefix}{name}.")
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("command", ["generate", "grow", "export"])
def test_any_field_of_any_type_ends_well(whole: Path, tmp_path: Path, name: str, command: str) -> None:
    if command != "generate" and name != "config.json":
        pytest.skip("not read by it")
    unlike: list[str] = []
    for field in fields_of(json.loads((whole / name).read_text())):
        for i, value in enumerate(VALUES):
            folder = shutil.copytree(whole, tmp_path / f"{field}{i}" / "model")
            change(name, field, value)(folder)
            try:
                run(command, folder)
            except Exception as error:  # all of them are wanted, not the first
                unlike.append(f"{field}={value!r}: {type(error).__name__}: {error}"[:300])
            shutil.rmtree(folder.parent)
    assert not unlike, "\n".join(unlike)
