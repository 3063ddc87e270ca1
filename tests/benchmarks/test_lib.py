"""What benchmarks share: times side by side, memory, the roofline, checks, and records."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lib.bench import (
    Roofline,
    measure_roofline,
    peak_bytes,
    saved_bytes,
)
from benchmarks.lib.exact import fault, of_formula
from benchmarks.lib.run import Aim
from benchmarks.ops import poly_norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def one_second(function: Callable[[], object], seconds: float) -> list[float]:
    """A clock that counts by itself."""
    function()
    return [1.0]


def test_the_roofline_is_the_longer_of_bytes_and_flops() -> None:
    found = measure_roofline(CPU, one_second, ["bf16"], seconds=0, quick=True)
    assert found.content() == {
        "copy": {"bytes": 4 << 20, "gb_per_second": (8 << 20) * 1e-9},  # read and written in a second
        "matrix": {"size": 128, "tflops": {"bf16": 2 * 128**3 * 1e-12}},
    }
    roofline = Roofline(1, 100.0, 1, {"bf16": 1000.0, "float32": 10.0})
    assert roofline.bound(50, 200, "bf16") == {"bytes": 0.5, "flops": 0.2, "bound": 0.5}
    assert roofline.bound(50, 200, "float32") == {"bytes": 0.5, "flops": 20.0, "bound": 20.0}
    assert roofline.bound(50) == {"bytes": 0.5, "flops": None, "bound": 0.5}


def test_saved_bytes_count_storages_once() -> None:
    x = torch.ones(10, 10, requires_grad=True)
    assert saved_bytes(lambda: x * x, [x]) == {"total": 400, "beyond_inputs": 0}
    assert saved_bytes(lambda: x.exp() * x, [x]) == {"total": 800, "beyond_inputs": 400}
    assert saved_bytes(lambda: x + x, [x]) == {"total": 0, "beyond_inputs": 0}


def test_peak_bytes_are_what_is_held_at_once() -> None:
    x = torch.zeros(1 << 18)  # 1 MiB; each operation gives another

    def two_at_a_time() -> Tensor:
        out = x + 1
        for _ in range(5):
            out = out + 1
        return out

    assert peak_bytes(two_at_a_time, CPU) == pytest.approx(2 << 20, rel=0.01)
    assert peak_bytes(lambda: [x + 1 for _ in range(5)], CPU) == pytest.approx(5 << 20, rel=0.01)


def test_a_single_wrong_element_is_found() -> None:
    x, grad = torch.randn(64, 512), torch.randn(64, 512)
    exact = of_formula(lambda x: x * 2, {"x": x}, grad)
    right = {"output": x * 2, "x": grad * 2}
    assert fault(exact.errors(right), 6e-2) is None
    wrong, lost = x * 2, grad * 2
    wrong[63, 511] += 3.0
    lost[0, 0] = float("nan")
    assert "its output is off by 3" in (fault(exact.errors(right | {"output": wrong}), 6e-2) or "")
    assert "its gradient of x is off by nan" in (fault(exact.errors(right | {"x": lost}), 6e-2) or "")
    assert "off by inf" in (fault(exact.errors({"output": x[:1]}), 6e-2) or "")


def test_gradients_of_parameters_are_summed_over_blocks_of_rows() -> None:
    rows, columns = 9, 1 << 19  # more elements than a block holds
    x, grad = torch.randn(rows, columns), torch.randn(rows, columns)
    exact = of_formula(lambda x, scale: x * scale, {"x": x, "scale": torch.tensor(2.0)}, grad)
    sums = (grad.double() * x.double()).sum().float()
    errors = exact.errors({"output": x * 2, "x": grad * 2, "scale": sums})
    assert max(e["relative"] for e in errors.values()) < 1e-6


def row(provider: str, forward: float, peak: int = 10, **cell: Any) -> dict[str, Any]:
    """Made-up figures; ours moves a byte in a second at the copy's bandwidth."""
    spread = {"median": forward, "lower": forward, "upper": forward}
    figures = {"seconds": {"forward": spread}, "copy_share": {"forward": 1 / forward}, "peak_bytes": peak}
    return {"function": "f", "dtype": "bf16", "rows": 1, "columns": 8, "provider": provider} | figures | cell


@pytest.mark.parametrize(
    ("aim", "ratio", "met"),
    [
        (Aim("", "copy_share", 0.5, ("ours",), (), ("forward",)), 0.5, True),
        (Aim("", "speed", 1.5, ("ours",), ("a", "b"), ("forward",)), 1.5, True),
        (Aim("", "peak_bytes", 0.5, ("ours",), ("a",)), 0.6, False),
        (Aim("", "speed", 1.5, ("ours",), ("c",), ("forward",)), None, None),
        (Aim("", "copy_share", 0.5, ("ours",), (), ("forward",), dtype="float32"), None, None),
    ],
)
def test_ours_is_judged_by_its_worst_size(aim: Aim, ratio: float | None, met: bool | None) -> None:
    benchmark = poly_norm.PolyNorm("poly_norm", None)
    benchmark.aims = {"cuda": (aim,)}
    cells = [row("ours", 2.0, 6), row("a", 4.0), row("b", 3.0)]
    cells += [row(r["provider"], r["seconds"]["forward"]["median"] / 2, columns=16) for r in cells]
    cells[3]["peak_bytes"] = 1
    judged = benchmark.judge(cells, CUDA)
    assert [(j["worst"], j["met"]) for j in judged] == ([] if ratio is None else [(ratio, met)])
    assert benchmark.judge(cells, CPU) == []
