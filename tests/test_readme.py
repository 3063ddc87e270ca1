"""Every code block of the READMEs is run: Python as it stands, shell commands in a folder with some
text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
MAKE = [code.strip() for language, code in BLOCKS if language == "bash" and code.startswith("make ")]
SHELL = [code for language, code in BLOCKS if language == "bash" and not code.startswith("make ")]
PYTHON = [code for language, code in BLOCKS if language == "python"]
LAYERS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "motifarch/layers/README.md").read_text(), re.MULTILINE | re.DOTALL
)


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_every_block_is_run_by_a_test_below():
    assert len(MAKE) + len(SHELL) + len(PYTHON) == len(BLOCKS)
    assert MAKE
    assert SHELL
    assert PYTHON


@pytest.mark.parametrize("code", PYTHON + LAYERS)
def test_python_blocks(code, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for line in re.findall(r"print\(.*\)  # (.*)", code):
        assert line in result.stdout


@pytest.mark.parametrize("code", SHELL)
def test_shell_blocks(code, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "docs" / "notes").mkdir(parents=True)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]
    for source in sources:
        (tmp_path / "docs" / "notes" / f"{source.stem}.txt").write_text(source.read_text())
    # The commands count here, not the text that the model makes.
    assert "--run.steps 300" in code
    code = code.replace("--run.steps 300", "--run.steps 30 --optim.warmup_steps 5 --optim.decay_steps 9")
    result = subprocess.run(
        ["bash", "-euc", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs" / "mine" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("code", MAKE)
def test_make_targets_exist(code):
    """Make test is what runs this, and .ci/run runs make train for real; here make only has to know
    what to do.
    """
    result = subprocess.run(
        ["make", "--dry-run", *code.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "pytest" in result.stdout or "tiny_cpu.sh" in result.stdout
