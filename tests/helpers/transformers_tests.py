"""transformers' own model tests, as the source distribution of the installed version has them.

tests/transformers_suite/download.py unpacks them into build/; no copy is part of this project. That
distribution has the files tests/test_*.py alone. What these import besides, the testers of
generation, of causal language models and of exporters, comes from the folder that
MOTIFARCH_TRANSFORMERS_TESTS names: `tests` of a checkout of transformers, of a version near the
installed one. Without it empty classes stand for them, and their tests do not run.
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


def prepare() -> None:
    """Makes `tests.test_modeling_common` and its neighbours importable; skips where there are none.

    The distribution's files go before the checkout's.
    """
    if not (FOLDER / "test_modeling_common.py").is_file():
        reason = f"no tests of transformers in {FOLDER}; `make test-slow` and tests/transformers_suite/download.py"
        pytest.skip(f"{reason} get them", allow_module_level=True)
    _module("tests").__path__ = [str(FOLDER), *filter(None, [CHECKOUT])]
    _module("tests.distributed_testing_utils", run_distributed=run_distributed)
    _module("tests.utils.test_configuration_utils", config_common_kwargs={"return_dict": False})
    _module("tests.test_fsdp_mixin", FSDPTesterMixin=type("FSDPTesterMixin", (), {}))
    if CHECKOUT is None:
        _module("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _module("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))


def _module(name: str, **members: Any) -> ModuleType:
    """A module in the place of a file, and the package that it is in."""
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        _module(parent).__path__ = [f"{folder}/{parent.rpartition('.')[2]}" for folder in sys.modules["tests"].__path__]
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(members)
    return module


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Stands for the distribution's missing one: calls a function on ranks, its rank first."""
    return lambda function: lambda *args: on_ranks(world_size, _on_rank, function.__module__, function.__name__, args)


def _on_rank(module: str, name: str, args: tuple[Any, ...]) -> None:
    prepare()
    dist.init_process_group("gloo")
    getattr(importlib.import_module(module), name)(dist.get_rank(), *args)
    dist.destroy_process_group()
