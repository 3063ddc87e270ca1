"""Attention statistics against plain formulas on maps from plain PyTorch."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import plain_motif
from helpers.agreement import randomise
from helpers.models import VARIANTS, random_ids, tiny_model
from motifarch.data import Block
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.study.attention_statistics import attention_statistics, gradient_norm_spikes

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}


def packed_row(*documents: Tensor) -> Block:
    """A row of a prepared dataset: its last token is a target only."""
    ids = torch.cat([*documents, torch.tensor([5])]).numpy().astype(np.int32)
    lengths = [len(d) for d in documents]
    lengths[-1] += 1
    return Block(ids, np.array(lengths, dtype=np.int32))


def expected(maps: list[Tensor]) -> tuple[float, float]:
    """First-token share and entropy of documents' (heads, S, S) maps, less first queries."""
    shares, entropies = [], []
    for document in maps:
        for head in document:
            for query in head[1:]:
                shares.append(float(query[0]))
                entropies.append(float(-sum(p * p.log() for p in query if p > 0)))
    return float(np.mean(shares)), float(np.mean(entropies))


def check(layer: dict, kind: str, maps: list[Tensor]) -> None:
    found = layer[f"{kind}first_token_share"], layer[f"{kind}entropy"]
    np.testing.assert_allclose(found, expected(maps), rtol=2e-5)


def check_difference(layer: dict, signal: list[Tensor], noise: list[Tensor], lam: list[Tensor]) -> None:
    """The layer's figures from signal maps, repeated noise maps and (heads, S) lambdas."""
    difference = [a - factor[..., None] * b for a, b, factor in zip(signal, noise, lam, strict=True)]
    check(layer, "", [d.abs() / d.abs().sum(-1, keepdim=True) for d in difference])

    def flat(rows: list[Tensor]) -> Tensor:
        return torch.cat([r[:, 1:].flatten() for r in rows])

    masses = flat([d.abs().sum(-1) for d in difference])
    negative = flat([d.clamp(max=0).abs().sum(-1) for d in difference]) / masses
    cancelled = 1 - masses / (1 + flat(lam).abs())
    assert layer["negative_share"] == pytest.approx(float(negative.mean()), rel=2e-5)
    assert layer["cancelled_share"] == pytest.approx(float(cancelled.mean()), rel=1e-4, abs=1e-6)


def test_softmax_maps_are_llamas():
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    randomise(theirs, std=0.2)
    ours = MotifForCausalLM(MotifConfig(**SIZES, attention_type="softmax", hidden_act="silu")).eval()
    ours.load_state_dict(theirs.state_dict())
    documents = [random_ids(n, seed=n) for n in (9, 1, 14)]
    found = attention_statistics(ours, [packed_row(*documents[:2]), packed_row(documents[2])])
    assert found["queries"] == 8 + 13  # a document of one token has no query that could look at anything else
    with torch.no_grad():
        maps = [theirs(d[None], output_attentions=True).attentions for d in (documents[0], documents[2])]
    for i, layer in enumerate(found["layers"]):
        check(layer, "", [m[i][0] for m in maps])
        assert layer["lambda"] is layer["noise_entropy"] is layer["signal_entropy"] is layer["cancelled_share"] is None
    assert found["uniform_entropy"] == pytest.approx(np.mean([np.log(n) for s in (9, 14) for n in range(2, s + 1)]))
    assert found["uniform_first_token_share"] == pytest.approx(
        np.mean([1 / n for s in (9, 14) for n in range(2, s + 1)])
    )


