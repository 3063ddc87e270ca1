"""What a release states in more than one place agrees."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import motifarch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs() -> list[dict]:
    return [job for file in WORKFLOWS for job in read_yaml(file)["jobs"].values()]


def make_targets() -> set[str]:
    """Those that the workflows and `.ci/run` call."""
    text = "\n".join(step.get("run", "") for job in jobs() for step in job["steps"])
    text += (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in jobs()]
    included = {entry["target"] for matrix in matrices for entry in matrix.get("include", ())}
    return set(re.findall(r"^make ([\w-]+)$", text, re.MULTILINE)) | included


def test_the_citation_and_the_changelog_name_the_version_and_its_date() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == motifarch.__version__
    assert headings[:2] == ["Unreleased", f"{citation['version']} - {citation['date-released']}"]


def tools() -> list[tuple[str, str, str]]:
    """The rows of CONTRIBUTING.md's table: a tool, the tests that run it, who installs it."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [
        (row[0], row[1], row[2])
        for row in re.findall(r"^\| (\S+) +\| `(tests/\S+)` +\| (.+?) +\|$", page, re.MULTILINE)
    ]


@pytest.mark.parametrize(("tool", "test", "installed_by"), tools())
def test_a_tool_we_say_works_is_pinned_and_run_by_a_test(tool: str, test: str, installed_by: str) -> None:
    text = (ROOT / test).read_text(encoding="utf-8")
    assert re.search(rf"\b{tool.replace('-', '_')}\b", text)
    pins = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    assert tool in [pin.replace("_", "-") for pin in pins]
    extra = [re.split(r"[^\w-]", needed)[0] for needed in PROJECT["optional-dependencies"]["dev"]]
    required = [re.split(r"[^\w-]", needed)[0] for needed in PROJECT["dependencies"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert (
        tool
        in {"extra dev": extra, "motifarch": required, "make": re.findall(r"--no-deps (\S+)", makefile)}[installed_by]
    )


@pytest.mark.parametrize("target", sorted(make_targets()))
def test_workflows_call_targets_that_exist(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_workflows_do_all_that_a_change_has_to_pass() -> None:
    called = {step.get("run") for job in jobs() for step in job["steps"]}
    required = re.findall(r"^make .*", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert required
    assert set(required) <= called


def test_workflows_test_each_python_that_is_declared() -> None:
    declared = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    tested = {python for job in jobs() for python in job.get("strategy", {}).get("matrix", {}).get("python", ())}
    assert tested == declared


def test_hooks_run_the_pinned_tools() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    repositories = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    tools = {tool for repo in repositories for hook in repo["hooks"] for tool in hook["additional_dependencies"]}
    assert tools
    assert tools <= set(pinned)


def test_installation_lists_every_extra() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)`", page, re.MULTILINE)) == set(PROJECT["optional-dependencies"])
