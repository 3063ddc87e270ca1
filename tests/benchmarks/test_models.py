"""The models that are compared: parameters, heads, FLOPs, GPUs' peaks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import motif_kernels.flops  # noqa: F401  (registers the attention operators' formulas)
from benchmarks.models.providers import LLAMAS, PROVIDERS, Sizes, match_parameters
from benchmarks.models.shapes import MOTIF_2_6B, SHAPES, find_peak

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = Sizes(128, num_layers=2, head_dim=16, vocab_size=96, intermediate_size=352, intermediate_multiple=8)


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / name / "base.yaml").read_text())["model"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(hidden_size=640, gda_heads=10), SMALL])
def test_parameters_match_at_every_geometry(sizes: Sizes) -> None:
    names = PROVIDERS.keys() - ({"gda_narrow"} if sizes.heads % 8 else set())
    matched = match_parameters(names, sizes)
    assert matched.keys() == names
    for model in matched.values():
        assert 0.97 <= model.relative_parameters <= 1.03
        if model.provider.unsupported_reason("cpu") is None and sizes == SMALL:
            assert model.build(sizes).num_parameters() == model.parameters


@pytest.mark.parametrize(("name", "heads"), [("gda", (10, 2, 4)), ("gda_narrow", (5, 1, 2)), ("diff_v1", (8, 4, 8))])
def test_heads_have_the_proportions_that_are_claimed(name: str, heads: tuple[int, int, int]) -> None:
    sizes = Sizes(num_layers=1)
    config = match_parameters([name], sizes)[name].build(sizes).config
    assert (config.num_attention_heads, config.noise_heads, config.num_key_value_heads) == heads


def test_the_300m_shape_is_the_recipes_model() -> None:
    shape = SHAPES["300m"]
    matched = match_parameters(shape.models, shape.sizes)
    assert {"gda", *LLAMAS} <= matched.keys()
    for model in matched.values():
        assert model.parameters == pytest.approx(300e6, rel=0.03)
    with torch.device("meta"):
        config = matched["gda"].build(dataclasses.replace(shape.sizes, max_positions=4096)).config.to_dict()
    described = recipe("ablation_300m")
    described["vocab_size"] = 32_000  # what its comment says of the tokenizer
    assert {name: config[name] for name in described} == described


def test_the_2_6b_shape_is_the_released_model_with_an_eighth_of_its_layers() -> None:
    whole, kept = match_parameters(["diff_v1"], MOTIF_2_6B)["diff_v1"], SHAPES["2.6b"].sizes
    assert (whole.parameters, whole.intermediate_size) == (2_597_218_432, 8192)
    described = recipe("motif_2.6b")
    for name in ("hidden_size", "head_dim", "vocab_size", "intermediate_size"):
        assert getattr(MOTIF_2_6B, name) == described[name]
    assert dataclasses.replace(kept, num_layers=32, vocab_size=219_520) == MOTIF_2_6B
    cut = match_parameters(["diff_v1"], kept)["diff_v1"].flops_per_token(kept, 4096)
    assert cut * 8 == pytest.approx(whole.flops_per_token(MOTIF_2_6B, 4096))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("name", "heads", "v_head_dim"), [("llama", 8, 16), ("gda", 10, 32)])
def test_flops_are_those_that_torch_counts(name: str, heads: int, v_head_dim: int, tied: bool) -> None:
    """With maps in memory torch counts whole maps: a token sees (S + 1) / 2 of the S pairs."""
    sizes, length = dataclasses.replace(SMALL, tied=tied), 24
    matched = match_parameters([name], sizes)[name]
    model = dataclasses.replace(matched.provider, attention="eager").build(sizes, matched.intermediate_size)
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    masked = 3 * 2 * heads * (16 + v_head_dim) * sizes.num_layers * (length - (length + 1) / 2)
    extra = counter.get_total_flops() / length - matched.flops_per_token(sizes, length) - masked
    # Some versions of transformers make rotary angles by a product of positions and head_dim / 2
    # frequencies.
    assert extra in ((0, sizes.head_dim) if name == "llama" else (0,))


@pytest.mark.parametrize("name", ["llama", "diffllama_eager"])
def test_a_twin_has_the_matrices_of_transformers_model(name: str) -> None:
    matched = match_parameters([name], SMALL)[name]
    twin = dataclasses.replace(matched.provider, library="motifarch", attention="auto")
    models = [p.build(SMALL, matched.intermediate_size) for p in (matched.provider, twin)]
    sizes = [sorted(m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)) for model in models]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("device", "flops", "text"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, "MFU is of 989 TFLOP/s, the dense bf16 peak of H100 SXM"),
        ("NVIDIA B200", 2250e12, "MFU is of 2,250 TFLOP/s, the dense bf16 peak of B200 (HGX)"),
        ("NVIDIA H100 PCIe", None, "no MFU: the dense bf16 peak of NVIDIA H100 PCIe is not known here"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, "no MFU"),
    ],
)
def test_the_denominator_of_mfu_is_the_gpus_dense_peak(device: str, flops: float | None, text: str) -> None:
    gpu, said = find_peak(device)
    assert said.startswith(text)
    assert (gpu and gpu.bf16_flops) == flops


def test_llama_by_cudnn_asks_for_no_other_kernel() -> None:
    """On a CPU there is no cuDNN: that torch fails shows that it was not free to take another."""
    model: Any = match_parameters(["llama_cudnn"], SMALL)["llama_cudnn"].build(SMALL)
    with pytest.raises(RuntimeError, match=r"[Nn]o (available|viable)"):
        model(input_ids=torch.arange(8)[None])
