"""Layouts of ranks: what is left is filled in, what does not fit is named."""

import pytest

from helpers.models import tiny_config
from helpers.tiny import MOTIF_3
from motifarch.errors import UserError
from motifarch.parallel import Layout, check_context_parallel, check_expert_parallel, check_tensor_parallel


@pytest.mark.parametrize(
    ("layout", "ranks", "filled"),
    [
        (Layout(), 8, Layout(1, 8, 1, 1)),
        (Layout(replicate=-1, shard=8, tensor=2), 64, Layout(4, 8, 1, 2)),
        (Layout(replicate=2, shard=2, context=2, tensor=2), 16, Layout(2, 2, 2, 2)),
        (Layout(shard=1, context=-1), 4, Layout(1, 1, 4, 1)),
        (Layout(shard=-1, context=2, expert=4), 8, Layout(1, 4, 2, 1, expert=4)),
    ],
)
def test_fills_in(layout: Layout, ranks: int, filled: Layout) -> None:
    assert layout.resolve(ranks) == filled
    assert filled.ranks == ranks


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(replicate=-1), r"parallel\.replicate and parallel\.shard are -1; only one"),
        (Layout(tensor=0), r"parallel\.tensor is 0; it must be at least 1, or -1"),
        (Layout(tensor=3), r"parallel\.tensor 3: the product is 3, which does not divide the number of ranks, 8"),
        (
            Layout(shard=2, context=2),
            r"parallel\.shard 2, parallel\.context 2: the product is 4, which is not the number",
        ),
        (
            Layout(replicate=2, tensor=2, expert=4),
            r"parallel\.expert is 4, .* the 2 ranks of parallel\.shard 2 x parallel\.context 1 .* may be 1, 2",
        ),
    ],
)
def test_refuses_layouts(layout: Layout, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout.resolve(8)


def test_refuses_heads_that_ranks_cannot_share() -> None:
    config = tiny_config("gda", vocab_size=96, num_attention_heads=18, num_noise_heads=6, num_key_value_heads=12)
    check_tensor_parallel(config, 2)
    check_context_parallel(config, 24, 3, tensor=2)
    with pytest.raises(UserError, match=r"parallel\.tensor is 4, .* 6 noise heads .*; it may be 1, 2, 3, 6"):
        check_tensor_parallel(config, 4)
    with pytest.raises(UserError, match=r"parallel\.context is 2 \(times parallel\.tensor 2\), .* it may be 1, 3"):
        check_context_parallel(config, 24, 2, tensor=2)
    with pytest.raises(UserError, match=r"parallel\.context is 5, which does not divide sequences of 24 tokens"):
        check_context_parallel(config, 24, 5)
    # Windows ask nothing of heads, but a layer that sees all does.
    windows = {"num_attention_heads": 18, "num_noise_heads": 6, "num_key_value_heads": 12, "num_hidden_layers": 2}
    windows |= {"sliding_window": 7, "use_sliding_window": True}
    check_context_parallel(tiny_config("gda", **windows), 24, 4)
    mixed = tiny_config("gda", **windows, sliding_window_period=2)
    with pytest.raises(UserError, match=r"6 noise heads .* in the 1 layers without a window, .* be 1, 2, 3, 6"):
        check_context_parallel(mixed, 24, 4)
    with pytest.raises(UserError, match=r"3 key/value pairs \(model\.num_key_value_heads\); it may be 1, 3"):
        check_tensor_parallel(tiny_config("gda", num_attention_heads=18, num_noise_heads=6, num_key_value_heads=6), 2)
    narrow = {"num_attention_heads": 18, "num_noise_heads": 6, "num_key_value_heads": 3}
    with pytest.raises(UserError, match=r"3 key/value heads \(model\.num_key_value_heads\); it may be 1, 3"):
        check_tensor_parallel(tiny_config("gda narrow", **narrow), 2)
    check_tensor_parallel(tiny_config("gda narrow", **narrow), 3)  # 97 words: they need not divide
    check_tensor_parallel(tiny_config("gda", **MOTIF_3), 2)
    with pytest.raises(UserError, match=r"3 columns of shared experts \(model\.num_shared_experts x model\.moe_int"):
        check_tensor_parallel(tiny_config("gda", **MOTIF_3 | {"moe_intermediate_size": 3}), 2)
    with pytest.raises(UserError, match=r"parallel\.tensor is 4, .* 2 noise heads .*; it may be 1, 2"):
        check_tensor_parallel(tiny_config("gda", **MOTIF_3), 4)
    with pytest.raises(UserError, match=r"columns of model\.intermediate_size; it may be 1"):
        check_tensor_parallel(tiny_config("gda narrow", intermediate_size=47, **narrow), 3)


def test_refuses_experts_that_ranks_cannot_share() -> None:
    experts = {"num_experts": 6, "experts_top_k": 2, "moe_intermediate_size": 8}
    config = tiny_config("gda", **experts)
    check_expert_parallel(config, 3)
    with pytest.raises(UserError, match=r"parallel\.expert is 4, .* the 6 experts .*; it may be 1, 2, 3, 6"):
        check_expert_parallel(config, 4)
    dense = tiny_config("gda")
    check_expert_parallel(dense, 1)
    with pytest.raises(UserError, match=r"parallel\.expert is 2, but the model has no experts"):
        check_expert_parallel(dense, 2)
