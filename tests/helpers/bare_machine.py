"""A machine with a GPU that lacks packages which benchmarks/gpu.sh must do without."""

import os
from pathlib import Path

MISSING = (
    "datasets",
    "multiprocess",
    "liger_kernel",
    "flash_attn",
    "flash_attn_interface",
    "torchao",
    "lm_eval",
)

# Read by every interpreter as it starts: what it names is not to be found, as where it is not
# installed.
_HIDE = f"""
from importlib.machinery import PathFinder

missing = {MISSING!r}
find_spec = PathFinder.find_spec


def find(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in missing else find_spec(name, path, target)


PathFinder.find_spec = classmethod(find)
"""


def without_packages(folder: Path, *search: Path) -> dict[str, str]:
    """The environment of processes in which they are missing; `folder` holds what hides them."""
    (folder / "sitecustomize.py").write_text(_HIDE)
    path = os.pathsep.join(map(str, (folder, *search)))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
