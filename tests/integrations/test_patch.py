"""What `patch` computes, reports, refuses and saves, beyond what every family's test asks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2Model,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    StaticCache,
    T5Config,
    T5EncoderModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from helpers.host_models import host_model, left_padded, moved, token_ids
from helpers.plain_attention import plain_diff_attention, rms_norm
from helpers.python_process import run_python
from motifarch.errors import UserError
from motifarch.integrations import load_patched, patch


def patched(family: str = "llama", **options: Any) -> Any:
    model = host_model(family)
    patch(model, **options)
    return moved(model)


# What it computes


@pytest.mark.parametrize("sub_norm", [False, True])
@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
def test_attention_is_the_formula_over_the_hosts_queries_keys_and_values(attention: str, sub_norm: bool) -> None:
    lambda_init = 0.3 if attention == "gda" else 0.0
    model = patched(attention=attention, ratio=2, sub_norm=sub_norm, lambda_init=lambda_init).double()
    layer = model.model.layers[1].self_attn
    x = torch.randn(2, 9, model.config.hidden_size, dtype=torch.float64)
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        out = layer(x, position_embeddings=(cos, sin), attention_mask=None)[0]

        def heads(weight: Any, bias: Any) -> torch.Tensor:
            return (x @ weight.T + bias).unflatten(-1, (-1, 8))

        q, noise = heads(layer.q_proj.weight, layer.q_proj.bias).split([8, 4], dim=2)
        k, v = (heads(p.weight, p.bias) for p in (layer.k_proj, layer.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        noise, _ = apply_rotary_pos_emb(noise, noise, cos, sin, unsqueeze_dim=2)
        if attention == "gda":
            names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
            vectors = [getattr(layer.lambda_vectors, name) for name in names]
            lam = vectors[0].dot(vectors[1]).exp() - vectors[2].dot(vectors[3]).exp() + lambda_init
            out_scale = 1 - lambda_init if sub_norm else 1.0
        else:
            lam = torch.sigmoid(x @ layer.lambda_proj.weight.T)
            out_scale = 1.0 if sub_norm else 2.0
        weight = layer.subln.weight if sub_norm else None
        plain = plain_diff_attention(q, k, noise, k, v, lam, causal=True, norm_weight=weight, out_scale=out_scale)
        expected = plain.flatten(2) @ layer.o_proj.weight.T + layer.o_proj.bias
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_latent_attention_becomes_the_formula_with_the_hosts_rotation_and_scale(rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 100.0}
    if rope == "yarn":
        parameters |= {"factor": 4.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32}
    model = host_model("axk1", rope_parameters=parameters)
    host_scale = model.model.layers[0].self_attn.scaling
    patch(model, ratio=4)
    layer = moved(model).double().model.layers[0].self_attn
    x = torch.randn(2, 9, model.config.hidden_size, dtype=torch.float64)
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        q, noise, k, v = (
            (x @ weight.T).unflatten(-1, (-1, 8))
            for weight in (*layer.q_proj.weight.split([128, 32]), layer.k_proj.weight, layer.v_proj.weight)
        )
        for heads in (q, noise, k):  # half of a head is rotated: 4 of 8
            heads[..., 4:], _ = apply_rotary_pos_emb(heads[..., 4:], heads[..., 4:], cos, sin, unsqueeze_dim=2)
        # The formula divides by sqrt(8); the host's heads are 10 wide.
        q, noise = (t * host_scale * 10**0.5 for t in (q, noise))
        lam = layer.compute_lambda(x)
        expected = plain_diff_attention(q, k, noise, k, v, lam, causal=True).flatten(2) @ layer.o_proj.weight.T
        out = layer(x, position_embeddings=(cos, sin))[0]
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


def test_a_norm_of_queries_gets_a_noise_norm() -> None:
    model = patched("qwen3", ratio=4).double()
    norm = model.model.layers[0].self_attn.q_norm
    x = torch.randn(1, 3, 10, 8, dtype=torch.float64)
    expected = torch.cat(
        [
            rms_norm(x[:, :, :8], norm.signal.weight, norm.signal.variance_epsilon),
            rms_norm(x[:, :, 8:], norm.noise.weight, norm.noise.variance_epsilon),
        ],
        dim=2,
    )
    assert not torch.equal(norm.signal.weight, norm.noise.weight)
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-6)  # the host's norms work in float32


def test_noise_heads_start_as_the_first_signal_head_of_their_group() -> None:
    model = host_model("llama")
    patch(model, ratio=2)
    for layer in model.model.layers:
        query = layer.self_attn.q_proj
        for rows in (query.weight, query.bias):
            heads = rows.unflatten(0, (12, 8))
            assert torch.equal(heads[8:], heads[torch.tensor([0, 2, 4, 6])])


def test_polynorm_replaces_the_activation_of_every_dense_block() -> None:
    model = patched(attention=None, feed_forward="polynorm").double()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.act_fn.weight.copy_(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
        mlp.act_fn.bias.fill_(0.125)
        x = torch.randn(2, 5, model.config.hidden_size, dtype=torch.float64)
        z = mlp.gate_proj(x)
        n = [rms_norm(z**power, None, 1e-6) for power in (3, 2, 1)]
        expected = mlp.down_proj((0.2 * n[0] + 0.3 * n[1] + 0.5 * n[2] + 0.125) * mlp.up_proj(x))
        torch.testing.assert_close(mlp(x), expected, atol=1e-10, rtol=1e-10)
    assert model.config._attn_implementation == "sdpa"  # attention was left alone


def test_experts_keep_their_activation_or_share_one_polynorm() -> None:
    kept, swapped = host_model("exaone_moe"), host_model("exaone_moe")
    patch(kept, feed_forward="polynorm", experts="keep")
    patch(swapped, feed_forward="polynorm", experts="swap")
    kept_blocks, swapped_blocks = kept.model.layers[1].mlp, swapped.model.layers[1].mlp
    assert type(kept_blocks.experts.act_fn) is nn.SiLU or "SiLU" in type(kept_blocks.experts.act_fn).__name__
    assert list(dict(swapped_blocks.experts.act_fn.named_parameters())) == ["weight", "bias"]
    assert list(dict(kept_blocks.shared_experts.act_fn.named_parameters())) == ["weight", "bias"]
    experts, x = swapped_blocks.experts, torch.randn(6, swapped.config.hidden_size)
    chosen, weights = torch.tensor([[0, 1]] * 3 + [[2, 3]] * 3), torch.rand(6, 2)
    with torch.no_grad():
        out = experts(x, chosen, weights)
        for i in range(6):
            expected = torch.zeros_like(x[i])
            for expert, weight in zip(chosen[i], weights[i], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ x[i]).chunk(2)
                act = sum(rms_norm(gate**power, None, 1e-6) / 3 for power in (3, 2, 1))
                expected += weight * (experts.down_proj[expert] @ (act * up))
            torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "exaone4"])
def test_a_cache_that_goes_on_gives_what_the_host_gives(family: str, static: bool, padded: bool) -> None:
    host = host_model(family)
    host.set_attn_implementation("eager")
    model = host_model(family)
    patch(model, ratio={"llama": 4, "gemma2": 2, "exaone4": 5}[family])
    prompts = [token_ids(20, seed=1), token_ids(13 if padded else 20, seed=2)]
    batch = left_padded(prompts)
    caches = [
        StaticCache(config=m.config, max_cache_len=32) if static else DynamicCache(config=m.config)
        for m in (host, model)
    ]
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    begin = 0
    with torch.no_grad():
        for end in (9, 13, 14, 15, 20):  # a prompt, longer than the windows; a longer turn; a token at a time
            part = slice(begin, end)
            logits = [
                m(
                    batch["input_ids"][:, part],
                    attention_mask=batch["attention_mask"][:, :end],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                ).logits
                for m, cache in zip((host, model), caches, strict=True)
            ]
            real = batch["attention_mask"][:, part].bool()
            torch.testing.assert_close(logits[1][real], logits[0][real], atol=1e-5, rtol=1e-5)
            begin = end


def test_gradients_pass_through_a_cache_that_grows() -> None:
    model = patched(ratio=2)
    batch = left_padded([token_ids(9, seed=1), token_ids(6, seed=2)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    gradients = []
    for cut in (0, 7):
        cache = DynamicCache(config=model.config)
        if cut:
            model(ids[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut], past_key_values=cache)
        logits = model(ids[:, cut:], attention_mask=mask, position_ids=positions[:, cut:], past_key_values=cache).logits
        model.zero_grad()
        logits[:, -1].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "exaone4"])
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    model = patched(family, ratio=4 if family == "llama" else 5)
    documents = [token_ids(11, seed=1), token_ids(1, seed=2), token_ids(8, seed=3)]
    lengths = [len(d) for d in documents]
    ids, positions = torch.cat(documents)[None], torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 11, "max_length_k": 11}
    with torch.no_grad():
        alone = torch.cat([model(d[None]).logits[0] for d in documents])
        for extra in ({}, given):
            together = model(ids, position_ids=positions, use_cache=False, **extra).logits[0]
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# Merging


def test_merged_heads_are_the_means_of_neighbours() -> None:
    model, fewer = host_model("llama"), host_model("llama", num_key_value_heads=1)
    weights = model.state_dict()
    for name, tensor in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = (tensor[:8] + tensor[8:]) / 2
    fewer.load_state_dict(weights)
    report = patch(model, ratio=8, merge_kv=True)
    assert not report.exact
    assert all(m.merged == "2 key/value heads merged to 1 (means)" for m in report)
    ids = token_ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, fewer(ids).logits, atol=1e-5, rtol=1e-5)
    assert model.config.num_key_value_heads == 1
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (2, 1, 12, 8)


def test_a_family_that_no_table_names_is_patched_by_its_shape() -> None:
    """Known by its projections; one line each, whatever the number of layers."""

    class OwnAttention(LlamaAttention):
        """Another class, of which nothing is written down."""

    host, model = host_model("llama"), host_model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    model.config.model_type = "of_our_own"
    report = patch(model, ratio=4)
    assert report.exact
    assert str(report).count("self_attn") == 1
    ids = token_ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, host(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_module_that_does_more_than_it_shows_is_refused() -> None:
    class Doubling(LlamaAttention):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            out, maps = super().forward(*arguments, **options)
            return out * self.q_proj.out_features, maps

    model = host_model("llama")
    model.model.layers[1].self_attn.__class__ = Doubling
    before, config = copy.deepcopy(model.state_dict()), model.config.to_json_string()
    with pytest.raises(ValueError, match=r"layers.1.self_attn \(Doubling\) would be another function: .* differs by"):
        patch(model)
    model.model.layers[1].self_attn.__class__ = LlamaAttention
    _untouched(model, before, config)


def test_merging_is_not_done_where_the_ratio_fits() -> None:
    report = patch(host_model("llama"), ratio=4, merge_kv=True)
    assert report.exact
    assert all(not m.merged for m in report)


# Reports


def test_the_report_says_what_was_kept_added_and_lost() -> None:
    report = patch(host_model("axk1"), ratio=4, feed_forward="polynorm", experts="keep")
    by_name = {m.name: m for m in report}
    attention = by_name["model.layers.0.self_attn"]
    assert attention.what == "gda: 16 signal, 4 noise, 4 key/value heads"
    assert "o_proj.weight" in attention.kept
    assert {"q_proj.weight", "k_proj.weight", "v_proj.weight", "lambda_vectors.lambda_q1"} <= set(attention.added)
    assert {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"} <= set(attention.lost)
    assert by_name["model.layers.0.mlp"].lost == ["SiLUActivation activation"]
    assert by_name["model.layers.1.mlp.experts"].added == []
    assert not report.exact
    text = str(report)
    for words in ("does not start as the same function", "model.layers.*.self_attn x 2", "kv_b_proj", "act_fn.weight"):
        assert words in text


# Refusals: the model is as it was


def _untouched(model: Any, before: dict[str, torch.Tensor], config: str) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.to_json_string() == config
    assert type(model).__module__.startswith("transformers.")
    assert not [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("motifarch")]


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"ratio": 3}, "ratio=3 does not divide the 8 query heads of .*layers.0.self_attn; 1, 2, 4 would fit"),
        ("llama", {"ratio": 8}, "ratio=8 gives .* 1 noise heads .* 2 key/value heads; ratio=1 or 2 or 4 .*merge_kv"),
        ("exaone4", {}, "ratio=4 does not divide the 10 query heads of model.layers.0.self_attn; 1, 5 would fit"),
        ("axk1", {"ratio": 3}, "ratio=3 does not divide the 16 query heads .*; 1, 2, 4, 8, 16 would fit"),
        ("axk1", {"ratio": 32}, "ratio=32 does not divide the 16 query heads"),
        ("llama", {"ratio": 0}, "ratio is 0; it must be a whole number"),
        ("llama", {"ratio": 2.0}, "ratio is 2.0; it must be a whole number"),
        ("llama", {"attention": "diff_v1"}, "attention is 'diff_v1'; choose one of 'gda', 'diff_v2', None"),
        ("llama", {"feed_forward": "swiglu"}, "feed_forward is 'swiglu'; choose one of 'polynorm', None"),
        ("llama", {"experts": "drop"}, "experts is 'drop'; choose one of 'keep', 'swap', None"),
        ("llama", {"backend": "cudnn"}, "backend is 'cudnn'; choose one of"),
        ("llama", {"attention": None}, "nothing to patch"),
        ("llama", {"attention": "diff_v2", "lambda_init": 0.5}, "lambda_init is 0.5"),
        ("exaone_moe", {"feed_forward": "polynorm"}, r"routed experts \(model.layers.1.mlp.experts and 1 more\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(family: str, options: dict[str, Any], words: str) -> None:
    model = host_model(family)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_json_string()
    with pytest.raises(ValueError, match=words):
        patch(model, **options)
    _untouched(model, before, config)


def test_models_that_cannot_be_patched_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear is no transformers model"):
        patch(nn.Linear(2, 2))  # type: ignore[arg-type]
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="GPT2Model has no attention that can be patched"):
        patch(GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)))
    with pytest.raises(ValueError, match=r"SelfAttention is a T5Attention, whose projections \(q, k, v, o\)"):
        patch(T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, num_layers=1, num_heads=2)))
    many = sizes | {"intermediate_size": 8, "num_key_value_heads": 1, "head_dim": 4}
    with pytest.raises(ValueError, match=r"layers.0.self_attn, a GptOssAttention, attends with sinks"):
        patch(GptOssForCausalLM(GptOssConfig(**many, num_local_experts=2, num_experts_per_tok=1)), ratio=2)
    gated = many | {"layer_types": ["full_attention"], "num_experts": 2, "moe_intermediate_size": 8}
    with pytest.raises(ValueError, match=r"layers.0.self_attn \(Qwen3NextAttention\)"):
        patch(Qwen3NextForCausalLM(Qwen3NextConfig(**gated)), ratio=2)
    with torch.device("meta"), pytest.raises(ValueError, match=r"on the meta device, .*'stablelm'"):
        patch(StableLmForCausalLM(StableLmConfig(**sizes, intermediate_size=8, num_key_value_heads=1)), ratio=1)
    model = host_model("llama")
    patch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)


def test_modules_that_cannot_be_patched_are_refused() -> None:
    dropout = host_model("llama", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn has attention dropout 0.1"):
        patch(dropout)
    wrapped = host_model("llama")
    wrapped.model.layers[1].self_attn.q_proj = nn.Sequential(wrapped.model.layers[1].self_attn.q_proj)
    wrapped.model.layers[1].self_attn.q_proj.out_features = 64
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj is a Sequential"):
        patch(wrapped)
    assert type(wrapped.model.layers[0].self_attn).__name__ == "LlamaAttention"
    hooked = host_model("llama")
    hooked.model.layers[0].mlp.forward = hooked.model.layers[0].mlp.forward
    with pytest.raises(ValueError, match=r"forward of model.layers.0.mlp was replaced"):
        patch(hooked, feed_forward="polynorm")
    assert not hasattr(hooked.config, "motifarch_patch")


# Masks: honoured or refused, never ignored


def test_masks_that_cannot_be_honoured_are_refused() -> None:
    model = patched(ratio=2)
    ids = token_ids(2, 8)
    hole = torch.ones_like(ids)
    hole[0, 3] = 0
    with pytest.raises(ValueError, match="padding between"):
        model(ids, attention_mask=hole)
    with pytest.raises(ValueError, match="mask of every query and key"):
        model(ids, attention_mask=torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(2, 5\); it must have 8 columns"):
        model(ids, attention_mask=torch.ones(2, 5))
    right = torch.ones_like(ids)
    right[0, 6:] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=right, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="padding between"):
            model(ids[:, :1], attention_mask=torch.nn.functional.pad(right, (0, 1), value=1), past_key_values=cache)
    with pytest.raises(ValueError, match="fixed size gives no gradients"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))


def test_another_attention_implementation_is_refused() -> None:
    model = patched(ratio=2)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(token_ids(1, 4))
    model.set_attn_implementation("motifarch_differential")
    model(token_ids(1, 4))


# Training and compilation


@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
def test_gradient_checkpointing_changes_nothing(attention: str) -> None:
    model = patched("qwen3", attention=attention, feed_forward="polynorm").train()
    batch = left_padded([token_ids(9, seed=1), token_ids(6, seed=2)])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()  # its new name is not in every transformers that is supported
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("attention", ["gda", "diff_v2"])
def test_a_patched_layer_compiles_in_one_piece(attention: str) -> None:
    model = patched("qwen3", attention=attention, feed_forward="polynorm")
    layer = model.model.layers[0]
    x = torch.randn(2, 12, model.config.hidden_size)
    tables = model.model.rotary_emb(x, torch.arange(12)[None])
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected, out = layer(x, position_embeddings=tables), compiled(x, position_embeddings=tables)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().mean().backward()
    assert layer.self_attn.q_proj.weight.grad[64:].abs().max() > 0


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        ("mistral", "padded"),  # a window in each layer
        *(
            pytest.param(family, batch, marks=pytest.mark.slow)
            for family in ("llama", "gemma2")  # none, and one in every other layer
            for batch in ("padded", "packed", "plain")
        ),
    ],
)
def test_a_compiled_model_sees_what_it_should_with_its_layers_in_one_graph(family: str, batch: str) -> None:
    model = patched(family, ratio=2)
    first, second = token_ids(9, seed=1), token_ids(6, seed=2)
    inputs = left_padded([first, second]) if batch == "padded" else {"input_ids": torch.cat((first, second))[None]}
    if batch == "packed":
        inputs["position_ids"] = torch.cat((torch.arange(9), torch.arange(6)))[None]
    real = inputs["input_ids"] > 0
    products: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        products.append(sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(model, backend=count)(**inputs, use_cache=False).logits
        torch.testing.assert_close(logits[real], model(**inputs, use_cache=False).logits[real], atol=1e-5, rtol=1e-5)
    assert sum(n > 1 for n in products) == 1, products


def test_low_precision() -> None:
    model = patched("exaone4", ratio=5, feed_forward="polynorm")
    ids = token_ids(2, 12)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    low = model.to(torch.bfloat16)
    low_logits = low(ids).logits
    assert low_logits.dtype == torch.bfloat16
    assert (low_logits.float() - expected).abs().mean() < 0.1 * expected.std()
    assert low.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)


# Saving and loading


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "diff_v2", "ratio": 2, "sub_norm": True},
        {"lambda_init": 0.2, "sub_norm": True},
        {"ratio": 8, "merge_kv": True},
        {"attention": None, "feed_forward": "polynorm"},
    ],
    ids=["diff_v2", "gda", "merged", "feed-forward"],
)
def test_every_kind_of_patch_is_saved(options: dict[str, Any], tmp_path: Path) -> None:
    model = patched(**options)
    model.save_pretrained(tmp_path)
    loaded = load_patched(tmp_path, dtype=torch.float32)
    ids = token_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tokens = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


def test_a_folder_keeps_its_dtype_and_other_heads(tmp_path: Path) -> None:
    patched().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_patched(tmp_path).parameters()} == {torch.bfloat16}
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == "PatchedLlamaModel"
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(classifier, LlamaForSequenceClassification)
    classifier.save_pretrained(tmp_path / "classifier")
    again = load_patched(tmp_path / "classifier")
    ids = token_ids(1, 7)
    assert torch.equal(again(ids).logits, classifier(ids).logits)


def test_hosts_own_classes_refuse_a_patched_folder(tmp_path: Path) -> None:
    patched().save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"patched by motifarch: load it with motifarch.integrations.load_patched"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    # Where nobody imported motifarch:
    code = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
assert "motifarch" not in sys.modules
"""
    assert "motifarch_patched" in run_python(code, tmp_path)


