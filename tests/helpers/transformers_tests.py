"""transformers' own model tests, as the source distribution of the installed version holds them.

`make` unpacks them into build/transformers-VERSION/tests; no copy is part of this project. That
distribution has the files tests/test_*.py alone. What those import besides comes from the folder
that MOTIFARCH_TRANSFORMERS_TESTS names, the `tests` of a checkout of transformers: the testers of
generation, of causal language models and of exporters. Without it empty classes stand in for these,
and their tests do not run.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
import transformers

from helpers.distributed import on_ranks

FOLDER = Path(__file__).parents[2] / "build" / f"transformers-{transformers.__version__}" / "tests"

CHECKOUT = os.environ.get("MOTIFARCH_TRANSFORMERS_TESTS")
"""`tests` of a checkout, of a version near the installed one."""

STAND_INS = {
    "exporters.test_export": ("ExportTesterMixin", "ExportGenerateTesterMixin"),
    "generation.test_utils": ("GenerationTesterMixin",),
    "test_fsdp_mixin": ("FSDPTesterMixin",),  # it needs more of what the distribution lacks
}


def prepare() -> None:
    """Makes `tests.test_modeling_common` and its neighbours importable.

    The distribution's files go before the checkout's, which are of another version.
    """
    if not (FOLDER / "test_modeling_common.py").is_file():
        pytest.skip(f"{FOLDER} does not hold transformers' tests; `make transformers-tests` gets them")
    package = ModuleType("tests")
    package.__path__ = [str(FOLDER)] + ([CHECKOUT] if CHECKOUT else [])
    sys.modules["tests"] = package
    runs_ranks = ModuleType("tests.distributed_testing_utils")
    runs_ranks.run_distributed = run_distributed  # type: ignore[attr-defined]
    sys.modules[runs_ranks.__name__] = runs_ranks
    options = ModuleType("tests.utils.test_configuration_utils")
    options.config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "problem_type": "regression"}  # type: ignore[attr-defined]
    sys.modules[options.__name__] = options
    for name, classes in STAND_INS.items():
        if CHECKOUT and (Path(CHECKOUT) / f"{name.replace('.', '/')}.py").is_file() and name != "test_fsdp_mixin":
            continue
        parent = name.rpartition(".")[0]
        if parent:
            sys.modules[f"tests.{parent}"] = ModuleType(f"tests.{parent}")
        module = ModuleType(f"tests.{name}")
        for each in classes:
            setattr(module, each, type(each, (), {}))
        sys.modules[module.__name__] = module


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Stands for the distribution's missing one: calls a function on ranks, its rank first."""
    return lambda function: lambda *args: on_ranks(world_size, _on_rank, function.__module__, function.__name__, args)


def _on_rank(module: str, name: str, args: tuple[Any, ...]) -> None:
    prepare()
    dist.init_process_group("gloo")
    getattr(importlib.import_module(module), name)(dist.get_rank(), *args)
    dist.destroy_process_group()
