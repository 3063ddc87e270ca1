"""Packed documents are computed as if each were alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from helpers.agreement import assert_agrees
from helpers.models import VARIANTS, packed, random_ids, tiny_model

LENGTHS = [7, 1, 12, 1, 4, 9]


def documents():
    return [random_ids(1, n, seed=i)[0] for i, n in enumerate(LENGTHS)]


def shifted(document):
    return torch.cat([document[1:], document.new_tensor([-100])])


def conventions():
    """The ways to pass the same packed documents: name -> keyword arguments of the model."""
    docs = documents()
    batch = packed(docs)
    ids, bounds = batch["input_ids"], {k: v for k, v in batch.items() if k.startswith(("cu_seq", "max_length"))}
    targets = torch.cat([shifted(d) for d in docs])[None]
    features = [{"input_ids": d.tolist()} for d in docs]
    flattened = DataCollatorWithFlattening()(features)
    assert set(flattened) == {"input_ids", "labels", "position_ids"}
    with_bounds = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    return {
        "collator, positions alone": dict(flattened),
        "collator, bounds": dict(with_bounds),
        "labels and bounds alone": {"input_ids": ids, "labels": ids, **bounds},
        "labels, bounds and positions": {**batch, "labels": ids},
        "labels and positions": {"input_ids": ids, "labels": ids, "position_ids": batch["position_ids"]},
        "shift_labels, bounds and positions": {**batch, "shift_labels": targets},
        "shift_labels and positions": {
            "input_ids": ids,
            "shift_labels": targets,
            "position_ids": batch["position_ids"],
        },
        "with a mask of ones": {**batch, "labels": ids, "attention_mask": torch.ones_like(ids)},
    }


def alone(model):
    """Token-weighted mean loss of the documents one by one, and its gradients."""
    docs = [d for d in documents() if len(d) > 1]
    count = sum(len(d) - 1 for d in docs)
    loss = sum(model(input_ids=d[None], labels=d[None]).loss * (len(d) - 1) for d in docs) / count
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_loss_and_gradients_are_the_documents_own(variant, attention):
    model = tiny_model(variant, attn_implementation=attention).train()
    exact, exact_gradients = alone(model)
    for name in ("collator, positions alone", "shift_labels, bounds and positions"):
        loss = model(**conventions()[name]).loss
        assert_agrees(loss, exact, name=name)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for ours, theirs in zip(gradients, exact_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("name", conventions())
def test_every_convention_means_the_same(name):
    model = tiny_model(dtype=torch.float64).train()
    assert_agrees(model(**conventions()[name]).loss, alone(model)[0], 1e-10)


def test_several_packed_rows():
    """Rows of positions that restart, as transformers reads them for any batch size."""
    model = tiny_model(dtype=torch.float64)
    rows = [[random_ids(1, n, seed=n)[0] for n in lengths] for lengths in ([3, 6, 1], [10], [2, 8])]
    ids = torch.stack([torch.cat(r) for r in rows])
    position_ids = torch.stack([torch.cat([torch.arange(len(d)) for d in r]) for r in rows])
    together = model(input_ids=ids, labels=ids, position_ids=position_ids)
    apart = [model(input_ids=d[None], labels=d[None]) for r in rows for d in r]
    assert_agrees(together.logits.flatten(0, 1), torch.cat([a.logits[0] for a in apart]), 1e-10)
    docs = [len(d) - 1 for r in rows for d in r]
    mean = sum(a.loss * n for a, n in zip(apart, docs, strict=True) if n) / sum(docs)
    assert_agrees(together.loss, mean, 1e-10)

    # One row of positions for every row of ids.
    shared = model(input_ids=ids[:2], position_ids=position_ids[:1]).logits
    assert_agrees(shared[0], together.logits[0], 1e-10)
    assert_agrees(shared[1, 3:9], model(input_ids=ids[1:2, 3:9]).logits[0], 1e-10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_s_tokens_never_reach_another(variant, attention):
    """Not one bit of the others' logits changes."""
    model = tiny_model(variant, attn_implementation=attention)
    batch = packed(documents())
    start, end = 8, 20  # the third document
    other = batch["input_ids"].clone()
    other[0, start:end] = (other[0, start:end] + 5) % 97
    for keys in (batch.keys(), ("input_ids", "position_ids")):
        arguments = {k: batch[k] for k in keys}
        before = model(**arguments).logits
        after = model(**(arguments | {"input_ids": other})).logits
        assert torch.equal(before[:, :start], after[:, :start])
        assert torch.equal(before[:, end:], after[:, end:])
        assert not torch.equal(before[:, start:end], after[:, start:end])


def test_sums_over_micro_batches_are_the_whole_batch():
    """With num_items_in_batch, micro-batches' losses add up to the global mean, z-loss included."""
    model = tiny_model(dtype=torch.float64).train()
    docs = [d for d in documents() if len(d) > 1]
    arguments = [{**packed([d]), "shift_labels": shifted(d)[None]} for d in docs]
    whole_batch = {**packed(docs), "shift_labels": torch.cat([shifted(d) for d in docs])[None]}
    whole = model(**whole_batch, z_loss_weight=1e-2)
    count = sum(len(d) - 1 for d in docs)
    parts = [model(**a, z_loss_weight=1e-2, num_items_in_batch=torch.tensor(count)) for a in arguments]
    assert_agrees(sum(p.loss for p in parts), whole.loss, 1e-10)
    assert_agrees(sum(p.z_loss for p in parts), whole.z_loss, 1e-10)
    assert_agrees(whole.loss - whole.z_loss, model(**whole_batch).loss, 1e-10)


def test_packing_and_padding_together_are_refused():
    model = tiny_model()
    batch = packed(documents())
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="packed documents hold no padding"):
        model(**batch, attention_mask=mask)
