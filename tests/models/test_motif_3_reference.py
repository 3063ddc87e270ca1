"""The reference of Motif-3 has the figures that are published, before anything is held to it."""

import math
from dataclasses import replace

import pytest
import torch
from models import motif_3_reference as reference
from models import motif_3_reference_losses as losses
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

RELEASED = reference.Motif3Config()
TINY = reference.Motif3Config(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_noise_heads=2,
    num_key_value_heads=2,
    head_dim=12,
    qk_rope_head_dim=4,
    v_head_dim=6,
    q_lora_rank=10,
    kv_lora_rank=8,
    intermediate_size=20,
    n_dense_first_layers=2,
    moe_intermediate_size=12,
    num_experts=6,
    experts_top_k=2,
    mhc_expansion_rate=3,
    sliding_window=4,
)


def random_tensors(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for name, shape in reference.parameter_shapes(config).items()
    }


def random_ids(*shape):
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_released_size():
    shapes = reference.parameter_shapes(RELEASED)
    assert len(shapes) == 2236
    assert sum(map(math.prod, shapes.values())) == 314_841_775_750
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(n for name, n in sizes.items() if name.startswith("model.layers.7.self_attn.")) == 66_586_112
    assert sum(n for name, n in sizes.items() if name.startswith("model.layers.7.mhc_ffn.")) == 409_627
    assert sum(n for name, n in sizes.items() if name.startswith("model.mtp_layers.")) == 251_151_876


def test_released_layers():
    full = [layer for layer in range(53) if RELEASED.is_full(layer)]
    assert full == list(range(0, 53, 4))
    assert len(full) == 14
    assert [layer for layer in range(53) if not RELEASED.is_moe(layer)] == [0, 1]


def test_rotary_and_scales():
    assert reference.yarn_correction_range(RELEASED) == (10, 23)
    plain, yarn = (reference.rotary_frequencies(RELEASED, full) for full in (False, True))
    assert yarn[:11] == plain[:11]
    assert yarn[23:] == pytest.approx([f / 64 for f in plain[23:]])
    assert reference.softmax_scale(RELEASED, full=False) == pytest.approx(0.07216878, abs=5e-9)
    assert reference.softmax_scale(RELEASED, full=True) == pytest.approx(0.14467963, abs=5e-9)


def test_yarn_is_transformers_own():
    yarn = {"rope_type": "yarn", "rope_theta": RELEASED.rope_theta, **RELEASED.rope_scaling}
    config = LlamaConfig(head_dim=64, max_position_embeddings=262144, rope_parameters=yarn)
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert reference.rotary_frequencies(RELEASED, full=True) == pytest.approx(frequencies.tolist(), rel=1e-6)


def test_polynorm_starts_at_0_583():
    weight, bias = torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    same = torch.full((5,), 2.0, dtype=torch.float64)  # each power of it is normed to 1
    y = reference.poly_norm(RELEASED, same, weight, bias)
    torch.testing.assert_close(y / 3, torch.full_like(y, 0.583), atol=5e-4, rtol=0)


def test_window_of_129_keys():
    config = replace(TINY, sliding_window=RELEASED.sliding_window)
    positions = torch.arange(135)[None]
    visible = reference.visible_keys(config, False, positions)
    assert visible.sum(-1)[0].tolist() == [min(t + 1, 129) for t in range(135)]

    x = torch.randn(1, 135, config.hidden_size, dtype=torch.float64, requires_grad=True)
    tensors = random_tensors(config)
    y = reference.attention(config, tensors, "model.layers.1.self_attn.", x, positions, visible, full=False)
    (gradient,) = torch.autograd.grad(y[0, -1].sum(), x)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == list(range(6, 135))


def test_causal():
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 8] = (ids[:, 8] + 1) % TINY.vocab_size
    tensors = random_tensors(TINY)
    with torch.no_grad():
        before, after = (reference.forward(TINY, tensors, i) for i in (ids, changed))
    assert torch.equal(before.logits[:, :8], after.logits[:, :8])
    assert (before.logits[:, 8:] != after.logits[:, 8:]).any(-1).all()
    (before_mtp,), (after_mtp,) = before.mtp_logits, after.mtp_logits
    assert torch.equal(before_mtp[:, :7], after_mtp[:, :7])
    assert (before_mtp[:, 7:] != after_mtp[:, 7:]).any(-1).all()


def identity_init(config, tensors):
    """§7's mhc_identity_init: all alphas 0, and the other tensors of mHC as they are."""
    n = config.mhc_expansion_rate
    values = {
        "alpha_pre": torch.zeros(1),
        "alpha_post": torch.zeros(1),
        "alpha_res": torch.zeros(1),
        "bias_pre": torch.full((n,), 1 / n, dtype=torch.float64).logit(),
        "bias_post": torch.zeros(n),
        "bias_res": -10 * (1 - torch.eye(n)),
    }
    return {name: values.get(name.split(".")[-1], tensor) for name, tensor in tensors.items()}


