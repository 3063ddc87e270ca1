"""A test that hangs is named, and those after it still run."""

import os
import subprocess
import sys
from pathlib import Path

HANGING = Path(__file__).parent / "helpers" / "hanging.py"


def test_a_forked_child_cannot_hold_the_run() -> None:
    command = [sys.executable, "-m", "pytest", "--numprocesses", "1", "-o", "timeout=8", str(HANGING)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert "crashed while running 'tests/helpers/hanging.py::test_that_waits'" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
