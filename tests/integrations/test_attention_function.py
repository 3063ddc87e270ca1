"""DIFF V1 inside transformers' Llama and Mistral, through the registered function."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask, create_sliding_window_causal_mask

from helpers.agreement import assert_agrees, randomise
from helpers.models import packed, random_ids
from motifarch.integrations.attention_function import IMPLEMENTATION, add_lambdas, paired_attention
from motifarch.models.motif import MotifConfig, MotifForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
HOSTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "repetition_penalty": 1.5,
    "suppress_tokens": [0],
}


def host(name: str = "llama", dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    model_class, config_class, own = HOSTS[name]
    model = model_class(config_class(**(SIZES | own | fields)))
    add_lambdas(model)
    randomise(model, std=0.25)
    return model.to(dtype).eval()


def motif(model: Any, **fields: Any) -> MotifForCausalLM:
    """The Motif model of a host's state dict."""
    config = MotifConfig(
        **SIZES,
        num_noise_heads=None,
        attention_type="diff_v1",
        hidden_act="silu",
        rope_theta=model.config.rope_parameters["rope_theta"],
        qk_norm=model.config.model_type == "qwen3",
        sliding_window=getattr(model.config, "sliding_window", None),
        use_sliding_window=model.config.model_type == "mistral",
        **fields,
    )
    ours = MotifForCausalLM(config)
    ours.load_state_dict(model.state_dict())
    return ours.to(model.dtype).eval()


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_computes_what_a_motif_model_does(name: str) -> None:
    """Logits, gradients, left padding, packed documents and generation."""
    theirs = host(name)
    ours = motif(theirs)
    ids = random_ids(2, 23)
    for model in (ours, theirs):
        (model(input_ids=ids, labels=ids).loss * 50).backward()
    named = dict(ours.named_parameters())
    for parameter_name, parameter in theirs.named_parameters():
        assert_agrees(named[parameter_name].grad, parameter.grad, name=parameter_name)

    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    documents = packed([random_ids(n, seed=n) for n in (9, 3, 11)])
    with torch.no_grad():
        assert_agrees(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)
        padded = [m(input_ids=ids, attention_mask=mask, position_ids=positions).logits for m in (theirs, ours)]
        assert_agrees(padded[0][1, 8:], padded[1][1, 8:])
        by_positions = {k: documents[k] for k in ("input_ids", "position_ids")}
        for given in (documents, by_positions):
            assert_agrees(theirs(**given, use_cache=False).logits, ours(**documents, use_cache=False).logits)
    expected = ours.generate(ids, attention_mask=mask, max_new_tokens=16, **GREEDY)
    assert torch.equal(theirs.generate(ids, attention_mask=mask, max_new_tokens=16, **GREEDY), expected)
    assert len(set(expected[1, 23:].tolist())) > 5


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("name", HOSTS)
def test_every_cache_and_padding_give_the_same_tokens(name: str, cache: dict[str, Any]) -> None:
    """As a dynamic cache and no padding do; past a sliding window."""
    model = host(name)
    prompts = [random_ids(n, seed=n) for n in (13, 5)]
    batch = torch.stack([torch.nn.functional.pad(p, (13 - len(p), 0)) for p in prompts])
    together = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=16, **cache, **GREEDY)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=16, **GREEDY)
        assert torch.equal(row[13:], alone[0, len(prompt) :])


def test_it_agrees_with_diffllama() -> None:
    """Transformers' DIFF V1: signal heads first, no weight in the sub-norm."""
    theirs = DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, attn_implementation="eager")).eval()
    randomise(theirs, std=0.25)
    ours = host(dtype=torch.float32)
    state = theirs.state_dict()
    for name, tensor in state.items():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            halves = tensor.view(2, -1, SIZES["head_dim"], SIZES["hidden_size"])
            state[name] = halves.transpose(0, 1).reshape(tensor.shape)
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([f"model.layers.{i}.self_attn.subln.weight" for i in range(2)], [])
    for layer in ours.model.layers:
        torch.nn.init.ones_(layer.self_attn.subln.weight)
    ids, mask = random_ids(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[0, :6] = 0
    with torch.no_grad():
        found, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, theirs))
    assert_agrees(found[0, 6:], expected[0, 6:])
    assert_agrees(found[1], expected[1])


