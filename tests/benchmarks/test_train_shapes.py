"""The training-step benchmark's named models: their sizes, counted operations, and the peaks they
are held to.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import CONTENDERS, LLAMAS, Sizes, count_parameters, match_parameters
from benchmarks.shapes import SHAPES, WHOLE_2_6B, default_shape, find_peak

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = Sizes(128, num_layers=2, head_dim=16, vocab_size=96, intermediate_size=352, intermediate_multiple=8)


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / name / "base.yaml").read_text())["model"]  # type: ignore[no-any-return]


def test_the_300m_shape_is_the_recipes_model() -> None:
    shape = SHAPES["300m"]
    entries = match_parameters(shape.models, shape.sizes)
    assert {"gda", *LLAMAS} <= entries.keys()
    for entry in entries.values():
        assert entry.parameters == pytest.approx(300e6, rel=0.03)
        assert entry.relative_parameters == pytest.approx(1, rel=0.01)
    with torch.device("meta"):
        config = entries["gda"].build(dataclasses.replace(shape.sizes, max_positions=4096)).config.to_dict()
    described = recipe("ablation_300m")
    described["vocab_size"] = 32_000  # what its comment says of the tokenizer
    assert {name: config[name] for name in described} == described


def test_the_2_6b_shape_is_the_released_model_with_fewer_layers() -> None:
    whole = match_parameters(["diff_v1"], WHOLE_2_6B)["diff_v1"]
    assert (whole.parameters, whole.intermediate_size) == (2_597_218_432, 8192)
    described, kept = recipe("motif_2.6b"), SHAPES["2.6b"].sizes
    names = ("hidden_size", "head_dim", "vocab_size", "intermediate_size")
    assert [getattr(WHOLE_2_6B, name) for name in names] == [described[name] for name in names]
    assert WHOLE_2_6B.num_layers == described["num_hidden_layers"]
    assert WHOLE_2_6B.heads == described["num_attention_heads"]
    # The cut: as large a part of the layers as of the vocabulary, and nothing else.
    assert kept.num_layers / WHOLE_2_6B.num_layers == kept.vocab_size / WHOLE_2_6B.vocab_size == 1 / 8
    whole_again = dataclasses.replace(kept, num_layers=32, vocab_size=219_520)
    assert whole_again == WHOLE_2_6B
    # A part keeps its share of the operations too.
    cut = match_parameters(["diff_v1"], kept)["diff_v1"].operations_per_token(kept, 4096)
    assert cut * 8 == pytest.approx(whole.operations_per_token(WHOLE_2_6B, 4096))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shapes_batch_has_whole_rows_and_its_models_fit_a_gpu(name: str) -> None:
    shape = SHAPES[name]
    assert all(shape.tokens_per_step % seq_len == 0 for seq_len in shape.seq_lens)
    # Between turns each keeps float32 weights and two moments; 30 GiB are left for the one whose
    # turn it is.
    kept = sum(12 * entry.parameters for entry in match_parameters(shape.models, shape.sizes).values())
    assert kept < 40 * 2**30


@pytest.mark.parametrize("name", SHAPES)
def test_shrunk_it_keeps_its_proportions(name: str) -> None:
    shape = SHAPES[name]
    tiny = shape.sizes.shrunk()
    assert tiny.heads == shape.sizes.heads
    assert (tiny.head_dim, tiny.num_layers, tiny.tied) == (16, 2, shape.sizes.tied)
    for field in ("intermediate_size", "vocab_size"):
        ratio = getattr(tiny, field) / tiny.hidden_size
        assert ratio == pytest.approx(getattr(shape.sizes, field) / shape.sizes.hidden_size, rel=1e-3)
    for entry in match_parameters(shape.models, tiny).values():
        assert entry.parameters < 4e6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("name", "heads", "value_width"), [("llama", 8, 16), ("gda", 10, 32)])
def test_operations_are_those_that_torch_counts(name: str, heads: int, value_width: int, tied: bool) -> None:
    """With maps in memory torch counts whole maps: a token sees (S + 1) / 2 of the S pairs that are
    multiplied.
    """
    sizes, length = dataclasses.replace(SMALL, tied=tied), 24
    entry = match_parameters([name], sizes)[name]
    eager = dataclasses.replace(entry.contender, attention="eager")
    model = eager.build(sizes, entry.intermediate_size)
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    hidden_pairs = length - (length + 1) / 2
    hidden = 3 * 2 * heads * (16 + value_width) * sizes.num_layers * hidden_pairs
    extra = counter.get_total_flops() / length - entry.operations_per_token(sizes, length) - hidden
    # Some versions of transformers make rotary angles by a product of positions and head_dim / 2
    # frequencies.
    assert extra in ((0, sizes.head_dim) if name == "llama" else (0,))


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if c.library == "transformers"])
def test_a_rivals_twin_multiplies_by_as_many_weights(name: str) -> None:
    entry = match_parameters([name], SMALL)[name]
    with torch.device("meta"):
        rival = entry.contender.builder(SMALL, entry.intermediate_size, "eager")
        twin = entry.contender.twin(SMALL, entry.intermediate_size, "auto")
    sizes = [[m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)] for model in (rival, twin)]
    assert sorted(sizes[0]) == sorted(sizes[1])


def test_tied_embeddings_are_counted_once_and_multiplied_by() -> None:
    tied, untied = (dataclasses.replace(SMALL, tied=t) for t in (True, False))
    for name in ("llama", "gda", "diffllama_sdpa"):
        with torch.device("meta"):
            counts = [count_parameters(CONTENDERS[name].build(sizes, 352)) for sizes in (tied, untied)]
        assert counts[1] - counts[0] == SMALL.vocab_size * SMALL.hidden_size
    entry = match_parameters(["llama"], SMALL)["llama"]
    assert entry.operations_per_token(tied, 64) == entry.operations_per_token(untied, 64)


@pytest.mark.parametrize(
    ("device", "flops", "text"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, "MFU is of 989 TFLOP/s, the dense bf16 peak of H100 SXM"),
        ("NVIDIA H200", 989.4e12, "MFU is of 989 TFLOP/s, the dense bf16 peak of H200 SXM"),
        ("NVIDIA B200", 2250e12, "MFU is of 2,250 TFLOP/s, the dense bf16 peak of B200 (HGX)"),
        ("NVIDIA H100 PCIe", None, "no MFU: the dense bf16 peak of NVIDIA H100 PCIe is not known here"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, "no MFU"),
        ("NVIDIA GeForce RTX 4090", None, "no MFU: the dense bf16 peak of NVIDIA GeForce RTX 4090 is not known here"),
    ],
)
def test_the_denominator_of_mfu_is_the_gpus_dense_peak(device: str, flops: float | None, text: str) -> None:
    gpu, said = find_peak(device)
    assert said.startswith(text)
    assert (gpu and gpu.bf16_flops) == flops


def test_the_default_shape_suits_the_device() -> None:
    assert (default_shape("cpu"), default_shape("cuda")) == ("small", "300m")


def test_ours_take_what_users_get_and_llama_each_attention_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {c.attention for c in CONTENDERS.values() if c.library == "motifarch"} == {"auto"}
    assert CONTENDERS["llama_cudnn"].unavailable("cuda") is None
    assert CONTENDERS["llama_cudnn"].unavailable("cpu") == "cuDNN's attention needs a GPU"
    found = "transformers.utils.import_utils.is_flash_attn_{}_available"
    for generation, installed in (2, True), (3, False):
        monkeypatch.setattr(found.format(generation), lambda installed=installed: installed)
    assert CONTENDERS["llama_flash2"].unavailable("cuda") is None
    assert CONTENDERS["llama_flash3"].unavailable("cuda") == "flash-attn 3 is not installed"


@pytest.mark.parametrize("compiled", [False, True])
def test_llama_by_cudnn_asks_for_no_other_kernel(compiled: bool) -> None:
    """On a CPU there is no cuDNN: that torch refuses shows that it was not free to take another."""
    entry = match_parameters(["llama_cudnn"], SMALL)["llama_cudnn"]
    model: Any = entry.build(SMALL)
    if compiled:
        model.model.layers[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"[Nn]o (available|viable)"):
        model(input_ids=torch.arange(8)[None])
