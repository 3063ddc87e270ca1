"""MXFP8 products of experts with torchao's emulation, against MX rounding by hand."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.emulated_experts import MODEL, leave_rows_unwritten
from helpers.models import tiny_config
from motif_kernels import grouped_linear
from motifarch.errors import UserError
from motifarch.layers.experts import Experts
from motifarch.layers.padded_rows import PaddedRows
from motifarch.models.motif import MotifForCausalLM
from motifarch.parallel import check_low_precision, low_precision
from motifarch.parallel.low_precision import apply_low_precision
from motifarch.parallel.low_precision_experts import ROWS, convert_experts

pytest.importorskip("torchao", reason="needs torchao (pip install 'motifarch[low-precision]')")

HIDDEN, WIDTH = 64, 32
COUNTS = {
    "some": [5, 40, 1, 130],
    "an idle first": [0, 3, 0, 64],
    "one takes all": [0, 0, 100, 0],
    "whole tiles": [128, 256, 128, 0],
}


def model_of(**changes: Any) -> MotifForCausalLM:
    with torch.device("meta"):
        return MotifForCausalLM(tiny_config("gda", **MODEL | changes))


def convert(experts: Experts) -> None:
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity(), experts, torch.nn.Identity()])
    assert convert_experts(model, emulate=True) == ["model.layers.1."]


@pytest.fixture
def experts() -> Experts:
    """Four of an inner layer, multiplying in MXFP8."""
    torch.manual_seed(0)
    made = Experts(HIDDEN, num_experts=4, intermediate_size=WIDTH, dtype=torch.bfloat16)
    convert(made)
    return made


def inputs(counts: list[int], of_none: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, of which some at the end are of no expert and NaN; where experts' end; a gradient."""
    torch.manual_seed(1)
    rows = sum(counts)
    # Rows of very different sizes: a scale for all of them would lose the small ones.
    x = torch.randn(rows + of_none, HIDDEN) * torch.logspace(-3, 2, rows + of_none)[:, None]
    x[rows:] = float("nan")
    grad = torch.randn(rows + of_none, 2 * WIDTH)
    return x.bfloat16(), torch.tensor(counts).cumsum(0, dtype=torch.int32), grad.bfloat16()