class DifferentialLlama(LlamaForCausalLM):
    """What a user writes to save and load."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        add_lambdas(self)


def test_a_class_with_lambdas_trains_and_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DifferentialLlama(LlamaConfig(**SIZES)).train()
    ids = random_ids(4, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path)
    again = DifferentialLlama.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_options_of_the_lambdas() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, dtype="bfloat16")).to(torch.bfloat16)
    add_lambdas(model, lambda_init=0.1, sub_norm=False)
    for layer in model.model.layers:
        attention = layer.self_attn
        assert (attention.lambda_init, attention.out_scale, attention.subln) == (0.1, 1.0, None)
        assert attention.lambda_q1.dtype == torch.bfloat16
    plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    add_lambdas(plain)
    assert [layer.self_attn.lambda_init for layer in plain.model.layers] == pytest.approx([0.2, 0.35550907])


def test_what_the_interface_does_not_serve_is_refused() -> None:
    ids = random_ids(1, 5)
    bare = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=IMPLEMENTATION))
    with pytest.raises(ValueError, match=r"needs lambdas on LlamaAttention: call .*add_lambdas\(model\) first"):
        bare(input_ids=ids)
    with pytest.raises(ValueError, match="needs lambdas on DiffLlamaAttention"):
        DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, attn_implementation=IMPLEMENTATION))(input_ids=ids)
    with pytest.raises(ValueError, match=r"DiffLlamaForCausalLM has no attention modules with .* without lambdas"):
        add_lambdas(DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES)))
    odd = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1}))
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn has 1 key heads of width 8; DIFF V1 needs an even number"
    ):
        add_lambdas(odd)
    assert not hasattr(odd.model.layers[0].self_attn, "lambda_q1")
    odd = LlamaForCausalLM(LlamaConfig(**SIZES))
    odd.model.layers[1].self_attn.o_proj = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj reads 32 numbers, .* 64"):
        add_lambdas(odd)
    model = host(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        model(input_ids=ids)
    model = host()
    with pytest.raises(ValueError, match="a mask of every query and key"):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation is 'sdpa', which knows no lambdas"):
        model(input_ids=ids)
    model.set_attn_implementation(IMPLEMENTATION)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is causal, but LlamaAttention is not"):
        model(input_ids=ids)


def test_what_a_models_own_attention_computes_with_is_not_dropped() -> None:
    """gpt-oss's sinks, Llama 4's chunks, a mask that is not causal."""
    ids = random_ids(1, 9)
    sizes = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2}
    sinks = GptOssForCausalLM(GptOssConfig(**sizes))
    add_lambdas(sinks)
    with pytest.raises(ValueError, match="was given s_aux, which"):
        sinks(input_ids=ids)
    model = host()
    for name in ("s_aux", "position_bias", "block_table"):
        with pytest.raises(ValueError, match=f"was given {name}, which"):
            model(input_ids=ids, **{name: torch.zeros(8)})
    known = {"num_items_in_batch": 4, "s_aux": None, "output_attentions": False, "cu_seq_lens_k": None}
    torch.testing.assert_close(model(input_ids=ids, **known).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="is causal, but LlamaAttention is not"):
        model(input_ids=ids, is_causal=False)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32), "max_length_q": 5}
    with pytest.raises(ValueError, match="cu_seq_lens_k is"):
        model(input_ids=ids, use_cache=False, **bounds, cu_seq_lens_k=torch.tensor([0, 5, 9], dtype=torch.int32))

    embeds, config = torch.zeros(1, 9, 32), model.config
    seen = torch.tensor([[-1, 0, 0, 0, -1, -1, -1, -1, -1]])
    with pytest.raises(ValueError, match="lets tokens see later ones"):
        create_causal_mask(config, embeds, torch.ones(1, 9), None, block_sequence_ids=seen)
    with pytest.raises(ValueError, match="a mask function of its own"):
        create_causal_mask(config, embeds, None, None, or_mask_function=lambda b, h, q, k: q == k + 1)
    config.attention_chunk_size = 4
    with pytest.raises(ValueError, match="in chunks of 4 tokens"):
        create_chunked_causal_mask(config, embeds, None, None)
    config.sliding_window = 5
    window = create_sliding_window_causal_mask(config, embeds, None, None)
    heads = [torch.zeros(1, n, 9, 8) for n in (8, 4, 4)]
    with pytest.raises(ValueError, match="has a window of 5 tokens, but its attention was called with"):
        paired_attention(model.model.layers[0].self_attn, *heads, window)
