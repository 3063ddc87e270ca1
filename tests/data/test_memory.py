"""Memory does not grow with the text: of both commands, with the processes that they start."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.data.memory import main as measure

# MiB that the larger text may take more. Its characters alone are 54 more, its tokens 70, its
# blocks, written twice, 140.
MORE = {"own_mib": 25, "mapped_mib": 60}


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_ten_times_the_text_takes_no_more_memory(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    arguments = ["--megabytes", "6", "60", "--words", "20000", "--work", str(tmp_path), "--output", str(output)]
    assert measure(arguments) == 0
    results = json.loads(output.read_text())["results"]
    for command in ("tokenizer train", "data prepare"):
        small, large = (one for one in results if one["command"] == command)
        for kind, most in MORE.items():
            assert large[kind] - small[kind] < most, kind
