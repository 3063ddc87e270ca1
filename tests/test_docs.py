"""The documentation is true: its examples run, its commands, options and files exist."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import pytest
import tilings
import yaml
from packaging.version import Version

from helpers.chats import CHATS
from helpers.python_process import run_python
from motifarch.cli import COMMANDS, run
from motifarch.export import export
from motifarch.study.grid import read_grid
from motifarch.study.report import write_report
from motifarch.train.recipe import RECIPES

ROOT = Path(__file__).parent.parent
FINE_TUNING = ROOT / "docs" / "fine_tuning_trl.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/README.md")]

RUN_BLOCKS = """
import contextlib, io, json, os, re, sys

folder, tests, blocks = sys.argv[1:]
os.chdir(folder)
for name, code in json.loads(blocks):
    if "timm" in code:
        sys.path.insert(0, tests)
        from helpers.timm_models import make_timm_importable
        make_timm_importable()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    for line in re.findall(r"print\\(.*\\)  # (.*)", code):
        assert line in printed.getvalue(), (name, line, printed.getvalue())
"""


def blocks(page: Path, language: str) -> list[str]:
    """A page's code blocks in a language: python and bash are run here, console is only checked."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's shell blocks, in words."""
    text = "".join(code for language in ("bash", "console") for code in blocks(page, language))
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS_OF_PAGES = [
    pytest.param(words, id=" ".join(words)[:60]) for page in PAGES + OTHERS for words in commands(page) if words
]


def test_python_blocks_run_and_print_what_they_say(tmp_path):
    """In one process: each would otherwise spend most of its time on imports."""
    pages = [page for page in PAGES if page != FINE_TUNING]
    code = [(f"{page.name}, block {i}", text) for page in pages for i, text in enumerate(blocks(page, "python"), 1)]
    if Version(version("torch")) < Version("2.12"):
        code = [(name, text) for name, text in code if "torch.export" not in text]
    for library in ("timm", "diffusers"):
        if find_spec(library) is None:
            code = [(name, text) for name, text in code if library not in text]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run_python(RUN_BLOCKS, tmp_path, ROOT / "tests", json.dumps(code))


def test_recipe_fields_that_pages_name_exist():
    """In code; of another stack's table the column that is ours."""
    sections = {name.partition(".")[0] for name in RECIPES.fields if "." in name}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name == "come_from.md":
            text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
        for name in re.findall(r"`([a-z]+\.[a-z_]+)`", text):
            is_field = name.partition(".")[0] in sections and not name.endswith((".json", ".safetensors", "_hub"))
            assert not is_field or name in RECIPES.fields, (page.name, name)


@pytest.mark.parametrize(
    "text", [pytest.param(text, id=f"{page.stem}{i}") for page in PAGES for i, text in enumerate(blocks(page, "yaml"))]
)
def test_recipes_that_pages_show_are_read(text, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
    parts = yaml.safe_load(text)
    if parts.keys() <= {"designs", "variants"}:  # of a study
        given = [word for name, part in parts.items() for word in (f"--{name}", json.dumps(part))]
        assert read_grid([str(ROOT / "recipes" / "study" / "tiny_cpu.yaml"), *given])
    else:
        assert RECIPES.read([str(tmp_path / "shown.yaml")])


def test_pictures_are_drawn_as_they_are_committed(tmp_path, monkeypatch):
    drawn = tmp_path / "pictures"
    drawn.mkdir()
    monkeypatch.setattr(tilings, "PICTURES", drawn)
    for draw in (tilings.forward, tilings.backward, tilings.packed):
        draw()
    results = ROOT / "benchmarks" / "results" / "head_ratio_study_designs_cpu" / "results.json"
    write_report(json.loads(results.read_text(encoding="utf-8")), tmp_path)
    for name in ("by_design", "by_gain"):
        (tmp_path / "figures" / f"{name}.svg").rename(drawn / f"loss_{name}.svg")
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").iterdir()}
    assert {path.name: path.read_text(encoding="utf-8") for path in drawn.iterdir()} == committed


@pytest.mark.slow
def test_the_recipes_for_trl_run_one_after_another(finished_run, tmp_path):
    export(finished_run, tmp_path / "runs" / "tiny_cpu" / "export")
    pairs = [{"prompt": chat[:1], "chosen": chat[1:2], "rejected": CHATS[0][1:]} for chat in CHATS]
    for name, rows in (("chats", [{"messages": chat} for chat in CHATS]), ("preferences", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = [(FINE_TUNING.name, "\n".join(blocks(FINE_TUNING, "python")))]
    run_python(RUN_BLOCKS, tmp_path, ROOT / "tests", json.dumps(code))
    for name in ("chat", "merged", "preferred"):
        assert (tmp_path / "runs" / name / "model.safetensors").is_file()


def run_with_few_steps(page, folder):
    """Runs a page's shell block: the commands count here, not the model's text. Returns what it
    printed.
    """
    (code,) = blocks(ROOT / "docs" / page, "bash")
    code, changed = re.subn(r"--run.steps \d+", "--run.steps 10 --optim.warmup_steps 2 --optim.decay_steps 3", code)
    assert changed == 1
    return run_shell(code, folder)


def run_shell(code, folder):
    """Runs lines of a shell; returns what they printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euc", code], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_on_your_own_text(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "text" / "notes").mkdir(parents=True)
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:12]:
        shutil.copyfile(source, tmp_path / "text" / "notes" / f"{source.stem}.txt")
    run_with_few_steps("training.md", tmp_path)
    assert len((tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.nightly
def test_a_model_of_korean_text(tmp_path):
    (tmp_path / "text").mkdir()
    words = [
        "옛날",
        "어느",
        "마을에",
        "나무꾼이",
        "산에서",
        "샘물을",
        "마시고",
        "노래를",
        "불렀다.",
        "아이들은",
        "바닷가로",
        "갔다.",
    ]
    for i in range(20):
        lines = (" ".join(words[(i + j * k) % len(words)] for k in range(12)) for j in range(200))
        (tmp_path / "text" / f"{i}.txt").write_text("\n".join(lines), encoding="utf-8")
    printed = run_with_few_steps("korean.md", tmp_path)
    assert "decomposed" not in printed
    assert "bits per byte" in printed
    assert "옛날 어느 마을에" in printed


@pytest.mark.nightly
def test_a_whole_verification(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code = "\n".join(blocks(ROOT / "docs" / "provenance.md", "bash"))
    run_shell(code, tmp_path)
    report = (tmp_path / "verified.md").read_text(encoding="utf-8")
    assert "checks that could be made hold" in report
    assert report.count("Every bit is the same") == 2


@pytest.mark.parametrize("words", COMMANDS_OF_PAGES)
def test_commands_options_and_files_exist(words, capsys):
    for word in words:
        if word.startswith(("recipes/", "benchmarks/", "examples/")):
            assert (ROOT / word).exists(), word
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    if words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), words[2]
    if "motifarch.train" in words:
        words = ["motifarch", "train", *words[words.index("motifarch.train") + 1 :]]
    if words[0] != "motifarch" or words[1] == "--help":
        return
    name = " ".join(takewhile(lambda word: not word.startswith("-"), words[1:3]))
    command = name if name in COMMANDS else words[1]
    assert command in COMMANDS, command
    with contextlib.suppress(SystemExit):
        run([*command.split(), "--help"])
    printed = capsys.readouterr().out
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in printed, option
