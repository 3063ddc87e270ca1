"""Routing against sorting and adding by index: ties, NaN, loads, what lies outside, gradients."""

import functools

import pytest
import torch
from torch import Tensor

from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import (
    combine_rows,
    dispatch_rows,
    expert_weights,
    reference_routing,
    select_experts,
    sort_by_expert,
    tuning,
)

SCORES = ["sigmoid", "softmax"]


def choices(tokens: int, experts: int, slots: int, *, load: str = "even") -> Tensor:
    """(T, k) different experts of each token."""
    preference = torch.rand(tokens, experts)
    if load == "one":
        preference[:, :slots] += 1
    selected = preference.topk(slots).indices
    return selected.masked_fill((torch.rand(tokens, 1) < 0.3), experts) if load == "padded" else selected


def loop(rows: Tensor, weights: Tensor, selected: Tensor, experts: int) -> Tensor:
    """`combine_rows` as one expert after the other."""
    out, start = rows.new_zeros(len(selected), rows.shape[1]), 0
    for e in range(experts):
        token, slot = (selected == e).nonzero().unbind(1)
        out.index_add_(0, token, rows[start : start + len(token)] * weights[token, slot, None].to(rows.dtype))
        start += len(token)
    return out


# --- Selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score_func", SCORES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(33, 384, 8), (5, 7, 1), (3, 4, 4), (2, 1, 1)])
def test_the_best_are_topks(tokens, experts, top_k, score_func, dtype, path):
    logits, bias = torch.randn(tokens, experts, dtype=dtype), torch.randn(experts) / 4
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    logits, bias = logits.to(path.device), bias.to(path.device)
    assert torch.equal(
        select_experts(logits, bias, top_k, score_func=score_func).cpu(), (scores + bias.cpu()).topk(top_k).indices
    )
    assert torch.equal(select_experts(logits, None, top_k, score_func=score_func).cpu(), scores.topk(top_k).indices)


def test_of_equals_the_first_is_taken_and_nan_before_numbers(path):
    logits = torch.zeros(4, 6, device=path.device)
    logits[0, 4], logits[1, [2, 5]] = 1, torch.nan
    logits[2] = torch.nan
    logits[3, 2:] = torch.tensor([-torch.inf, torch.inf, torch.inf, 0.0])
    expected = [[4, 0, 1], [2, 5, 0], [0, 1, 2], [3, 4, 0]]
    assert select_experts(logits, None, 3).tolist() == expected
    bias = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, 0.0], device=path.device)
    assert select_experts(logits, bias, 3).tolist() == expected
    assert reference_routing.select_experts(logits, bias, 3, False).tolist() == expected


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("score_func", SCORES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(33, 384, 8), (5, 7, 1)])
def test_weights_and_their_gradients(tokens, experts, top_k, score_func, normalise, path):
    logits, selected = torch.randn(tokens, experts), choices(tokens, experts, top_k)
    grads = torch.randn(tokens, top_k), torch.randn(tokens, experts)
    options = score_func == "softmax", normalise, 2.5

    def run(function, dtype):
        (own,) = leaves(logits.to(path.device), dtype=dtype)
        weights, scores = function(own, selected.to(path.device))
        outs = [weights, scores]
        found = [torch.autograd.grad(outs[i], own, grads[i].to(own), retain_graph=True)[0] for i in (0, 1)]
        together = torch.autograd.grad(outs, own, [g.to(own) for g in grads])
        return [*outs, *found, *together]

    ours = functools.partial(expert_weights, score_func=score_func, normalise=normalise, scale=2.5)

    def plain(logits, selected):
        return reference_routing.expert_weights(logits, selected, *options)

    results = [run(ours, None), run(plain, None), run(plain, torch.float64)]
    for actual, formula, exact in zip(*results, strict=True):
        assert actual.dtype == torch.float32
        assert_error_rule(actual, formula, exact)


