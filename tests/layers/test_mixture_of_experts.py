"""Mixtures of experts: a loop over tokens and experts, DeepSeek-V3's in transformers, the traps."""

import math

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from helpers.agreement import assert_agrees, randomise
from motifarch.layers import MixtureOfExperts

SIZE, WIDTH, EXPERTS = 6, 5, 4
MOTIF = {"sigmoid_weight": True, "output_scale": 0.5, "bias_clamp": 0.5, "hidden_clamp": 1e6}


def mixture(*, top_k=2, dtype=torch.float64, bias=(0.3, -0.2, 0.1, -0.4), **options):
    torch.manual_seed(1)
    options = {"num_experts": EXPERTS, "intermediate_size": WIDTH} | options
    moe = MixtureOfExperts(SIZE, top_k=top_k, dtype=dtype, **options)
    randomise(moe, std=0.5)
    moe.expert_bias.copy_(torch.tensor(bias))
    return moe


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, SIZE, dtype=dtype, requires_grad=True)


def plain_poly_norm(z, weight, bias, options):
    terms = [t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-6) for t in (z**3, z**2, z)]
    if options.get("sigmoid_weight"):
        weight = torch.sigmoid(weight)
    return options.get("output_scale", 1.0) * (sum(w * t for w, t in zip(weight, terms, strict=True)) + bias)


def plain_expert(moe, e, x, options):
    gate, up = (moe.experts.gate_up_proj[e] @ x).chunk(2)
    if moe.experts.act_fn is None:
        return moe.experts.down_proj[e] @ (silu(gate) * up)
    bias = moe.experts.act_fn.bias[e]
    if "bias_clamp" in options:
        bias = bias.clamp(-options["bias_clamp"], options["bias_clamp"])
    return moe.experts.down_proj[e] @ (plain_poly_norm(gate, moe.experts.act_fn.weight[e], bias, options) * up)


def plain_shared(moe, x, options):
    shared = moe.shared_experts
    if shared is None:
        return 0
    gate, up = shared.gate_proj.weight @ x, shared.up_proj.weight @ x
    if moe.experts.act_fn is None:
        return shared.down_proj.weight @ (silu(gate) * up)
    return shared.down_proj.weight @ (plain_poly_norm(gate, shared.act_fn.weight, shared.act_fn.bias, options) * up)


def plain_mixture(moe, x, options):
    """A token and an expert at a time."""
    out = []
    for token in x.reshape(-1, SIZE):
        scores = torch.sigmoid(moe.router.gate.weight @ token)
        best = sorted(range(moe.num_experts), key=lambda e: -(scores[e] + moe.expert_bias[e]).item())[: moe.top_k]
        total = sum(scores[e] for e in best) + 1e-20
        routed = sum(2 * scores[e] / total * plain_expert(moe, e, token, options) for e in best)
        out.append(routed + plain_shared(moe, token, options))
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("options", [MOTIF, {}, {"activation": "silu"}], ids=["motif", "poly_norm", "silu"])
def test_outputs_and_gradients_are_those_of_a_loop(options, shared):
    moe, x = mixture(num_shared_experts=shared, route_scale=2.0, **options), tokens(2, 4)
    with torch.no_grad():
        if moe.experts.act_fn is not None:
            moe.experts.act_fn.bias[:, 0] = torch.tensor([0.9, 0.1, -0.2, 0.3])  # one past the clamp
    out, plain = moe(x).hidden_states, plain_mixture(moe, x, options)
    assert_agrees(out, plain, 1e-10)
    leaves, grad = {"x": x, **dict(moe.named_parameters())}, torch.randn_like(out)
    ours = torch.autograd.grad(out, list(leaves.values()), grad)
    theirs = torch.autograd.grad(plain, list(leaves.values()), grad)
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        assert_agrees(a, b, 1e-10, name)
    if options is MOTIF:
        assert ours[list(leaves).index("experts.act_fn.bias")][0] == 0  # as torch.clamp's