def test_diff_v1_maps_are_diffllamas():
    theirs = DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, attn_implementation="eager")).eval()
    randomise(theirs, std=0.2)
    ours = MotifForCausalLM(
        MotifConfig(**SIZES, attention_type="diff_v1", num_noise_heads=None, hidden_act="silu", attn_rms_norm_eps=1e-5)
    ).eval()

    def as_motif(name: str, t: Tensor) -> Tensor:
        """Halves of signal and noise heads as adjacent pairs."""
        for projection, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
            if projection in name:
                return t.unflatten(0, (2, heads // 2, -1)).transpose(0, 1).flatten(0, 2)
        return t

    ours.load_state_dict({n: as_motif(n, t) for n, t in theirs.state_dict().items()}, strict=False)
    ids = random_ids(17)
    found = attention_statistics(ours, [packed_row(ids)])
    with torch.no_grad():
        maps = theirs(ids[None], output_attentions=True).attentions
    for i, layer in enumerate(found["layers"]):
        signal, noise = maps[i][0].chunk(2)
        check(layer, "signal_", [signal])
        check(layer, "noise_", [noise])
        own = theirs.model.layers[i].self_attn
        with torch.no_grad():
            first, second = (own.lambda_q1 @ own.lambda_k1).exp(), (own.lambda_q2 @ own.lambda_k2).exp()
            lam = float(first - second + own.lambda_init)
        assert layer["lambda"] == pytest.approx(lam, rel=1e-5)
        check_difference(layer, [signal], [noise], [torch.full((2, 17), lam)])


# Query heads are two blocks of two signal heads and a noise head. For signal and noise: which query
# has which key.
LAYOUTS = {
    "gda": ([(0, 0), (1, 0), (3, 2), (4, 2)], [(2, 1), (5, 3)]),
    "diff_v2 gated": ([(0, 0), (1, 0), (3, 0), (4, 0)], [(2, 0), (5, 0)]),
}


@pytest.mark.parametrize("variant", sorted(LAYOUTS))
def test_grouped_maps_are_those_of_plain_pytorch(variant):
    model, documents = tiny_model(variant), [random_ids(13), random_ids(9, seed=2)]
    found = attention_statistics(model, [packed_row(*documents)])
    config, tensors = model.config.to_dict(), dict(model.named_parameters())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    for i, layer in enumerate(found["layers"]):
        maps: dict[str, list[Tensor]] = {"signal": [], "noise": [], "lambda": []}
        for ids in documents:
            with torch.no_grad():
                inputs = model(ids[None], output_hidden_states=True).hidden_states[i]
                norm = tensors[f"model.layers.{i}.input_layernorm.weight"]
                x = plain_motif.rms_norm(inputs, norm, config["rms_norm_eps"])
                weights = [tensors[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qk"]
                q, k = ((x @ w.T).split(8, dim=-1) for w in weights)
                angles = plain_motif.rotary_angles(config, 8, len(ids))
                visible = plain_motif.mask(config, len(ids))
                for kind, pairs in zip(("signal", "noise"), LAYOUTS[variant], strict=True):
                    own = [plain_motif.attention_map(q[a], k[b], angles, visible) for a, b in pairs]
                    maps[kind].append(torch.cat(own).float())
                if variant == "gda":
                    lam = torch.full((4, len(ids)), layer["lambda"])
                else:
                    lam = torch.sigmoid(x @ tensors[f"model.layers.{i}.self_attn.lambda_proj.weight"].T)[0].T
                maps["lambda"].append(lam)
        check(layer, "signal_", maps["signal"])
        check(layer, "noise_", maps["noise"])
        check_difference(layer, maps["signal"], [m.repeat_interleave(2, 0) for m in maps["noise"]], maps["lambda"])


def test_lambda_is_the_layers_own():
    row = packed_row(random_ids(12), random_ids(9, seed=2))
    for variant in ("gda", "gda 4:1", "diff_v1", "gda narrow"):
        model = tiny_model(variant)
        for layer, own in zip(attention_statistics(model, [row, row])["layers"], model.model.layers, strict=True):
            assert layer["lambda"] == pytest.approx(own.self_attn.compute_lambda().item(), rel=1e-6)
    model = tiny_model("diff_v2")
    found = attention_statistics(model, [row])["layers"]
    with torch.no_grad():
        inputs = model.model.embed_tokens(torch.from_numpy(row.input_ids[:-1]).long()[None])
        first = model.model.layers[0]
        lam = first.self_attn.compute_lambda(first.input_layernorm(inputs))
    assert lam.std() > 0.01
    assert found[0]["lambda"] == pytest.approx(float(lam.mean()), rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_maps_cancel_by_lambda(sign):
    """A signal head that looks where its noise head looks: a wrong group would differ."""
    model = tiny_model("gda")
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            q = attention.q_proj.weight.view(2, 3, 8, -1)
            q[:, :2] = q[:, 2:]
            k = attention.k_proj.weight.view(2, 2, 8, -1)
            k[:, 0] = k[:, 1]
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                getattr(attention, name).zero_()
            attention.lambda_init = 0.5 * sign
    for layer in attention_statistics(model, [packed_row(random_ids(15))])["layers"]:
        assert layer["lambda"] == 0.5 * sign
        assert layer["negative_share"] == pytest.approx(0, abs=1e-6)
        assert layer["cancelled_share"] == pytest.approx(1 - 0.5 / 1.5 if sign > 0 else 0, abs=1e-5)
        for name in ("first_token_share", "entropy"):
            assert layer[name] == pytest.approx(layer[f"noise_{name}"], rel=1e-4)
            assert layer[name] == pytest.approx(layer[f"signal_{name}"], rel=1e-4)


def test_a_window_hides_the_first_token():
    wide, narrow = (attention_statistics(tiny_model(v), [packed_row(random_ids(40))]) for v in ("gda", "gda window"))
    assert narrow["uniform_first_token_share"] == pytest.approx(sum(1 / n for n in range(2, 8)) / 39)
    assert narrow["layers"][0]["first_token_share"] < wide["layers"][0]["first_token_share"]
    assert narrow["layers"][0]["entropy"] < np.log(7)


@pytest.mark.parametrize("variant", ["gda", "softmax"])
def test_outliers_and_logits(variant):
    model, ids = tiny_model(variant), random_ids(30)
    model.model.embed_tokens.weight.data += 0.5  # a mean that the moments have to take out
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        residual = model(ids[None], output_hidden_states=True).hidden_states[1]
    handle.remove()
    layer = attention_statistics(model, [packed_row(ids)])["layers"][0]
    for prefix, x in (("", residual), ("attention_", seen[0])):
        x = x.double().flatten()
        assert layer[f"{prefix}outlier_ratio"] == pytest.approx(
            float(x.abs().max() / x.square().mean().sqrt()), rel=1e-5
        )
        z = (x - x.mean()) / x.std(correction=0)
        assert layer[f"{prefix}kurtosis"] == pytest.approx(float(z.pow(4).mean()), rel=1e-4)
    # The layers' own record of their largest logits, which training uses, is computed elsewhere.
    attention = model.model.layers[0].self_attn
    attention.record_max_logits = True
    model.train()(ids[None])
    assert layer["largest_logit"] == pytest.approx(max(float(m.max()) for m in attention.max_logits if m is not None))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_model_is_left_as_it_was(variant):
    model, ids = tiny_model(variant), random_ids(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        found = attention_statistics(model, [packed_row(random_ids(20))])
        assert torch.equal(model(ids).logits, before)
    for layer, own in zip(found["layers"], model.model.layers, strict=True):
        assert own.self_attn.attention_hook is None
        assert not own._forward_hooks
        assert not own.self_attn._forward_hooks
        assert 0 < layer["first_token_share"] < 1
        assert 0 < layer["entropy"] < np.log(20)


def metrics(norms: list[float | None]) -> list[dict]:
    return [{"step": i, "grad_norm": norm} for i, norm in enumerate(norms, 1)]


def test_spikes_stand_out_from_the_norms_before():
    draw = np.random.default_rng(0)
    quiet = (1 + 0.1 * draw.standard_normal(400)).tolist()
    assert gradient_norm_spikes(metrics(quiet)) == 0
    assert gradient_norm_spikes(metrics([n / 50 for n in quiet])) == 0  # whatever the scale
    spiky = list(quiet)
    for step in (3, 100, 101, 250):  # the first lies within the window that is only looked back at
        spiky[step] = 5.0
    assert gradient_norm_spikes(metrics(spiky)) == 3
    spiky[300] = None
    assert gradient_norm_spikes(metrics(spiky)) == 4
    falling = [n * np.exp(-i / 100) for i, n in enumerate(quiet)]
    assert gradient_norm_spikes(metrics(falling)) == 0
    assert gradient_norm_spikes(metrics(spiky[:64])) == 0
    assert gradient_norm_spikes(metrics(quiet), deviations=0.5) > 50
