"""What all tests share: no network, and one trained run for those that start from one."""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import descendants, kill_tree

# Before any Hugging Face library is imported: a test that needs the hub must fail, not wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before triton is imported: without a GPU, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What inductor compiled for other instructions, as under ATEN_CPU_CAPABILITY, is found again in its
# shared cache and corrupts memory. Workers inherit this process's folder, which goes with it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _session = tempfile.TemporaryDirectory(prefix="motifarch-tests-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{_session.name}/inductor"
    os.environ["TRACKIO_DIR"] = f"{_session.name}/trackio"  # read once, when trackio is imported

os.environ["WANDB_MODE"] = "offline"


# Files that take minutes. They come first, so that no worker is left alone with one at the end.
LONG = (
    "test_docs.py",
    "test_on_gpu.py",
    "test_triton_attention.py",
    "test_layouts.py",
    "test_resume.py",
    "test_restart.py",
    "test_trainer.py",
    "test_parallel_muon.py",
    "test_compilation.py",
)


# Of transformers' own tests (transformers_suite), which its configuration declares.
TRANSFORMERS_MARKERS = "accelerate_tests executorch_export_test flash_attn_test flash_attn_3_test flash_attn_4_test \
generate is_fsdp_test is_pipeline_test is_tensor_parallel_test is_training_test onnx_export_test order \
torch_compile_test torch_export_test"


def pytest_configure(config: pytest.Config) -> None:
    for name in TRANSFORMERS_MARKERS.split():
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; none is available")


_ENDS_CHILDREN = pytest.StashKey[threading.Timer]()


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """Ends what a test has started a second before its limit ends the worker. A forked child holds
    the worker's pipes, and xdist would wait for it without end.
    """
    timer = threading.Timer(settings.timeout - 1, lambda: [kill_tree(child) for child in descendants(os.getpid())])
    timer.daemon = True
    timer.start()
    item.stash[_ENDS_CHILDREN] = timer


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    if timer := item.stash.get(_ENDS_CHILDREN, None):
        timer.cancel()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers alone and after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a few hundred blocks of 32 tokens."""
    from helpers.tiny import prepare_text

    return prepare_text(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    """A recipe file for a model of two layers, writing into `tmp_path / "run"`."""
    from helpers.tiny import write_recipe

    return write_recipe(tmp_path, data)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The output folder of a run of a few steps on one process."""
    from helpers.python_process import run_python
    from helpers.tiny import write_recipe

    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, data)
    code = "import sys; from motifarch.cli import main; main(sys.argv[1:])"
    run_python(code, "train", recipe, "--run.steps", "6", "--validation.every", "0")
    return folder / "run"