def test_mhc_starts_as_a_plain_residual():
    config = replace(TINY, mhc_h_post_alpha=1.0)
    tensors = identity_init(config, random_tensors(config))
    plain = replace(config, mhc_enabled=False)
    assert reference.parameter_shapes(plain).keys() == {name for name in tensors if ".mhc_" not in name}
    ids = random_ids(2, 10)
    with torch.no_grad():
        with_mhc, without = (reference.forward(c, tensors, ids) for c in (config, plain))
        released = reference.forward(replace(config, mhc_h_post_alpha=0.0), tensors, ids)
    torch.testing.assert_close(with_mhc.logits, without.logits, atol=1e-12, rtol=0)
    assert not torch.allclose(released.logits, without.logits, atol=1e-3)


def test_sinkhorn_is_doubly_stochastic():
    matrix = reference.sinkhorn(torch.randn(5, 4, 4, dtype=torch.float64).exp(), 200)
    for axis in (-1, -2):
        torch.testing.assert_close(matrix.sum(axis), torch.ones(5, 4, dtype=torch.float64))


def test_padding_and_packing_are_each_document_alone():
    tensors, (first, second) = random_tensors(TINY), (random_ids(1, 7), random_ids(1, 5))
    padded = torch.cat([torch.cat([torch.zeros(1, 2, dtype=torch.long), second], 1), first])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    documents = torch.tensor([[0] * 7 + [1] * 5])
    with torch.no_grad():
        one, other = (reference.forward(TINY, tensors, ids) for ids in (first, second))
        batch = reference.forward(TINY, tensors, padded, attention_mask=mask)
        packed = reference.forward(TINY, tensors, torch.cat([first, second], 1), document_ids=documents)
    for alone, padded_row, row in (
        (one.logits, batch.logits[1:], packed.logits[:, :7]),
        (other.logits, batch.logits[:1, 2:], packed.logits[:, 7:]),
        (one.mtp_logits[0], batch.mtp_logits[0][1:], packed.mtp_logits[0][:, :6]),
        (other.mtp_logits[0], batch.mtp_logits[0][:1, 2:], packed.mtp_logits[0][:, 7:]),
    ):
        torch.testing.assert_close(padded_row, alone, atol=1e-12, rtol=0)
        torch.testing.assert_close(row, alone, atol=1e-12, rtol=0)


VARIANTS = {
    "as released": {},
    "experts in every second layer": {"interleave_moe_layer_step": 2, "n_dense_first_layers": 1},
    "plain residual, tied": {"mhc_enabled": False, "tie_word_embeddings": True},
    "no shared expert, raw PolyNorm": {"num_shared_experts": 0, "polynorm_sigmoid_weight": False},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_tensor_has_a_gradient(variant):
    config = replace(TINY, **variant)
    tensors, ids = random_tensors(config), random_ids(2, 12)
    output = reference.forward(config, tensors, ids)
    (mtp_logits,) = output.mtp_logits
    loss = losses.cross_entropy(output.logits, losses.shifted_targets(ids, 1))
    loss = loss + losses.mtp_loss(mtp_logits, losses.shifted_targets(ids, 2))
    loss.backward()
    without = {name for name, t in tensors.items() if t.grad is None or not t.grad.isfinite().all() or not t.grad.any()}
    assert without == {name for name in tensors if name.endswith("expert_bias")}  # for selection alone


def test_routing():
    output = reference.forward(TINY, random_tensors(TINY), random_ids(2, 6))
    assert output.routing.keys() == {2, 3}
    for routing in output.routing.values():
        torch.testing.assert_close(routing.weights.sum(-1), torch.full((2, 6), 2.0, dtype=torch.float64))


def test_losses():
    scores = torch.full((2, 6, 3), 0.3, dtype=torch.float64)
    even = torch.arange(6).remainder(3).expand(2, 6)[..., None]
    assert losses.balance_loss(scores, even, 0.5).item() == pytest.approx(0.5)  # its least value is 1
    assert losses.ffn_magnitude_loss(torch.tensor([[[130.0, -131.0, 5.0]]]), 1.0).item() == pytest.approx(13 / 3)
    step = losses.expert_bias_step(torch.tensor([0, 2, 10]), 1e-3)
    torch.testing.assert_close(step, torch.tensor([2, 2, -4], dtype=torch.float64) * 1e-3 / 3)

    logits, labels = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    targets = losses.shifted_targets(labels, 1, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    assert targets[0].tolist() == [-100, *labels[0, 2:].tolist(), -100]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.cross_entropy(logits, targets), expected)


def test_values_that_nothing_describes_are_refused():
    assert reference.read_config({"hidden_size": 8, "bos_token_id": 1}).hidden_size == 8
    with pytest.raises(ValueError, match="score_func"):
        reference.read_config({"score_func": "softmax"})