# --- Rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["even", "one", "padded"])
@pytest.mark.parametrize(("tokens", "experts", "slots"), [(40, 384, 8), (41, 5, 1), (7, 3, 3), (0, 4, 2)])
def test_the_sort_is_stable_and_its_rows_come_back(tokens, experts, slots, load, path):
    selected = choices(tokens, experts, slots, load=load)
    places, offsets = (t.cpu() for t in sort_by_expert(selected.to(path.device), experts))
    order = selected.flatten().argsort(stable=True)
    assert torch.equal(places.flatten(), order.argsort())
    counts = torch.bincount(selected.flatten(), minlength=experts + 1)[:experts]
    assert offsets.dtype == torch.int32
    assert torch.equal(offsets.long(), counts.cumsum(0))

    inputs = leaves(torch.randn(tokens, 9, dtype=torch.float64), torch.rand(tokens, slots, dtype=torch.float64))
    x, weights = (t.to(path.device) for t in inputs)
    at = places.to(path.device), offsets.to(path.device)
    rows = dispatch_rows(x, *at)
    expected = inputs[0].detach()[order // slots]
    expected[offsets[-1] :] = 0
    assert torch.equal(rows.cpu(), expected)
    made = rows.square()
    made = torch.cat((made[: offsets[-1]], torch.full_like(made[offsets[-1] :], torch.nan)))  # of no expert
    plain = loop(inputs[0][order // slots].square(), inputs[1], selected, experts)
    grad = torch.randn(tokens, 9, dtype=torch.float64)
    ours = combine_rows(made, weights, *at)
    torch.testing.assert_close(ours.cpu(), plain)
    for a, b in zip(gradients(ours, inputs, grad.to(path.device)), gradients(plain, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_parts_of_many_slots_are_walked_through(path, monkeypatch):
    if path.name == "interpreter":
        monkeypatch.setattr("motif_kernels.impl.triton.expert_rows._PARTS", 3)
    selected = choices(50, 7, 3).to(path.device)
    with tuning.overriding(sort_by_expert={"tile": 64, "num_warps": 1}):
        found = sort_by_expert(selected, 7)
    for a, b in zip(found, reference_routing.sort_by_expert(selected, 7), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 300])
def test_error_rule(dtype, width, path):
    path.require(dtype)
    selected = choices(24, 6, 4, load="padded")
    places, offsets = sort_by_expert(selected.to(path.device), 6)
    x, weights = torch.randn(24, width).to(dtype), torch.rand(24, 4)
    grads = torch.randn(24, width), torch.randn(24, width).to(dtype)

    def run(dispatch, combine, precision):
        inputs = leaves(x.to(path.device), weights.to(path.device), dtype=precision)
        rows = dispatch(inputs[0])
        out, total = combine(rows * 2, inputs[1]), combine(dispatch(inputs[0]), None)
        assert out.dtype == torch.promote_types(rows.dtype, weights.dtype)
        assert total.dtype == rows.dtype
        return [
            out,
            total,
            *gradients(out, inputs, grads[0].to(path.device)),
            *gradients(total, inputs[:1], grads[1].to(path.device)),
        ]

    def plain_dispatch(x):
        return reference_routing.dispatch(x, places, offsets, places.numel())

    def plain_combine(rows, weights):
        return reference_routing.combine(rows, weights, places, offsets)

    ours = run(lambda x: dispatch_rows(x, places, offsets), lambda r, w: combine_rows(r, w, places, offsets), None)
    results = [ours, run(plain_dispatch, plain_combine, None), run(plain_dispatch, plain_combine, torch.float64)]
    for actual, plain, exact in zip(*results, strict=True):
        assert_error_rule(actual, plain, exact)


def test_rows_of_no_expert_may_be_left_out(path):
    selected = choices(30, 5, 2, load="padded").to(path.device)
    places, offsets = sort_by_expert(selected, 5)
    x, weights = (t.to(path.device) for t in leaves(torch.randn(30, 7), torch.rand(30, 2)))
    end = int(offsets[-1])
    assert end < 60
    results = []
    for count in (60, end):
        rows = dispatch_rows(x, places, offsets, rows=count)
        assert len(rows) == count
        out = combine_rows(rows.exp(), weights, places, offsets)
        results.append(
            [out, *gradients(out + combine_rows(rows, None, places, offsets), [x, weights], torch.ones(30, 7))]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    none = torch.full_like(selected, 5)
    places, offsets = sort_by_expert(none, 5)
    rows = dispatch_rows(x, places, offsets, rows=0)
    out = combine_rows(rows, weights, places, offsets)
    assert not out.any()
    assert all(not g.any() for g in gradients(out, [x, weights], torch.ones(30, 7)))


def test_numbers_are_the_same_every_time(path):
    logits, x = torch.randn(60, 20, device=path.device), torch.randn(60, 33, device=path.device, requires_grad=True)

    def run():
        own = logits.clone().requires_grad_()
        selected = select_experts(own, None, 3)
        weights, scores = expert_weights(own, selected)
        places, offsets = sort_by_expert(selected, 20)
        out = combine_rows(dispatch_rows(x, places, offsets).exp(), weights, places, offsets)
        return [out, places, *torch.autograd.grad((out.sin().sum(), scores.sin().sum()), (x, own))]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_rows_more_than_two_to_the_31_elements_apart(path):
    buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=path.device)  # pages nobody touches cost nothing
    selected = torch.tensor([[1], [0]], device=path.device)
    places, offsets = sort_by_expert(selected, 2)
    weights = torch.rand(2, 1, device=path.device)
    far = buffer.as_strided((2, 11), (2**31 + 16, 1))
    far.copy_(torch.linspace(-1, 1, 22).view(2, 11))
    results = []
    for t in (far, far.clone()):
        rows, own = t.detach().requires_grad_(), weights.clone().requires_grad_()
        out = combine_rows(rows, own, places, offsets)
        grads = torch.autograd.grad(out, (rows, own), t.float())
        results.append([dispatch_rows(t, places, offsets), out, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_strided_inputs(path):
    logits = torch.randn(9, 20, device=path.device).t()[:, :5]
    assert torch.equal(select_experts(logits, None, 2), select_experts(logits.contiguous(), None, 2))
    selected = select_experts(logits, None, 2)
    for a, b in zip(expert_weights(logits, selected), expert_weights(logits.contiguous(), selected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # a sigmoid by vectors rounds otherwise
    wide = selected.repeat_interleave(2, dim=1)[:, ::2]
    places, offsets = sort_by_expert(wide, 5)
    assert torch.equal(places, sort_by_expert(selected, 5)[0])
    x = torch.randn(12, 20, device=path.device).t()
    rows = dispatch_rows(x, places, offsets)
    assert torch.equal(rows, dispatch_rows(x.contiguous(), places, offsets))
    weights = torch.rand(2, 20, device=path.device).t()
    expected = combine_rows(rows, weights.contiguous(), places.contiguous(), offsets)
    assert torch.equal(combine_rows(rows.t().contiguous().t(), weights, places.t().contiguous().t(), offsets), expected)


# --- As operators ---------------------------------------------------------------------------------


def test_gradcheck():
    logits, x = leaves(*torch.randn(2, 6, 5, dtype=torch.float64))

    def layer(logits, x):
        selected = select_experts(logits, None, 2)
        weights, scores = expert_weights(logits, selected, scale=1.5)
        places, offsets = sort_by_expert(selected, 5)
        return combine_rows(dispatch_rows(x, places, offsets).sin(), weights, places, offsets), scores

    assert torch.autograd.gradcheck(layer, (logits, x))


def test_opcheck():
    logits, x = leaves(torch.randn(6, 5), torch.randn(6, 4))
    bias, selected = torch.randn(5), select_experts(logits, None, 2)
    places, offsets = sort_by_expert(selected.masked_fill(torch.arange(6)[:, None] == 2, 5), 5)
    rows, weights = leaves(torch.randn(12, 4), torch.rand(6, 2))
    check = torch.library.opcheck
    check(torch.ops.motif.select_experts, (logits.detach(), bias, 2, False))
    check(torch.ops.motif.expert_weights, (logits, selected, True, True, 2.0))
    check(
        torch.ops.motif.expert_weights_backward,
        (weights.detach(), None, logits.detach().sigmoid(), selected, False, True, 2.0),
    )
    check(torch.ops.motif.sort_by_expert, (selected, 5))
    check(torch.ops.motif.dispatch_rows, (x, places, offsets, 12))
    check(torch.ops.motif.combine_rows, (rows, weights, places, offsets))
    check(torch.ops.motif.combine_rows, (rows, None, places, offsets))
    check(torch.ops.motif.combine_rows_backward, (x.detach(), rows.detach(), weights.detach(), places, offsets))


def test_a_compiled_graph_is_whole():
    def layer(logits, x):
        selected = select_experts(logits, None, 2)
        weights, scores = expert_weights(logits, selected)
        places, offsets = sort_by_expert(selected, 5)
        return combine_rows(dispatch_rows(x, places, offsets).sin(), weights, places, offsets).sum() + scores.sum()

    inputs = leaves(torch.randn(6, 5), torch.randn(6, 4))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (layer, compiled)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, s, p, o: select_experts(x, None, 6), ValueError, "top_k is 6; it must be 1 to 5"),
        (lambda x, s, p, o: select_experts(x, None, 2, score_func="tanh"), ValueError, "'tanh'.*'sigmoid', 'softmax'"),
        (lambda x, s, p, o: select_experts(x, x[0, :3], 2), ValueError, r"bias has shape \(3,\).*\(5,\)"),
        (lambda x, s, p, o: expert_weights(x, s.int()), TypeError, "selected is torch.int32.*int64"),
        (lambda x, s, p, o: expert_weights(x, s[:3]), ValueError, r"selected has shape \(3, 2\)"),
        (lambda x, s, p, o: sort_by_expert(s, 0), ValueError, "num_experts is 0"),
        (lambda x, s, p, o: dispatch_rows(x[:3], p, o), ValueError, r"x has shape \(3, 5\).*\(6, 2\)"),
        (lambda x, s, p, o: dispatch_rows(x, p, o, rows=11), ValueError, r"11 rows.*offsets\[-1\], 12"),
        (lambda x, s, p, o: combine_rows(x, None, p, o), ValueError, r"6 rows.*offsets\[-1\], 12"),
        (lambda x, s, p, o: combine_rows(x, x, p, o), ValueError, r"weights \(6, 5\)"),
        (lambda x, s, p, o: combine_rows(x, None, p, o.long()), TypeError, "offsets torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, match):
    selected = torch.tensor([[0, 1]] * 6)
    with pytest.raises(error, match=match):
        call(torch.zeros(6, 5), selected, *sort_by_expert(selected, 5))
