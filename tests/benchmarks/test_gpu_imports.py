"""GPU tests are collected and benchmarks imported where packages are missing."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from helpers.bare_machine import MISSING, without_packages

ROOT = Path(__file__).parents[2]
BENCHMARKS = (
    *("ops.attention", "ops.combine", "ops.decode", "ops.poly_norm", "ops.grouped_poly_norm", "ops.hyper_connections"),
    "ops.routing",
    "models.train_step",
    *("compiled", "precompile", "tuning.tune"),
)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which they are missing."""
    # As benchmarks/gpu.sh has it, which runs what is not installed.
    return without_packages(tmp_path, ROOT, ROOT / "kernels")


def python(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_gpu_tests_are_collected(bare: dict[str, str]) -> None:
    printed = python(
        bare, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernels"
    )
    for test in (
        "test_triton_attention.py::test_error_rule[cuda-",
        "test_poly_norm.py::test_error_rule_forward_and_backward[cuda-",
        "test_combine.py::test_error_rule[cuda-",
        "test_decoding.py::test_on_a_device[",
        "test_on_gpu.py::test_the_same_bits_in_every_run[GDA 4:1-cuda]",
        "test_on_gpu.py::test_a_compiled_model_is_as_near_to_float64_as_an_eager_one[cuda-inductor]",
    ):
        assert f"tests/kernels/{test}" in printed


def test_the_benchmarks_are_imported(bare: dict[str, str]) -> None:
    code = f"""
        import importlib, importlib.util
        assert not any(importlib.util.find_spec(name) for name in {MISSING!r})
        for name in {BENCHMARKS!r}:
            importlib.import_module("benchmarks." + name).main
        """
    python(bare, "-c", textwrap.dedent(code))