def test_folders_that_are_no_patched_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing or damaged"):
        load_patched(tmp_path / "nowhere")
    host_model("llama").save_pretrained(tmp_path / "host")
    with pytest.raises(UserError, match="holds no model patched by motifarch"):
        load_patched(tmp_path / "host")
    patched().save_pretrained(tmp_path / "patched")
    file = tmp_path / "patched/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.lambda_vectors.lambda_q1"
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"missing tensors: {name}"):
        load_patched(tmp_path / "patched")


def test_a_patched_model_is_copied_and_moved() -> None:
    model = patched(ratio=2, feed_forward="polynorm")
    twin = copy.deepcopy(model)
    ids = token_ids(1, 6)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    with torch.no_grad():
        twin.model.layers[0].self_attn.lambda_vectors.lambda_q1.add_(1)
    assert not torch.equal(twin(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_folder_of_version_0_1_is_loaded(family: str, tmp_path: Path) -> None:
    """Noise queries were a projection inside q_proj, and lambda the attention module's own."""
    model = patched(family, ratio=2)
    model.save_pretrained(tmp_path)
    older = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if ".q_proj." in name:  # 8 signal heads of 8
            older[name], older[name.replace("q_proj.", "q_proj.noise.")] = tensor[:64].clone(), tensor[64:].clone()
        else:
            older[name.replace("q_norm.signal", "q_norm").replace("lambda_vectors.", "")] = tensor
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = token_ids(1, 9)
    for loaded in (load_patched(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
