"""A fresh interpreter, for what depends on what was imported before."""

import os
import subprocess
import sys
import textwrap


def run_python(code: str, *args: object, offline: bool = True) -> str:
    """Runs code in a new process and returns what it printed; fails where the code does.

    Without ``offline`` it may ask the hub that HF_ENDPOINT names.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1" if offline else "0"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
