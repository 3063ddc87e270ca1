"""Hyper-connections: a loop over tokens and streams, and the plain residual block."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from helpers.agreement import assert_agrees, randomise
from motifarch.layers import HyperConnections, PolyNormMLP, RMSNorm, expand_streams, merge_streams

SIZE, STREAMS = 6, 3


def connections(**options):
    torch.manual_seed(1)
    module = HyperConnections(SIZE, num_streams=STREAMS, dtype=torch.float64, **options)
    randomise(module, std=0.5)
    return module


def clamp(value, bound):
    return min(max(value, -bound), bound)


def plain_sinkhorn(logits, iterations, *, rows_first=True):
    matrix = [[math.exp(clamp(v, 20)) for v in row] for row in logits]

    def divide_rows(m):
        return [[v / max(sum(row), 1e-8) for v in row] for row in m]

    def transposed(m):
        return [list(column) for column in zip(*m, strict=True)]

    for _ in range(iterations):
        if rows_first:
            matrix = transposed(divide_rows(transposed(divide_rows(matrix))))
        else:
            matrix = divide_rows(transposed(divide_rows(transposed(matrix))))
    return matrix


def plain_connections(m, streams, sublayer, *, rows_first=True):
    """A token and a stream at a time."""
    out = []
    for token in streams:
        flat = token.flatten()
        normed = flat / torch.sqrt(flat.square().mean() + 1e-6) * m.rms_norm.weight

        def logit(alpha, projection, bias, i, normed=normed):
            return (alpha * (projection.weight[i] @ normed) + bias.flatten()[i]).item()

        def gate(name, i, logit=logit):
            read = (getattr(m, f"{part}_{name}") for part in ("alpha", "proj", "bias"))
            return 1 / (1 + math.exp(-clamp(logit(*read, i), 10)))

        pre = [gate("pre", i) for i in range(STREAMS)]
        post = [(1 + m.post_alpha) * gate("post", i) for i in range(STREAMS)]
        logits = [
            [logit(m.alpha_res, m.proj_res, m.bias_res, i * STREAMS + j) for j in range(STREAMS)]
            for i in range(STREAMS)
        ]
        mix = plain_sinkhorn(logits, m.sinkhorn_iters, rows_first=rows_first)
        o = sublayer(sum(pre[i] * token[i] for i in range(STREAMS)))
        out.append(
            torch.stack([sum(mix[i][j] * token[j] for j in range(STREAMS)) + post[i] * o for i in range(STREAMS)])
        )
    return torch.stack(out)


@pytest.mark.parametrize(("iterations", "post_alpha", "scale"), [(20, 0.0, 1), (2, 0.7, 1), (3, 0.0, 60)])
def test_it_is_the_loop(iterations, post_alpha, scale):
    m = connections(sinkhorn_iters=iterations, post_alpha=post_alpha)
    with torch.no_grad():
        for name in ("pre", "post", "res"):
            getattr(m, f"alpha_{name}").mul_(scale)  # a large one reaches the clamps
    streams = torch.randn(4, STREAMS, SIZE, dtype=torch.float64)
    out = m(streams, torch.tanh)
    assert_agrees(out, plain_connections(m, streams, torch.tanh), 1e-12)
    exchanged = plain_connections(m, streams, torch.tanh, rows_first=False)
    assert iterations == 20 or (out - exchanged).abs().max() > 1e-6


def test_gradcheck():
    m = connections(sinkhorn_iters=2)
    streams = torch.randn(1, STREAMS, SIZE, dtype=torch.float64, requires_grad=True)
    parameters = [p for n, p in m.named_parameters() if n.startswith(("alpha", "bias"))]
    assert torch.autograd.gradcheck(lambda x, *_: m(x, torch.tanh), (streams, *parameters))


@pytest.mark.parametrize("identity_init", [False, True])
def test_the_streams_are_mixed_by_a_doubly_stochastic_matrix(identity_init):
    m = HyperConnections(SIZE, num_streams=4, identity_init=identity_init, dtype=torch.float64)
    _, post, mix = m.read(torch.randn(5, 4, SIZE, dtype=torch.float64))
    torch.testing.assert_close(mix.sum(-1), torch.ones_like(post), atol=1e-9, rtol=0)
    torch.testing.assert_close(mix.sum(-2), torch.ones_like(post), atol=1e-12, rtol=0)
    assert (mix > 0).all()
    assert post.max() < 1


def test_identity_init_is_a_plain_residual_block():
    torch.manual_seed(0)
    made = {"dtype": torch.float64}
    blocks = [PolyNormMLP(SIZE, intermediate_size=8, **made) for _ in range(3)]
    norms = [RMSNorm(SIZE, eps=1e-5, **made) for _ in blocks]
    wrapped = [HyperConnections(SIZE, identity_init=True, post_alpha=1.0, **made) for _ in blocks]
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    plain, streams = x, expand_streams(x, 4)
    for block, norm, m in zip(blocks, norms, wrapped, strict=True):
        plain = plain + block(norm(plain))
        streams = m(streams, lambda h, block=block, norm=norm: block(norm(h)))
    assert_agrees(merge_streams(streams), plain, 1e-12)


def test_around_a_decoder_layer_of_transformers():
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation = "eager"
    layer, x = LlamaDecoderLayer(config, 0), torch.randn(2, 5, 16)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(5)[None])
    m = HyperConnections(16, identity_init=True, post_alpha=1.0)
    streams = m(expand_streams(x, 4), lambda h: layer(h, position_embeddings=positions) - h)
    assert_agrees(merge_streams(streams), layer(x, position_embeddings=positions), 1e-5)
    streams.square().sum().backward()
    assert all(p.grad is not None for p in (*layer.parameters(), *m.parameters()))


@pytest.mark.parametrize("part", ["rms_norm", "proj_pre", "proj_post", "proj_res"])
def test_a_part_that_is_hooked_is_called(part):
    """As adapters, offloading and the like need it; otherwise all four are one matrix."""
    m, streams = connections(), torch.randn(2, STREAMS, SIZE, dtype=torch.float64)
    plain, calls = m(streams, torch.tanh), []
    handle = getattr(m, part).register_forward_hook(lambda *_: calls.append(part))
    assert_agrees(m(streams, torch.tanh), plain, 1e-12)
    assert calls == [part]
    handle.remove()


def test_what_else_the_sublayer_gives_is_passed_on():
    m = connections()
    streams = torch.randn(2, STREAMS, SIZE, dtype=torch.float64)
    out, losses = m(streams, lambda x: (x, x.sum()))
    assert torch.equal(out, m(streams, lambda x: x))
    assert losses.ndim == 0


def test_bfloat16_rounds_once():
    m = connections().bfloat16()
    streams = torch.randn(9, STREAMS, SIZE).bfloat16()
    exact = copy.deepcopy(m).double()(streams.double(), torch.tanh)
    out = m(streams, torch.tanh)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.03 * exact.abs().max()


def test_autocast_does_not_round_the_streams():
    m = connections().float()
    streams = torch.randn(9, STREAMS, SIZE)
    with torch.no_grad():
        for projection in (m.proj_pre, m.proj_post, m.proj_res):
            projection.weight.zero_()  # their products may be rounded
    plain = m(streams, torch.tanh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_agrees(m(streams, torch.tanh), plain, 1e-6)


def test_parameters_are_the_released_models_():
    module = HyperConnections(SIZE, num_streams=4)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "alpha_pre": (1,),
        "alpha_post": (1,),
        "alpha_res": (1,),
        "bias_pre": (4,),
        "bias_post": (4,),
        "bias_res": (4, 4),
        "proj_pre.weight": (4, 24),
        "proj_post.weight": (4, 24),
        "proj_res.weight": (16, 24),
        "rms_norm.weight": (24,),
    }


def test_one_stream_and_streams_of_another_number_are_refused():
    with pytest.raises(ValueError, match="num_streams is 1; it must be 2 or more"):
        HyperConnections(SIZE, num_streams=1)
    with pytest.raises(ValueError, match=r"streams has shape \(2, 6\); it must end with \(3 streams, 6\)"):
        connections()(torch.zeros(2, SIZE, dtype=torch.float64), torch.tanh)
