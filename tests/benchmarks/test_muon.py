"""The counts of Muon's messages, on two processes and a tiny model."""

import json
from pathlib import Path

from benchmarks.communication.muon import KINDS, main


def test_counts(tmp_path: Path) -> None:
    output = tmp_path / "counts.json"
    assert main(["--quick", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    ours, torchs = content["results"]["parallel"], content["results"]["torch"]
    assert ours["chunks"] > 0
    assert ours["collectives"] == dict.fromkeys(KINDS, 0) | {"all_to_all": 2 * ours["chunks"]}
    # Of two processes each lacks half of its matrices' bytes on the way there, and half on the way
    # back.
    assert sum(ours["bytes"].values()) == content["least_bytes"] == 2 * content["numbers"]
    assert sum(torchs["collectives"].values()) > content["matrices"]
    assert sum(torchs["bytes"].values()) > content["least_bytes"]
    # Both did the same but for bfloat16's rounding: the two steps move weights by 4e-3 in the root
    # mean square.
    assert content["largest_difference_of_weights"] < 1e-3