def rounded(t: Tensor, dim: int) -> Tensor:
    """As MXFP8 has it: blocks of 32 along a dimension, filled up with zeros, each of e4m3 numbers
    (three bits after the first, exponents from -6, at most 448) times a power of two, the smallest
    with which none is above 448.
    """
    moved = t.float().movedim(dim, -1)
    size = moved.shape[-1]
    blocks = torch.nn.functional.pad(moved, (0, -size % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    scale = (largest / 448).log2().ceil().clamp(min=-127).exp2()
    numbers = blocks / scale
    exponent = numbers.abs().clamp(min=2.0**-126).log2().floor().clamp(min=-6)
    step = (exponent - 3).exp2()
    numbers = (numbers / step).round() * step
    return (numbers * scale).flatten(-2)[..., :size].movedim(-1, dim)


def test_rounding_by_hand() -> None:
    block = torch.zeros(32)
    block[:5] = torch.tensor([448.0, 17.0, -19.0, 2.0**-9, 0.3])
    # 17 lies between 16 and 18 and goes to the even one, 19 to 20; 2^-9 is the smallest number.
    assert rounded(block, 0)[:5].tolist() == [448, 16, -20, 2.0**-9, 0.3125]
    assert rounded(2 * block, 0).tolist() == (2 * rounded(block, 0)).tolist()
    assert rounded(torch.zeros(2, 32), 1).count_nonzero() == 0


def padded_product(experts: Experts, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    rows = PaddedRows(offsets, len(x), experts.row_multiple)
    return rows.unpad(experts.grouped_product(rows.pad(x), weight, rows.offsets))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_round_what_they_read_and_nothing_else(experts: Experts, counts: list[int]) -> None:
    x, offsets, grad = inputs(counts)
    x.requires_grad_()
    weight = experts.gate_up_proj
    out = padded_product(experts, x, weight, offsets)
    out.backward(grad)
    expected = [torch.zeros_like(t, dtype=torch.float32) for t in (out, x, weight)]
    for e, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        own, g = x.detach()[begin:end], grad[begin:end]
        expected[0][begin:end] = rounded(own, 1) @ rounded(weight[e], 1).T
        expected[1][begin:end] = rounded(g, 1) @ rounded(weight[e], 0)
        expected[2][e] = rounded(g, 0).T @ rounded(own, 0)
    for found, wanted in zip((out, x.grad, weight.grad), expected, strict=True):
        # Rounded once more, to bfloat16; the sum's order differs.
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-5 * wanted.detach().abs().max().item())
    for e, count in enumerate(counts):
        assert bool(weight.grad[e].any()) == bool(count)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("activation", ["poly_norm", "silu"])
def test_experts_are_near_bfloat16(activation: str, counts: list[int]) -> None:
    x, offsets, _ = inputs(counts)
    grad = torch.randn(len(x), HIDDEN).bfloat16()
    found = []
    for matmul in ("compute", "mxfp8"):
        torch.manual_seed(0)
        experts = Experts(HIDDEN, num_experts=4, intermediate_size=WIDTH, activation=activation, dtype=torch.bfloat16)
        if matmul == "mxfp8":
            convert(experts)
        leaf = x.clone().requires_grad_()
        out = experts(leaf, offsets)
        out.backward(grad)
        found.append([out, leaf.grad, *(p.grad for p in experts.parameters())])
    for exact, near in zip(*found, strict=True):
        assert exact is not None
        assert near is not None
        assert near.isfinite().all()
        error = (near - exact).float().norm() / exact.float().norm()
        # Three bits after the first: 2 % a number, in two products one after the other.
        assert error < 0.15
    assert not torch.equal(found[0][0], found[1][0])


def test_no_rows_at_all(experts: Experts) -> None:
    x = torch.zeros(0, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    out = experts(x, torch.zeros(4, dtype=torch.int32))
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("multiple", [1, 32, ROWS])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_padded_rows(counts: list[int], multiple: int) -> None:
    x, offsets, _ = inputs(counts)
    rows = PaddedRows(offsets, len(x), multiple)
    padded, begin = rows.pad(x), 0
    assert padded.isfinite().all()
    for own, end in zip(x[: offsets[-1]].split(counts), rows.offsets.tolist(), strict=True):
        assert (end - begin) % multiple == 0
        assert end > begin
        assert torch.equal(padded[begin : begin + len(own)], own)
        assert not padded[begin + len(own) : end].any()
        begin = end
    assert end <= len(padded)
    back = rows.unpad(padded)
    assert torch.equal(back[: offsets[-1]], x[: offsets[-1]])
    assert not back[offsets[-1] :].any()


def test_gradients_of_padding() -> None:
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    rows = PaddedRows(offsets, 6, 4)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows.pad, x)
    assert torch.autograd.gradcheck(
        rows.unpad, torch.randn(len(rows.pad(x)), 3, dtype=torch.float64, requires_grad=True)
    )


def test_rows_that_no_product_writes_enter_nothing(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.prototype.moe_training import mxfp8_grouped_mm as torchao

    def gradients() -> list[Tensor]:
        x, offsets, _ = inputs([5, 0, 40, 1])
        leaf = x.clone().requires_grad_()
        experts.zero_grad()
        out = experts(leaf, offsets)
        out.square().sum().backward()
        return [out, leaf.grad, *(p.grad.clone() for p in experts.parameters())]  # type: ignore[list-item, union-attr]

    clean = gradients()
    for name in ("_compute_fwd", "_compute_dgrad"):
        monkeypatch.setattr(torchao, name, getattr(torchao, name))  # put back at the end
    leave_rows_unwritten()
    x, offsets, _ = inputs([5, 0, 40, 1])
    rows = PaddedRows(offsets, len(x), ROWS)
    assert experts.grouped_product(rows.pad(x), experts.gate_up_proj, rows.offsets).isnan().any()  # it is at work
    for found, expected in zip(gradients(), clean, strict=True):
        assert torch.equal(found, expected)


def test_inner_experts_are_converted_and_nothing_of_the_router() -> None:
    model = model_of()
    before = dict(model.named_parameters())
    names = apply_low_precision(model, "mxfp8", emulate=True)
    assert {"model.layers.1.moe.experts", "model.layers.2.moe.experts"} <= set(names)
    kept = ("router", "mhc_", "lambda", "layers.0.", "layers.3.", "mtp_layers", "lm_head")
    assert not [name for name in names if any(part in name for part in kept)]
    for layer, block in model.model.expert_layers().items():
        assert block.experts.row_multiple == (1 if layer == 3 else ROWS)
        assert (block.experts.grouped_product is grouped_linear) == (layer == 3)
    assert dict(model.named_parameters()) == before
    assert not any("experts" in n for n in apply_low_precision(model_of(), "fp8", emulate=True) if "shared" not in n)


BLACKWELL: dict[str, Any] = {"device": torch.device("cuda", 0), "compute_dtype": torch.bfloat16, "tokens": 64}


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of linear layers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(low_precision, "_has_mxfp8_kernels", lambda: True)


def test_widths_that_no_block_fits_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"multiples of 32, but model.layers.1.moe.experts has .*moe_intermediate_size 48"
    ):
        apply_low_precision(model_of(moe_intermediate_size=48, num_shared_experts=0), "mxfp8", emulate=True)


@pytest.mark.usefixtures("blackwell")
def test_widths_that_no_tile_fits_are_refused_on_a_gpu() -> None:
    with pytest.raises(UserError, match=r"multiples of 128, but model.layers.1.moe.experts has model.hidden_size 32"):
        check_low_precision("mxfp8", model=model_of(), **BLACKWELL)
    check_low_precision("mxfp8", model=model_of(num_experts=None, polynorm_bias_clamp=None), **BLACKWELL)


@pytest.mark.usefixtures("blackwell")
def test_a_gpu_without_the_kernels_of_experts_is_refused() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (10, 0):
        pytest.skip("this GPU may have the kernels")
    with pytest.raises(UserError, match="lacks kernels for their products; run pip install nvidia-cutlass-dsl"):
        check_low_precision("mxfp8", model=model_of(hidden_size=128, moe_intermediate_size=128), **BLACKWELL)


@pytest.mark.slow
def test_compiled_experts_are_the_same(experts: Experts) -> None:
    x, offsets, _ = inputs(COUNTS["some"])
    found = []
    for forward in (experts.forward, torch.compile(experts.forward, backend="aot_eager", fullgraph=True)):
        experts.zero_grad()
        out = forward(x, offsets)
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in experts.parameters())])  # type: ignore[union-attr]
    torch._dynamo.reset()
    assert all(map(torch.equal, *found))
