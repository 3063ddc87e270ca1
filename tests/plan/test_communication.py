"""What a plan says of messages, against sizes worked out by hand."""

import dataclasses
from typing import Any

import pytest

from helpers.planned import SEQ_LEN, config_of, small_recipe
from helpers.tiny import MOTIF_3
from motifarch.models.motif import MotifForCausalLM
from motifarch.plan import GPUS, make_plan
from motifarch.plan.communication import Traffic


def traffic(gpus: int, domain: int = 8, **fields: Any) -> dict[tuple[str, str], Traffic]:
    gpu = dataclasses.replace(GPUS["h100"], domain=domain)
    plan = make_plan(small_recipe(**fields), gpu, gpus, seq_len=SEQ_LEN)
    return {(t.name, t.kind): t for t in plan.trace.traffic}


def sizes() -> tuple[int, int]:
    """Numbers of the decoder layers, and of what is outside of them."""
    model = MotifForCausalLM(config_of(small_recipe()))
    layers = sum(p.numel() for p in model.model.layers.parameters())
    return layers, sum(p.numel() for p in model.parameters()) - layers


@pytest.mark.parametrize("micro_size", [4, 1])
def test_fsdp_gathers_twice_and_reduces_once_a_micro_batch(micro_size: int) -> None:
    """Layers are gathered twice a micro-batch, the rest once; all gradients travel once."""
    layers, outside = sizes()
    found = traffic(4, batch__micro_size=micro_size)
    micro_batches = 4 // micro_size
    gathered = micro_batches * (2 * layers + outside) * 4 * 3 / 4
    # Shards are padded to equal size, which the small vectors of a small model show.
    assert found["FSDP", "all-gather"].sent == pytest.approx(gathered, rel=2e-2)
    reduced = micro_batches * (layers + outside) * 4 * 3 / 4
    assert found["FSDP", "reduce-scatter"].sent == pytest.approx(reduced, rel=2e-2)
    assert found["FSDP", "all-gather"].calls == micro_batches * (2 * 2 + 1)


def test_hsdp_all_reduces_shards() -> None:
    layers, outside = sizes()
    found = traffic(8, domain=4, parallel__replicate=2, parallel__shard=4, batch__micro_size=1)
    assert found["HSDP", "all-reduce"].sent == pytest.approx((layers + outside) / 4 * 4 * 2 * 1 / 2, rel=2e-2)
    assert found["HSDP", "all-reduce"].link == "network"
    assert found["FSDP", "all-gather"].link == "NVLink"
    assert traffic(8, domain=8, parallel__replicate=2)["HSDP", "all-reduce"].link == "NVLink"
    assert traffic(8, domain=2, parallel__replicate=2)["FSDP", "all-gather"].link == "network"


def test_tensor_parallel_messages() -> None:
    """Hidden states once each way and block, PolyNorm's three sums a row once each way."""
    found = traffic(2, parallel__tensor=2, batch__size=2)["tensor parallel", "all-reduce"]
    rows = 2 * SEQ_LEN
    hidden = rows * 64 * 4  # float32
    layers = 2 * (2 * 2 * hidden + 2 * 4 * (3 * rows + 1))
    loss = hidden + rows * 4 * 3  # d_hidden, the largest logits, and two sums
    embedding = hidden
    assert found.sent == pytest.approx(layers + loss + embedding, rel=2e-2)
    assert found.blocking


def test_latents_are_what_tensor_parallelism_sums_backward() -> None:
    """Of Motif-3's attention, in place of hidden states; nothing for routers and routed experts."""
    fields = {f"model__{name}": value for name, value in MOTIF_3.items()}
    found = traffic(2, parallel__tensor=2, batch__size=2, **fields)["tensor parallel", "all-reduce"]
    rows = 2 * SEQ_LEN
    attention = 32 + 16 + 16 + 4 + 4  # hidden states; both latents, the key's rotated part and lambda
    feed_forward = 32 + 32 + 2 * 3  # hidden states and PolyNorm's sums, each way
    head = 32 + 3  # d_hidden, the largest logits, and two sums
    # Three layers and that of multi-token prediction, which has the head too; and the embedding.
    assert found.sent == pytest.approx(4 * rows * (4 * (attention + feed_forward) + 2 * head + 32), rel=1e-2)


def test_ulysses_and_muon_messages() -> None:
    """Queries, keys, values and attention's result, each way; whole matrices both ways."""
    found = traffic(2, parallel__context=2, batch__size=2, optim__name="muon")
    rows = 2 * SEQ_LEN // 2
    heads = (12 + 8 + 8) * 8 + 8 * 16  # q, k, v, and 8 signal heads of width 16
    assert found["Ulysses", "all-to-all"].sent == pytest.approx(2 * 2 * rows * heads * 4 / 2)
    assert found["Ulysses", "all-to-all"].calls == 2 * 2 * 2
    model = MotifForCausalLM(config_of(small_recipe()))
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    muon = found["Muon", "all-to-all"]
    # bf16, there and back; a rank owns about half of the matrices and sends its part of the others.
    assert muon.sent == pytest.approx(2 * matrices / 2 * 2 / 2, rel=0.2)
    assert muon.calls == 2
