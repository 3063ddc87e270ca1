"""Masks, as torch's scaled_dot_product_attention reads them, and contexts, against the formulas."""

import pytest
import torch
from transformers import DynamicCache

from helpers.agreement import assert_agrees, randomise
from helpers.plain_layers import as_bias, plain_layer
from motifarch.layers import (
    DifferentialAttention,
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    PaddingMask,
    RotaryEmbedding,
    SoftmaxAttention,
)

EMBED, ROWS, TOKENS, KEYS = 24, 2, 7, 5
LAYERS = {
    "gda": (GroupedDifferentialAttention, {"num_heads": 8, "ratio": 3, "head_dim": 6}),
    "gda unpaired": (GroupedDifferentialAttention, {"num_heads": 8, "ratio": 3, "head_dim": 6, "paired_kv": False}),
    "v1": (DifferentialAttention, {"num_heads": 8, "head_dim": 6, "num_kv_heads": 4}),
    "v2": (DifferentialAttentionV2, {"num_heads": 8, "ratio": 3, "head_dim": 6}),
    "softmax": (SoftmaxAttention, {"num_heads": 8, "num_kv_heads": 4, "head_dim": 6}),
}
BACKENDS = ["auto", "reference"]


def make(kind, **options):
    layer_class, heads = LAYERS[kind]
    layer = layer_class(EMBED, **heads, bias=True, dtype=torch.float64, **options)
    randomise(layer)
    return layer.eval()


def tokens(length, width=EMBED, rows=ROWS):
    return torch.randn(rows, length, width, dtype=torch.float64)


def random_mask(kind, shape):
    seen = torch.rand(shape) > 0.4
    seen[..., 0] = True  # no row without keys, of which the formula would give NaN
    return seen if kind == "bool" else torch.randn(shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(ROWS, 8, TOKENS, TOKENS), (ROWS, 1, 1, TOKENS), (TOKENS, TOKENS)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_mask_is_added_to_the_logits(layer, shape, kind, backend):
    layer, x, mask = make(layer, backend=backend), tokens(TOKENS), random_mask(kind, shape)
    expected = plain_layer(layer, x, bias=as_bias(mask).expand(ROWS, 8, TOKENS, TOKENS))
    assert_agrees(layer(x, attn_mask=mask), expected, 1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_a_learned_bias_are_the_formula_s(layer):
    layer, x = make(layer), tokens(TOKENS).requires_grad_()
    bias = torch.randn(8, TOKENS, TOKENS, dtype=torch.float64, requires_grad=True)
    inputs = [x, bias, *layer.parameters()]
    ours = torch.autograd.grad(layer(x, attn_mask=bias[None]).square().sum(), inputs)
    plain = plain_layer(layer, x, bias=bias.expand(ROWS, -1, -1, -1)).square().sum()
    for mine, expected in zip(ours, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_token_that_sees_nothing_gets_nothing(kind, backend):
    layer, x = make("v2", backend=backend), tokens(TOKENS).requires_grad_()
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    seen[2] = False
    mask = seen if kind == "bool" else torch.zeros(TOKENS, TOKENS).masked_fill(~seen, -torch.inf)
    out = layer(x, attn_mask=mask)
    assert torch.equal(out[:, 2], layer.o_proj.bias.expand(ROWS, -1))
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.isfinite().all()


def test_a_mask_stands_in_place_of_causality():
    layer, x = make("gda"), tokens(TOKENS)
    everything = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    assert_agrees(layer(x, attn_mask=everything.tril()), layer(x), 1e-12)
    assert_agrees(layer(x, attn_mask=everything), plain_layer(layer, x), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_counts_cached_keys(backend):
    layer, x = make("gda", backend=backend, layer_idx=0), tokens(TOKENS)
    mask = random_mask("bool", (TOKENS, TOKENS)).tril() | torch.eye(TOKENS, dtype=torch.bool)
    cache = DynamicCache()
    with torch.no_grad():
        parts = [layer(x[:, :4], attn_mask=mask[:4, :4], past_key_values=cache)]
        parts.append(layer(x[:, 4:], attn_mask=mask[4:], past_key_values=cache))
    assert_agrees(torch.cat(parts, dim=1), layer(x, attn_mask=mask), 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.long)}, "attn_mask is of torch.int64"),
        ({"attn_mask": torch.ones(ROWS, TOKENS, TOKENS, dtype=torch.bool)}, "8 heads, 7 tokens, 7 keys"),
        ({"attn_mask": torch.ones(ROWS, 6, TOKENS, TOKENS, dtype=torch.bool)}, "8 heads, 7 tokens, 7 keys"),
        ({"attn_mask": torch.ones(TOKENS, TOKENS), "padding": torch.ones(ROWS, TOKENS)}, "attn_mask and padding"),
        ({"attn_mask": torch.ones(TOKENS, TOKENS), "cu_seqlens": torch.tensor([0, 7])}, "attn_mask and cu_seqlens"),
    ],
)
def test_masks_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make("gda")(tokens(TOKENS), **arguments)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"])
@pytest.mark.parametrize("keys", [KEYS, TOKENS + 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_context_gives_keys_and_values(layer, keys, backend):
    layer, x = make(layer, context_dim=10, backend=backend), tokens(TOKENS)
    context = tokens(keys, 10)
    assert_agrees(layer(x, context=context), plain_layer(layer, x, context), 1e-12)
    mask = random_mask("bool", (ROWS, 1, TOKENS, keys))
    expected = plain_layer(layer, x, context, as_bias(mask).expand(-1, 8, -1, -1))
    assert_agrees(layer(x, context=context, attn_mask=mask), expected, 1e-12)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("keys", [KEYS, TOKENS + 4])
@pytest.mark.parametrize("wrap", [lambda mask: mask, lambda mask: PaddingMask(mask, TOKENS)], ids=["bool", "object"])
def test_padding_of_a_context_is_not_seen(wrap, keys, maps):
    layer, x, context = make("gda"), tokens(TOKENS), tokens(keys)
    real = torch.arange(keys) < torch.tensor([[2], [keys]])
    out = layer(x, context=context, padding=wrap(real), output_attentions=maps)
    for row, length in enumerate((2, keys)):
        alone = plain_layer(layer, x[row, None], context[row, None, :length])
        assert_agrees((out[0] if maps else out)[row], alone[0], 1e-12)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {},
            {"position_embeddings": RotaryEmbedding(6)(torch.arange(TOKENS)[None])},
            "position_embeddings and context",
        ),
        ({"layer_idx": 0}, {"past_key_values": DynamicCache()}, "past_key_values and context"),
        ({}, {"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens and context"),
        ({"window_size": (2, 0)}, {}, "window_size and context"),
    ],
)
def test_what_does_not_go_with_a_context_is_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        make("gda", **options)(tokens(TOKENS), context=tokens(KEYS), **arguments)
