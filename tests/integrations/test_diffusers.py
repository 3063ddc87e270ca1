"""The attention processor for diffusers, on its transformers, against its own and the formula."""

from importlib.util import find_spec

import pytest
import torch

from helpers.agreement import assert_agrees, randomise
from motifarch.errors import UserError

if find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention

from motifarch.integrations.diffusers import DifferentialAttnProcessor, load_patched, patch

SIZES = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4, "in_channels": 2}


def dit():
    inputs = {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([0, 2])}
    return DiTTransformer2DModel(**SIZES, norm_num_groups=1, num_embeds_ada_norm=5), inputs


def pixart():
    model = PixArtTransformer2DModel(**SIZES, cross_attention_dim=32, caption_channels=6, norm_num_groups=1)
    inputs = {"timestep": torch.tensor([3, 500]), "encoder_hidden_states": torch.randn(2, 5, 6)}
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    condition = {"resolution": None, "aspect_ratio": None}
    return model, {**inputs, "encoder_attention_mask": mask, "added_cond_kwargs": condition}


def sd3():
    wide = {"joint_attention_dim": 6, "caption_projection_dim": 32, "pooled_projection_dim": 10}
    extra = {"pos_embed_max_size": 4, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    inputs = {"encoder_hidden_states": torch.randn(2, 5, 6), "pooled_projections": torch.randn(2, 10)}
    return SD3Transformer2DModel(**SIZES, **wide, **extra), {**inputs, "timestep": torch.tensor([3, 500])}


MODELS = {"dit": (dit, 2), "pixart": (pixart, 4), "sd3": (sd3, 3)}


def made(name):
    """A model of random weights, its inputs, and how many attention modules it has."""
    make, count = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for p in model.parameters():  # adaLN-Zero's projections too, which start at 0
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval(), {"hidden_states": torch.randn(2, 2, 4, 4), **inputs}, count


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_starts_as_it_was_trains_and_loads(name, tmp_path):
    model, inputs, count = made(name)
    with torch.no_grad():
        before = model(**inputs).sample
    assert len(patch(model, ratio=2)) == count
    assert_agrees(model(**inputs).sample, before, 1e-5)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):  # noise queries get a gradient once lambda has left 0
        optimizer.zero_grad()
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
    unused = [n for n, p in model.named_parameters() if "processor" in n and not p.grad.abs().max() > 0]
    # Stable Diffusion 3's last block throws away what its second kind of tokens attended to.
    assert not [n for n in unused if "blocks.1.attn.processor.context_noise_queries" not in n]

    with torch.no_grad():
        after = model.eval()(**inputs).sample
        assert (after - before).abs().max() > 1e-4
        model.save_pretrained(tmp_path)
        loaded = load_patched(type(model), tmp_path)
        assert type(loaded) is type(model)
        assert torch.equal(loaded(**inputs).sample, after)
        assert loaded.config["motifarch"] == {"ratio": 2, "lambda_init": 0.0, "sub_norm": False}


@pytest.mark.parametrize("cross", [False, True])
def test_noise_is_the_formula_s(cross):
    """Each two heads share a noise head, which has the first one's keys; a mask hides keys."""
    attention = Attention(12, cross_attention_dim=10 if cross else None, heads=4, dim_head=4, bias=True).double()
    processor = DifferentialAttnProcessor(attention, ratio=2, lambda_init=0.3, sub_norm=True)
    attention.set_processor(processor)
    randomise(attention)
    x, context = torch.randn(2, 6, 12).double(), torch.randn(2, 5, 10).double()
    context = context if cross else x
    mask = torch.randn(2, 1, context.shape[1], dtype=torch.float64)
    with torch.no_grad():
        projected = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        q, k, v, noise_q = (t.split(4, dim=-1) for t in (*projected, processor.noise_queries.proj(x)))
        vectors = processor.attention.lambda_vectors
        lam = (vectors.lambda_q1 @ vectors.lambda_k1).exp() - (vectors.lambda_q2 @ vectors.lambda_k2).exp() + 0.3
        heads = []
        for h in range(4):
            signal = (q[h] @ k[h].mT / 2 + mask).softmax(-1)
            noise = (noise_q[h // 2] @ k[h // 2 * 2].mT / 2 + mask).softmax(-1)
            out = (signal - lam * noise) @ v[h]
            out = out / out.square().mean(-1, keepdim=True).add(1e-5).sqrt() * processor.attention.subln.weight
            heads.append(0.7 * out)
        expected = attention.to_out[0](torch.cat(heads, dim=-1))
        ours = attention(x, encoder_hidden_states=context if cross else None, attention_mask=mask)
    assert_agrees(ours, expected, 1e-12)


def unserved():
    """Models that are refused, and why."""
    block = {"query_dim": 8, "heads": 4, "dim_head": 2}
    yield torch.nn.Linear(2, 2), "Linear has no attention of diffusers' class"
    yield torch.nn.ModuleDict({"a": Attention(**block, norm_num_groups=2)}), "a has group_norm"
    yield torch.nn.ModuleDict({"a": Attention(**block, kv_heads=2)}), "a has fewer key/value heads"
    other = Attention(**block)
    other.set_processor(type("RotaryProcessor", (), {})())
    yield torch.nn.ModuleDict({"a": other}), "a has the processor RotaryProcessor"


@pytest.mark.parametrize(("model", "message"), unserved())
def test_what_is_not_served_is_refused_by_name(model, message):
    with pytest.raises(UserError, match=message):
        patch(model)


def test_a_ratio_that_does_not_fit_leaves_the_model_as_it_was():
    model, _, _ = made("dit")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"ratio=3 does not divide the 4 heads.*1, 2, 4"):
        patch(model, ratio=3)
    assert list(model.state_dict()) == keys


def test_a_folder_that_was_not_patched_is_refused(tmp_path):
    model, _, _ = made("dit")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="says nothing of a patch"):
        load_patched(DiTTransformer2DModel, tmp_path)
