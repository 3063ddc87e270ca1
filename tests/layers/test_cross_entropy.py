"""Cross-entropy with the projection inside against F.cross_entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F

from helpers.agreement import assert_agrees
from helpers.memory import largest_allocation
from helpers.numerics import assert_error_rule
from motifarch.layers import IGNORE_INDEX, cross_entropy, linear_cross_entropy

TOKENS, WORDS, EMBED = 23, 31, 12


def inputs(dtype=torch.float64, ignored=True):
    hidden = torch.randn(TOKENS, EMBED, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, EMBED, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, WORDS, (TOKENS,))
    if ignored:
        targets[[0, 5, 6, 7, TOKENS - 1]] = IGNORE_INDEX
    return hidden, weight, targets


def cut(monkeypatch, tokens):
    """Chunks of so many tokens, and four tokens' logits at a time in float32."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_TOKENS", (tokens, tokens))
    monkeypatch.setattr(cross_entropy, "_FLOAT32_ELEMENTS", 4 * WORDS)


def plain(hidden, weight, targets, *, num_items=None, z_loss_weight=0.0):
    """The same from whole logits: (loss, z term)."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    divisor = (targets != IGNORE_INDEX).sum() if num_items is None else num_items
    z = z_loss_weight * logits.logsumexp(-1)[targets != IGNORE_INDEX].square().sum() / divisor
    return F.cross_entropy(logits, targets, reduction="sum") / divisor + z, z


@pytest.mark.parametrize("rows", [1, 2, 5, 23, 24, 1000], ids=lambda n: f"{n} rows a chunk")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items": 40},
        {"num_items": torch.tensor(40)},
        {"z_loss_weight": 0.1},
        {"num_items": 7.5, "z_loss_weight": 2.0},
    ],
    ids=["mean", "num_items", "tensor", "z", "both"],
)
def test_agrees_with_torch_in_float64(monkeypatch, rows, options):
    cut(monkeypatch, rows)
    hidden, weight, targets = inputs()
    ours = linear_cross_entropy(hidden, weight, targets, **options)
    loss, z = plain(hidden, weight, targets, **options)
    assert_agrees(ours.loss, loss, 1e-12)
    assert ours.z_loss.item() == pytest.approx(z.item(), rel=1e-12)
    assert not ours.z_loss.requires_grad
    assert ours.targets.item() == TOKENS - 5
    first = torch.autograd.grad(ours.loss, [hidden, weight])
    for a, b in zip(first, torch.autograd.grad(loss, [hidden, weight]), strict=True):
        assert_agrees(a, b, 1e-11)


def test_batches_have_the_shape_of_their_targets():
    hidden, weight, targets = inputs(ignored=False)
    hidden, targets = hidden[:20].reshape(4, 5, EMBED), targets[:20].reshape(4, 5)
    assert_agrees(
        linear_cross_entropy(hidden, weight, targets).loss, plain(hidden.flatten(0, 1), weight, targets.flatten())[0]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_may_be_scaled_before_backward(dtype):
    """Gradient accumulation and loss scaling multiply the loss; gradients follow, to the bit where
    the factor is a power of two.
    """
    hidden, weight, targets = inputs(dtype)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).loss, [hidden, weight])
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).loss * 2**16, [hidden, weight])
    for a, b in zip(scaled, once, strict=True):
        assert a.dtype == dtype
        assert a.any()
        torch.testing.assert_close(a, b * 2**16, rtol=0, atol=0)


def test_small_gradients_survive_half_precision_under_a_loss_scale():
    """A GradScaler's factor comes after the loss: what is below float16's numbers without it must
    be there with it.
    """
    hidden, weight, targets = inputs(torch.float16, ignored=False)
    scale, items = 2.0**16, 3e6  # each target's gradient is below 2^-24 before it is scaled
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(plain(*wide, targets, num_items=items)[0] * scale, wide)
    ours = linear_cross_entropy(hidden, weight, targets, num_items=items).loss
    plains = torch.autograd.grad(plain(hidden, weight, targets, num_items=items)[0] * scale, [hidden, weight])
    for result, p, e in zip(torch.autograd.grad(ours * scale, [hidden, weight]), plains, exact, strict=True):
        assert (result != 0).float().mean() > 0.9
        assert_error_rule(result, p, e, floor=2 * torch.finfo(torch.float16).eps * e.abs().max().item())


def test_only_what_requires_a_gradient_gets_one():
    hidden, weight, targets = inputs()
    _, exact = torch.autograd.grad(plain(hidden, weight, targets)[0], [hidden, weight])
    linear_cross_entropy(hidden.detach(), weight, targets).loss.backward()
    assert_agrees(weight.grad, exact, 1e-11)


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_without_targets_loss_and_gradients_are_zero(z):
    hidden, weight, targets = inputs()
    ours = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX), z_loss_weight=z)
    ours.loss.backward()
    assert ours.loss.item() == ours.z_loss.item() == ours.targets.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_ignored_tokens_change_nothing_even_if_they_are_not_finite():
    hidden, weight, targets = inputs()
    poisoned = hidden.detach().clone()
    poisoned[targets == IGNORE_INDEX] = torch.nan
    poisoned.requires_grad_()
    ours = linear_cross_entropy(poisoned, weight, targets, z_loss_weight=0.1)
    loss, _ = plain(hidden, weight, targets, z_loss_weight=0.1)
    assert_agrees(ours.loss, loss, 1e-12)
    assert_agrees(torch.autograd.grad(ours.loss, poisoned)[0], torch.autograd.grad(loss, hidden)[0], 1e-12)


def test_large_logits_stay_finite():
    hidden, weight, targets = inputs(torch.float32)
    ours = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert torch.isfinite(ours.loss)
    assert_agrees(ours.loss, plain(hidden * 1e4, weight, targets)[0])


@pytest.mark.parametrize("z", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_error_rule(monkeypatch, dtype, z):
    cut(monkeypatch, 6)
    hidden, weight, targets = inputs(dtype)
    ours = linear_cross_entropy(hidden, weight, targets, z_loss_weight=z).loss
    loss, _ = plain(hidden, weight, targets, z_loss_weight=z)
    hidden64, weight64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact, _ = plain(hidden64, weight64, targets, z_loss_weight=z)
    assert ours.dtype == torch.float32
    assert_error_rule(ours, loss, exact)
    results = torch.autograd.grad(ours, [hidden, weight])
    plains = torch.autograd.grad(loss, [hidden, weight])
    exacts = torch.autograd.grad(exact, [hidden64, weight64])
    for result, p, e in zip(results, plains, exacts, strict=True):
        assert_error_rule(result, p, e, floor=torch.finfo(dtype).eps * 2 * e.abs().max().item())


def test_logits_never_exist_whole():
    """A vocabulary of 20,000 and 2,000 tokens would be 160 MB of float32 logits."""
    tokens, words, embed = 2_000, 20_000, 16
    hidden, weight = torch.randn(tokens, embed, requires_grad=True), torch.randn(words, embed, requires_grad=True)
    targets = torch.randint(0, words, (tokens,))
    bound = 4 * 512 * words  # a chunk of the fewest tokens
    assert bound < 4 * tokens * words / 2
    assert largest_allocation(lambda: plain(hidden, weight, targets)) >= 4 * tokens * words
    assert largest_allocation(lambda: linear_cross_entropy(hidden, weight, targets).loss.backward()) <= bound


def test_evaluation_allocates_no_gradients():
    hidden, weight, targets = inputs(torch.float32)
    weight = torch.randn(200_000, EMBED, requires_grad=True)
    with torch.no_grad():
        largest = largest_allocation(lambda: linear_cross_entropy(hidden[:2], weight, targets[:2]))
    assert largest < weight.nbytes


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"targets has shape \(22,\)"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="the last dimension and the dtype must be equal"):
        linear_cross_entropy(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match="the last dimension and the dtype must be equal"):
        linear_cross_entropy(hidden, weight[:, 1:], targets)


class TestHeads:
    """The output projection as a module."""

    def test_a_module_is_called_and_its_hooks_count(self, monkeypatch):
        cut(monkeypatch, 6)
        hidden, weight, targets = inputs()
        head = torch.nn.Linear(EMBED, WORDS, bias=False, dtype=torch.float64)
        head.weight = torch.nn.Parameter(weight.detach().clone())
        head.register_forward_hook(lambda _, __, out: 0.5 * out)
        ours = linear_cross_entropy(hidden, head, targets, z_loss_weight=0.1).loss
        loss, _ = plain(hidden, 0.5 * weight, targets, z_loss_weight=0.1)
        assert_agrees(ours, loss, 1e-12)
        found = torch.autograd.grad(ours, [hidden, head.weight])
        for a, b in zip(found, torch.autograd.grad(loss, [hidden, weight]), strict=True):
            assert_agrees(a, b, 1e-11)

    def test_what_is_recomputed_has_the_same_dropout(self, monkeypatch):
        cut(monkeypatch, 6)
        hidden, weight, targets = inputs(ignored=False)

        def head(x):
            return F.linear(F.dropout(x, 0.5), weight)

        torch.manual_seed(3)
        ours = linear_cross_entropy(hidden, head, targets).loss
        torch.manual_seed(3)
        parts = zip(hidden.split(6), targets.split(6), strict=True)
        loss = sum(F.cross_entropy(head(h[None])[0], t, reduction="sum") for h, t in parts) / TOKENS
        assert_agrees(ours, loss, 1e-12)
        torch.rand(5)  # whatever happens before the backward pass
        for a, b in zip(*(torch.autograd.grad(value, [hidden, weight]) for value in (ours, loss)), strict=True):
            assert_agrees(a, b, 1e-11)

    @pytest.mark.parametrize("train", [True, False])
    def test_a_part_of_the_tokens_is_projected_at_a_time(self, train):
        tokens, words = 2400, 8192  # more than 64 MiB of logits in float32
        hidden, seen = torch.randn(tokens, EMBED, requires_grad=train), []
        head = torch.nn.Linear(EMBED, words)
        head.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
        linear_cross_entropy(hidden, head, torch.randint(0, words, (tokens,)))
        assert all(batch == 1 and n <= tokens // 4 and width == EMBED for batch, n, width in seen)
        assert sum(n for _, n, _ in seen) == tokens

    def test_few_logits_are_projected_once(self):
        tokens, words, calls = 2400, 40, []
        hidden, head = torch.randn(tokens, EMBED, requires_grad=True), torch.nn.Linear(EMBED, words)
        head.register_forward_hook(lambda *_: calls.append(1))
        linear_cross_entropy(hidden, head, torch.randint(0, words, (tokens,))).loss.backward()
        assert len(calls) == 1
