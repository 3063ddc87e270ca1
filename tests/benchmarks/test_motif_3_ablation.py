"""The ablation of Motif-3's parts: equal costs, runs that go on after a kill, statistics."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.lib import report
from benchmarks.models.motif_3_ablation import VARIANTS, main, match
from benchmarks.models.motif_3_ablation_report import statistics
from helpers.tiny import prepare_text
from motifarch.train.run_folder import METRICS, RECORD


def test_variants_cost_the_same() -> None:
    rows = match(list(VARIANTS), 4096, 128)
    assert len({row["model"] for row in rows}) == 5
    assert all(abs(row["deviation"]) < 2e-3 for row in rows)
    base, mla, gda, swiglu, no_mhc = rows
    assert base["cache_bytes_per_token"] == mla["cache_bytes_per_token"] < gda["cache_bytes_per_token"]
    assert gda["parameters"] < base["parameters"] < no_mhc["parameters"]
    assert swiglu["fields"]["moe_intermediate_size"] == base["fields"]["moe_intermediate_size"]


def test_differences_are_paired_by_seed() -> None:
    """What a seed does to all cancels; a run that diverged counts nowhere."""
    found = {
        "base": {0: 1.0, 1: 2.0, 2: 3.0},
        "worse": {0: 1.1, 1: 2.101, 2: 3.099},
        "same": {0: 1.001, 1: 1.999, 2: None},
    }
    runs = [{"model": m, "seed": s, "bits_per_byte": bits} for m, own in found.items() for s, bits in own.items()]
    means, differences = ({row["model"]: row for row in statistics(runs)[name]} for name in ("means", "differences"))
    assert means["same"]["n"] == differences["same"]["own"]["n"] == 2
    assert means["worse"]["half"] > 2 > 0.01 > differences["worse"]["own"]["half"]
    assert differences["worse"]["own"]["mean"] == pytest.approx(0.1)
    assert differences["worse"]["p_holm"] < 0.01 < 0.9 < differences["same"]["p_holm"]


@pytest.mark.nightly
def test_a_killed_ablation_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, output = tmp_path / "work", tmp_path / "ablation.json"
    words = ["--data", str(prepare_text(tmp_path)), "--work", str(work), "--output", str(output), "--seeds", "0"]
    words += ["--only", "no_mhc", "--steps", "10", "--sequences", "4", "--sweep", "1e-2"]
    command = [sys.executable, "-m", "benchmarks.models.motif_3_ablation", *words]
    first = work / "base" / "seed_0"
    with subprocess.Popen(command, cwd=report.ROOT, env=os.environ, stdout=subprocess.DEVNULL) as process:
        while not list(first.glob("checkpoints/*/manifest.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert main(words) == 0
    record = json.loads((first / RECORD).read_text())
    assert [start["step"] > 0 for start in record["starts"]] == [False, True]  # it went on, not again
    content = json.loads(output.read_text())
    assert [run["model"] for run in content["runs"]] == ["base", "no_mhc"]
    assert {run["tokens"] for run in content["runs"]} == {10 * 16 * 32}
    assert output.with_suffix(".png").stat().st_size > 10_000
    # Nothing is trained again, and nothing of other settings is taken for done.
    before = (first / METRICS).stat().st_mtime_ns
    assert main(words) == 0
    assert (first / METRICS).stat().st_mtime_ns == before
    assert main([*words, "--steps", "5"]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--data", "nowhere"], "holds no prepared data; make it with `motifarch data prepare"),
    ],
)
def test_slips(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--work", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
