"""A plan's bytes are those that real ranks allocate."""

import json
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.planned import SEQ_LEN, config_of, measure_ranks, small_recipe
from motifarch.models.motif import MotifForCausalLM
from motifarch.plan import find_gpu, make_plan, memory

LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP 4": {"parallel__shard": 4},
    "TP 2 x FSDP 2": {"parallel__shard": 2, "parallel__tensor": 2},
    "HSDP 2 x 2": {"parallel__shard": 2, "parallel__replicate": 2},
    "CP 2 x FSDP 2": {"parallel__shard": 2, "parallel__context": 2},
}
CASES = {
    f"{layout}, {name}": small_recipe(optim__name=name, **fields)
    for layout, fields in LAYOUTS.items()
    for name in ("adamw", "muon")
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """What each of four real ranks allocated, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(4, measure_ranks, folder, CASES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_real_ranks(case: str, measured: list[dict[str, dict[str, int]]]) -> None:
    for rank in (0, 3):
        found = make_plan(CASES[case], find_gpu("h100"), 4, seq_len=SEQ_LEN, rank=rank).trace
        real = measured[rank][case]
        assert real["parameters"] > 0
        assert {name: getattr(found, name) for name in real} == real


@pytest.mark.parametrize("variant", ["gda", "diff_v1", "diff_v2", "softmax"])
def test_activations_are_what_a_real_forward_pass_keeps(variant: str) -> None:
    recipe = small_recipe(variant, parallel__shard=1, batch__micro_size=2, batch__size=2)
    recipe.model.attn_implementation = "eager"
    torch.manual_seed(0)
    model = MotifForCausalLM(config_of(recipe, "eager")).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    ids = torch.randint(0, 320, (2, 256))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model(input_ids=ids)
    planned = make_plan(recipe, find_gpu("h100"), 1, seq_len=256).trace.activations
    # The plan also has what is alive without being saved: the hidden states that the loss takes,
    # tables of positions.
    assert sum(kept.values()) <= planned <= 1.05 * sum(kept.values())


def test_recomputing_keeps_less() -> None:
    def activations(mode: Any) -> int:
        recipe = small_recipe(activation_checkpointing=mode)
        return make_plan(recipe, find_gpu("h100"), 4, seq_len=256).trace.activations

    assert activations("full") < activations(2) < activations("none")
    assert activations("full") < activations("selective") < activations("none")


@pytest.mark.parametrize("layout", [{}, {"parallel__replicate": 2}], ids=["fsdp", "hsdp"])
def test_micro_batches_keep_no_whole_gradients(layout: dict[str, Any]) -> None:
    """Gradients wait for the next micro-batch in shards; beside them is the layer being reduced."""
    single = make_plan(small_recipe(batch__micro_size=8, **layout), find_gpu("h100"), 4, seq_len=SEQ_LEN)
    several = make_plan(small_recipe(batch__micro_size=1, **layout), find_gpu("h100"), 4, seq_len=SEQ_LEN)
    assert single.trace.micro_batches < several.trace.micro_batches
    whole = 4 * several.trace.parameter_count
    assert several.memory[memory.GRADIENTS] - single.memory[memory.GRADIENTS] < whole / 4


def test_gathered_layers() -> None:
    """FSDP2 gathers a layer in the compute dtype, with tensor parallelism its part."""
    recipe = small_recipe(precision__compute="bfloat16")
    model = MotifForCausalLM(config_of(recipe))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    found = make_plan(recipe, find_gpu("h100"), 4, seq_len=SEQ_LEN)
    outside = found.trace.parameter_count - 2 * layer
    assert found.trace.largest_layer == 2 * layer
    assert found.trace.outside_layers == 2 * outside
    halved = make_plan(small_recipe(parallel__tensor=2), find_gpu("h100"), 4, seq_len=SEQ_LEN).trace
    matrices = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    assert halved.largest_layer == 4 * (layer - matrices // 2)


@pytest.mark.parametrize(("freed", "kept"), [(1.0, 0), (0.5, 3), (0.0, 6)])
def test_gathered_layers_at_their_peak(freed: float, kept: int) -> None:
    """Of the layer in use and those that stay, the parameters; and the messages, padded to equal
    parts, that brought it and bring its neighbour.
    """
    recipe = small_recipe(model__num_hidden_layers=6, parallel__reshard_after_forward=freed)
    found = make_plan(recipe, find_gpu("h100"), 4, seq_len=SEQ_LEN)
    expected = found.trace.outside_layers + (max(1, kept) + 2) * found.trace.largest_layer
    assert found.memory[memory.GATHERED] == pytest.approx(expected, rel=1e-3)
