"""The metrics file: each step once, exact losses, nothing lost but what is done again."""

import json
import math
from pathlib import Path

import pytest
import torch

from motifarch.train.metrics import MetricsLog
from motifarch.train.plots import draw_loss
from motifarch.train.run_folder import cut_metrics, last_metrics, read_metrics
from motifarch.train.step import StepResult
from motifarch.train.trackers import TensorBoard


def result(loss: float) -> StepResult:
    return StepResult(
        torch.tensor(loss), torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.0), torch.tensor([0.25, 0.75])
    )


def open_log(folder: Path, start_step: int = 0) -> MetricsLog:
    return MetricsLog(
        folder,
        start_step=start_step,
        flops_per_token=1e9,
        device=torch.device("cpu"),
        trackers=[TensorBoard(folder, start_step)],
        bytes_per_token=2.0,
    )


def test_rows_are_exact_and_each_step_is_there_once(tmp_path: Path) -> None:
    losses = [torch.rand(()).item() for _ in range(6)]
    log = open_log(tmp_path)
    for i, loss in enumerate(losses):
        log.add(result(loss), tokens=100, step=i + 1, learning_rate=0.1)
        if i == 3:
            log.update_last(validation_loss=1.25)
            assert len(log.flush()) == 4
    log.close()
    # A resumed run writes steps 5 and 6 again.
    again = open_log(tmp_path, start_step=4)
    for i in (4, 5):
        again.add(result(losses[i]), tokens=100, step=i + 1, learning_rate=0.1)
    again.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == losses
    assert [row["bits_per_byte"] * math.log(2) * 2 for row in rows] == pytest.approx(losses)
    assert rows[3]["validation_loss"] == 1.25
    assert rows[0]["lambda"] == [0.25, 0.75]
    assert rows[0]["model_tflops"] == rows[0]["tokens_per_second"] * 1e9 / 1e12
    assert rows[0]["memory_gib"] > 0
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_holds_the_same(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.add(result(step / 4), tokens=100, step=step, learning_rate=0.1)
    log.close()
    again = open_log(tmp_path, start_step=2)
    again.add(result(8.0), tokens=100, step=3, learning_rate=0.1)
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 8.0)]
    assert events.Scalars("lambda/1")[0].value == 0.75


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add(result(math.nan), tokens=1, step=1, learning_rate=0.1)
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse)["loss"] is None


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    cut_metrics(path, 1)
    assert path.read_text() == '{"step": 1}\n'


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 5 / s, "learning_rate": 0.1} for s in range(1, 30)]
    rows[10] |= {"validation_loss": 1.0}
    rows[5]["loss"] = None  # type: ignore[assignment]
    draw_loss(rows, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("first", [0, 1, 5_000, 19_999, 20_000, 30_000])
def test_the_last_rows_are_found_from_the_end(tmp_path, first):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "lambda": [0.5] * 20}) for step in range(1, 20_001)]
    lines.insert(7, "damaged")
    path.write_text("\n".join(lines) + "\n" + '{"step": 20001, "lo')
    found = [row for row in last_metrics(path, first) if row["step"] >= first]
    assert found == [row for row in read_metrics(path) if row["step"] >= first]
    assert last_metrics(tmp_path / "none", first) == []
