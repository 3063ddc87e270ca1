"""Attention of the user's own in the models, named by its import path."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from helpers.models import packed, random_ids, tiny_model
from motifarch.layers import SoftmaxAttention
from motifarch.models import register_attention
from motifarch.models.motif import MotifConfig, MotifForCausalLM

GATED = "examples.gated_softmax:GatedSoftmax"
FUNCTION = "models.test_own_attention:llamas"
LINEAR = "models.test_own_attention:LinearAttention"


def llamas(*arguments: Any, **options: Any) -> Any:
    """Attention by maps, as transformers' Llama has it."""
    return eager_attention_forward(*arguments, **options)


class LinearAttention(SoftmaxAttention):
    """No softmax at all: keys times values, summed up to each token (arXiv 2006.16236)."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **options: Any) -> Tensor:
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        state = torch.einsum("bshd,bshe->bshde", F.elu(k) + 1, v).cumsum(1)
        state = state.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return self.o_proj(torch.einsum("bshd,bshde->bshe", F.elu(q) + 1, state).flatten(2))

    def attention_flops(self, seq_len: int) -> float:
        return 4.0 * self.num_heads * self.head_dim**2 * seq_len


class Trusted(SoftmaxAttention):
    """One that nothing has registered."""


def model_of(attention_type: str) -> MotifForCausalLM:
    register_attention(attention_type)
    return tiny_model("softmax", attention_type=attention_type)


def test_a_class_is_made_and_computes_what_its_paper_says() -> None:
    model = model_of(GATED)
    layer: Any = model.model.layers[0].self_attn
    x, (rotary,) = torch.randn(2, 13, model.config.hidden_size), model.model.rotary_embs.values()
    cos, sin = rotary(torch.arange(13)[None], torch.float32)

    def heads(proj: nn.Linear) -> Tensor:
        return proj(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

    q, k = (t * cos + rotate_half(t) * sin for t in (heads(layer.q_proj), heads(layer.k_proj)))
    expected = F.scaled_dot_product_attention(q, k, heads(layer.v_proj), is_causal=True, enable_gqa=True)
    expected = layer.o_proj((expected * heads(layer.gate_proj).sigmoid()).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, (cos, sin)), expected, atol=1e-5, rtol=1e-5)


def test_a_class_generates_with_a_cache_and_keeps_documents_apart() -> None:
    model, ids = model_of(GATED), random_ids(2, 11)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found, expected = (model.generate(ids, use_cache=cached, **options) for cached in (True, False))  # type: ignore[operator]
    assert found.tolist() == expected.tolist()
    documents = [random_ids(n, seed=n) for n in (9, 3, 11)]
    with torch.no_grad():
        alone = torch.cat([model(d[None] if d.ndim == 1 else d).logits.flatten(0, 1) for d in documents])
        torch.testing.assert_close(model(**packed(documents)).logits.flatten(0, 1), alone, atol=2e-5, rtol=1e-5)


def test_a_function_stands_under_a_softmax_layer_and_stays_with_the_folder(tmp_path: Any) -> None:
    model, softmax = model_of(FUNCTION), tiny_model("softmax")
    model.load_state_dict(softmax.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, mask = random_ids(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[0, :9] = 0
    documents = packed([random_ids(n, seed=n) for n in (9, 3, 11)])
    with torch.no_grad():
        for made in (model, loaded):
            assert made.config._attn_implementation == FUNCTION
            found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (made, softmax))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(made(**documents).logits, softmax(**documents).logits, atol=2e-5, rtol=1e-5)


def test_a_class_says_its_own_flops() -> None:
    linear, softmax = model_of(LINEAR), tiny_model("softmax")
    config = linear.config
    difference = linear.flops_per_token(64) - softmax.flops_per_token(64)
    per_head = 4.0 * config.head_dim**2 - 4.0 * config.head_dim * (64 + 1) / 2
    assert difference == pytest.approx(3 * config.num_hidden_layers * config.num_attention_heads * per_head)
    linear(random_ids(2, 9)).logits.sum().backward()


def test_a_config_alone_imports_nothing() -> None:
    config = MotifConfig(**(tiny_model("softmax").config.to_dict() | {"attention_type": "antigravity:fly"}))
    with pytest.raises(ValueError, match=r"'antigravity:fly' is code that was not imported.*register_attention"):
        MotifForCausalLM(config)
    assert "antigravity" not in sys.modules


def test_the_environment_says_what_configs_may_import(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "models.test_own_attention:Trusted"
    config = MotifConfig(**(tiny_model("softmax").config.to_dict() | {"attention_type": path}))
    monkeypatch.setenv("MOTIF_ATTENTION", f"another.module:Attention,{path}")
    assert type(MotifForCausalLM(config).model.layers[0].self_attn).__name__ == "Trusted"


NO_ATTENTION = [
    ("no_such_module:Attention", r"can't be imported \(ModuleNotFoundError.*no_such_module"),
    ("examples.gated_softmax:Gated", r"can't be imported \(AttributeError.*'Gated'"),
    ("torch.nn:Linear", r"not derived from motifarch\.layers\.BaseAttention.*SoftmaxAttention"),
    ("math:pi", "neither a class nor a function, but float"),
]


@pytest.mark.parametrize(("path", "message"), NO_ATTENTION, ids=[path for path, _ in NO_ATTENTION])
def test_what_is_no_attention_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_attention(path)
