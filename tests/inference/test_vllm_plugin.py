"""The vLLM plugin: registration, heads, weight mapping, and a layer against ours.

vLLM brings a torch of its own, so an environment of its own runs this file, and others skip it. It
needs no GPU: VLLM_TARGET_DEVICE=cpu, and attention is torch's, called as vLLM's is.
"""

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.models import VARIANTS, random_ids, tiny_model

vllm = pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    from motifarch.inference.vllm_plugin import register

    register()
    register()  # as vLLM may


def test_the_entry_point_is_found_by_vllm():
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    found = {e.name: e.value for e in importlib.metadata.entry_points(group=DEFAULT_PLUGINS_GROUP)}
    assert found["motif"] == "motifarch.inference.vllm_plugin:register"


def test_the_registry_names_the_class():
    from vllm import ModelRegistry

    assert "MotifForCausalLM" in ModelRegistry.get_supported_archs()
    assert ModelRegistry._try_load_model_cls("MotifForCausalLM").__module__ == "motifarch.inference.vllm_model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_vllm_sees_the_heads_as_attention_does(variant, tmp_path):
    from transformers import AutoConfig
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    model = tiny_model(variant)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    architecture = MODEL_ARCH_CONFIG_CONVERTORS[config.model_type](config, config)
    own = model.config
    assert architecture.get_head_size() == own.v_head_dim
    assert architecture.get_total_num_attention_heads() == own.num_attention_heads
    assert architecture.get_total_num_kv_heads() * own.v_head_dim == own.num_key_value_heads * own.head_dim
    assert architecture.get_num_hidden_layers() == own.num_hidden_layers


class StandInAttention(torch.nn.Module):
    """vLLM's Attention as its interface calls it, on one sequence: (tokens, heads * width)."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, window: int | None) -> None:
        super().__init__()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.window = num_kv_heads, window

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tokens = len(query)
        q = query.view(tokens, self.num_heads, self.head_size).transpose(0, 1)
        k, v = (x.view(tokens, self.num_kv_heads, self.head_size).transpose(0, 1) for x in (key, value))
        ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
        seen = ahead <= 0 if self.window is None else (ahead <= 0) & (ahead > -self.window)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=self.scale, enable_gqa=True)
        return out.transpose(0, 1).reshape(tokens, -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_through_vllms_attention_interface(variant, tmp_path: Path):
    """The modules that vLLM finds, with the scale that it reads there."""
    from transformers import AutoModelForCausalLM
    from vllm.model_executor.models.transformers import vllm_attention_forward  # noqa: F401  # registers "vllm"
    from vllm.model_executor.models.transformers.fusers.attention import AttentionFuser

    wanted = tiny_model(variant)
    wanted.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model).__module__ == "motifarch.portable.modeling_motif"
    model.config._attn_implementation = "vllm"
    config = wanted.config
    for number, layer in enumerate(model.model.layers):
        fuser = AttentionFuser.match(None, layer.self_attn)
        assert fuser is not None, "vLLM does not see a call of the attention interface"
        assert fuser.layer_index(layer.self_attn) == number
        layer.self_attn.attn = StandInAttention(
            config.num_attention_heads,
            config.v_head_dim,
            fuser.scale(layer.self_attn),
            config.num_key_value_heads * config.head_dim // config.v_head_dim,
            config.sliding_window if config.use_sliding_window else None,
        )
    ids = random_ids(1, 23)
    positions = torch.arange(23)[None]
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False, position_ids=positions, return_dict=False)[0]
        torch.testing.assert_close(model.lm_head(hidden), wanted(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["gda", "diff_v2 gated", "softmax"])
def test_every_weight_has_a_place(variant, tmp_path):
    """VLLM's mapper, as its backend makes it, leads each saved name to a parameter of the model."""
    from transformers import AutoConfig

    from motifarch.inference.vllm_model import MotifForCausalLM

    wanted = tiny_model(variant)
    wanted.save_pretrained(tmp_path)
    backend = MotifForCausalLM.__new__(MotifForCausalLM)
    torch.nn.Module.__init__(backend)
    backend.config, backend.quant_config = AutoConfig.from_pretrained(tmp_path), None
    backend.model_config = SimpleNamespace(dtype=torch.float32, trust_remote_code=False)
    backend.model = backend._create_model()
    backend._create_hf_to_vllm_mapper()
    held = {name for name, _ in backend.named_parameters()} | {"lm_head.weight"}
    mapped = dict(backend.hf_to_vllm_mapper.apply(wanted.state_dict().items()))
    assert mapped.keys() == held
    for name, tensor in mapped.items():
        if name != "lm_head.weight":
            assert tensor.shape == backend.get_parameter(name).shape