@pytest.mark.parametrize("shared", [1, 2])
def test_it_is_deepseeks_in_transformers(shared):
    config = DeepseekV3Config(
        hidden_size=SIZE,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        n_shared_experts=shared,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        hidden_act="silu",
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    ours = mixture(num_shared_experts=shared, route_scale=2.5, activation="silu", dtype=torch.float32)
    names = {"router.gate.weight": "gate.weight", "expert_bias": "gate.e_score_correction_bias"}
    theirs.load_state_dict({names.get(name, name): value for name, value in ours.state_dict().items()})
    x = tokens(3, 7, dtype=torch.float32)
    out, other = ours(x).hidden_states, theirs(x)
    assert_agrees(out, other, 1e-5)
    grad = torch.randn_like(out)
    (a,), (b,) = (torch.autograd.grad(o, x, grad) for o in (out, other))
    assert_agrees(a, b, 1e-5)


def test_the_bias_selects_and_no_more():
    moe, x = mixture(bias=(0, 0, 0, 0), num_shared_experts=0), tokens(5)
    before = moe(x).hidden_states
    moe.expert_bias.fill_(7.0)  # the same for all experts
    assert torch.equal(moe(x).hidden_states, before)
    moe.expert_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    out = moe(x).hidden_states
    assert_agrees(out, plain_mixture(moe, x, {}) / 2, 1e-12)
    assert (out - before).abs().max() > 0.01
    assert not moe.expert_bias.requires_grad


def test_a_bias_past_the_clamp_counts_as_the_clamp():
    moe, x = mixture(**MOTIF), tokens(5)
    with torch.no_grad():
        moe.experts.act_fn.bias.fill_(0.9)
    out = moe(x).hidden_states
    with torch.no_grad():
        moe.experts.act_fn.bias.fill_(0.5)
    assert torch.equal(moe(x).hidden_states, out)


@pytest.mark.parametrize(
    ("top_k", "bias"), [(1, (9, 0, 0, 0)), (2, (0, -9, 0, 0)), (4, (0.5, 0, 0, 0))], ids=["to one", "one idle", "all"]
)
def test_extreme_loads(top_k, bias):
    moe, x = mixture(top_k=top_k, bias=bias, route_scale=2.0), tokens(7)
    out = moe(x).hidden_states
    assert_agrees(out, plain_mixture(moe, x, {}), 1e-12)
    out.sum().backward()
    idle = {(9, 0, 0, 0): [1, 2, 3], (0, -9, 0, 0): [1]}.get(bias, [])
    for p in (moe.experts.gate_up_proj, moe.experts.down_proj, moe.experts.act_fn.weight):
        assert (p.grad.flatten(1).abs().amax(dim=1) == 0).nonzero().flatten().tolist() == idle
    assert moe.tokens_per_expert.sum() == 7 * top_k
    assert (moe.tokens_per_expert == 0).nonzero().flatten().tolist() == idle


def test_padding_enters_nothing():
    moe = mixture(balance_loss_coeff=0.1, magnitude_loss_coeff=0.1, magnitude_threshold=0.5, bias=(0, 0, 0, 0))
    moe.record_expert_outputs = True
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    x = tokens(2, 5)

    def run(x, padding=None):
        moe.zero_grad()
        moe.reset_buffers()
        out, losses = moe(x, padding=padding)
        (out.square().sum() + losses[:, -1].sum()).backward()
        grads = [p.grad.clone() for p in moe.parameters()]
        return out, losses, grads, moe.tokens_per_expert.clone(), moe.statistics()

    with torch.no_grad():
        x[~real] = torch.nan
    out, losses, grads, counts, statistics = run(x, real)
    assert (out[~real] == 0).all()
    assert (x.grad[~real] == 0).all()
    alone = [run(x.detach()[i : i + 1, 2 * i :]) for i in range(2)]
    assert_agrees(torch.cat([out[0], out[1, 2:]]), torch.cat([alone[0][0][0], alone[1][0][0]]), 1e-12)
    assert_agrees(losses[real], torch.cat([alone[0][1][0], alone[1][1][0]]), 1e-12)
    for grad, *others in zip(grads, *(a[2] for a in alone), strict=True):
        assert_agrees(grad, sum(others), 1e-12)
    assert torch.equal(counts, alone[0][3] + alone[1][3])
    both = run(torch.cat([x.detach()[0], x.detach()[1, 2:]]))
    for ours, theirs in zip(statistics, both[4], strict=True):
        assert_agrees(ours, theirs, 1e-6)


def test_losses_are_those_of_each_sequence():
    moe = mixture(balance_loss_coeff=0.1, magnitude_loss_coeff=0.2, magnitude_threshold=0.5)
    x = tokens(2, 5)
    out, losses = moe(x)
    assert losses.shape == (2, 5, 2)
    assert (losses == losses[:, :1]).all()  # a sequence's tokens have the same
    losses = losses[:, 0]
    for row, expected in zip(x, losses, strict=True):
        scores = torch.sigmoid(row @ moe.router.gate.weight.T)
        chosen = (scores + moe.expert_bias).topk(2).indices.flatten().tolist()
        frequency = [EXPERTS / (2 * 5) * chosen.count(e) for e in range(EXPERTS)]
        share = (scores / scores.sum(-1, keepdim=True)).mean(0)
        assert_agrees(expected[0], 0.1 * sum(f * p for f, p in zip(frequency, share, strict=True)), 1e-12)
    magnitude = 0.2 * (out.abs() - 0.5).relu().square().mean(dim=(1, 2))
    assert_agrees(losses[:, 1], magnitude, 1e-12)
    assert moe.eval()(x).losses is None
    assert mixture()(x).losses.tolist() == [[[0, 0]] * 5] * 2


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_sequences_of_a_row_have_losses_of_their_own(padded):
    moe = mixture(balance_loss_coeff=0.1, magnitude_loss_coeff=0.2, magnitude_threshold=0.5)
    x, weights = tokens(3, 5), torch.randn(3, 5, 2, dtype=torch.float64)
    real = torch.rand(3, 5) < 0.6 if padded else torch.ones(3, 5, dtype=torch.bool)

    def run(*shape):
        out, losses = moe(x.view(*shape, SIZE), padding=real.view(shape) if padded else None)
        gradients = torch.autograd.grad((losses.view(3, 5, 2) * weights).sum(), [x, moe.router.gate.weight])
        return out.view(3, 5, SIZE), losses.view(3, 5, 2), *gradients

    apart, together = run(3, 5), run(1, 15)
    assert (together[1] - apart[1]).abs().max() > 1e-3
    moe.sequence_length = 5
    for found, expected in zip(run(1, 15), apart, strict=True):
        assert_agrees(found, expected, 1e-12)
    moe.sequence_length = 20  # the row is shorter
    for found, expected in zip(run(1, 15), together, strict=True):
        assert_agrees(found, expected, 1e-12)


def test_the_last_sequence_of_a_row_may_be_shorter():
    moe, x = mixture(balance_loss_coeff=0.1), tokens(2, 11)
    expected = torch.cat([moe(part).losses for part in x.split(4, dim=1)], dim=1)
    moe.sequence_length = 4
    assert_agrees(moe(x).losses, expected, 1e-12)


def test_noise_is_for_training_alone_and_can_be_drawn_again():
    moe, x = mixture(), tokens(9)
    still = moe(x).hidden_states
    moe.router_noise = 3.0
    torch.manual_seed(3)
    noisy = moe(x).hidden_states
    torch.manual_seed(3)
    assert torch.equal(moe(x).hidden_states, noisy)
    assert (noisy - still).abs().max() > 0.01
    assert torch.equal(moe.eval()(x).hidden_states, still)


def test_statistics():
    moe, x = mixture(bias=(9, 9, 0, 0)), tokens(8)
    moe.record_expert_outputs = True
    moe(x)
    moe(x)  # as where activations are recomputed: no mean changes
    entropy, routed, shared, outputs, peak = moe.statistics()
    share = torch.sigmoid(x @ moe.router.gate.weight.T)
    share = share / share.sum(-1, keepdim=True)
    assert math.isclose(entropy, -(share * share.log()).sum(-1).mean().item(), rel_tol=1e-5)
    whole = moe.shared_experts(x)
    assert math.isclose(shared, whole.square().mean().sqrt().item(), rel_tol=1e-5)
    assert math.isclose(routed, (moe(x).hidden_states - whole).square().mean().sqrt().item(), rel_tol=1e-5)
    mean = torch.stack([plain_expert(moe, 0, t, {}) for t in x]).mean(0)
    assert_agrees(outputs[0].double(), mean, 1e-5)
    assert outputs[2].tolist() == [0] * SIZE
    y = moe(x).hidden_states
    assert math.isclose(peak, (y.abs().amax(-1) / y.square().mean(-1).sqrt()).mean().item(), rel_tol=1e-5)
    assert moe.tokens_per_expert.tolist() == [32, 32, 0, 0]
    moe.reset_statistics()
    assert moe.statistics().expert_outputs is None


def test_bfloat16_is_near_and_buffers_stay_float32():
    moe, x = mixture(**MOTIF), tokens(2, 16)
    exact = moe(x).hidden_states
    assert moe.expert_bias.dtype == torch.float32
    half = moe.bfloat16()
    assert half.expert_bias.tolist() == torch.tensor([0.3, -0.2, 0.1, -0.4]).tolist()
    assert half.tokens_per_expert.dtype == torch.float32
    out = half(x.bfloat16()).hidden_states
    assert out.dtype == torch.bfloat16
    same = (out.double() - exact).abs().amax(-1) < 0.05 * exact.abs().max()
    assert same.double().mean() > 0.9  # a rounded token may go elsewhere
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = half.router(x.bfloat16().flatten(0, 1)).scores
    logits = x.bfloat16().float().flatten(0, 1) @ half.router.gate.weight.float().T
    assert_agrees(scores, logits.sigmoid(), 1e-6)


def test_softmax_scores_without_norm():
    moe, x = mixture(score_func="softmax", route_norm=False, num_shared_experts=0, bias=(0, 0, 0, 0)), tokens(5)
    scores = linear(x, moe.router.gate.weight).softmax(-1)
    routing = moe.router(x)
    assert_agrees(routing.weights, scores.topk(2).values, 1e-12)


def test_names_are_the_released_models_and_hooks_see_every_module():
    moe = MixtureOfExperts(SIZE, num_experts=EXPERTS, top_k=2, intermediate_size=WIDTH)
    assert {name: tuple(value.shape) for name, value in moe.state_dict().items()} == {
        "expert_bias": (4,),
        "router.gate.weight": (4, 6),
        "experts.gate_up_proj": (4, 10, 6),
        "experts.down_proj": (4, 6, 5),
        "experts.act_fn.weight": (4, 3),
        "experts.act_fn.bias": (4, 1),
        "shared_experts.gate_proj.weight": (5, 6),
        "shared_experts.up_proj.weight": (5, 6),
        "shared_experts.down_proj.weight": (6, 5),
        "shared_experts.act_fn.weight": (3,),
        "shared_experts.act_fn.bias": (1,),
    }
    called = set()
    for name, module in moe.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    moe(torch.randn(3, SIZE))
    assert called == {name for name, _ in moe.named_modules()}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 5}, "top_k is 5 .*1 to 4"),
        ({"top_k": 0}, "top_k is 0 .*1 to 4"),
        ({"activation": "gelu"}, "activation is 'gelu'.*'poly_norm', 'silu'"),
        ({"score_func": "tanh"}, "score_func is 'tanh'.*'sigmoid', 'softmax'"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        mixture(**options)


def test_on_the_meta_device_there_are_shapes():
    moe = MixtureOfExperts(SIZE, num_experts=EXPERTS, top_k=2, intermediate_size=WIDTH, device="meta")
    assert moe(torch.empty(2, 3, SIZE, device="meta")).hidden_states.shape == (2, 3, SIZE)


def test_padding_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"padding is .*\(2, 3\)"):
        mixture()(tokens(2, 3), padding=torch.ones(2, 4, dtype=torch.bool))
