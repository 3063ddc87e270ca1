"""transformers.Trainer trains, accumulates and evaluates a Motif model on a CPU."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from helpers.agreement import assert_agrees
from helpers.models import random_ids, tiny_model

LENGTHS = [5, 12, 3, 9, 7, 16, 4, 10]


def features():
    return [{"input_ids": random_ids(1, n, seed=n)[0].tolist()} for n in LENGTHS]


def pad_right(rows):
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


COLLATORS = {"packed": DataCollatorWithFlattening(), "padded": pad_right}


def trainer(model, folder, collator, batch_size, **arguments):
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 8,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(options | arguments)),
        train_dataset=features(),
        eval_dataset=features(),
        data_collator=COLLATORS[collator],
    )


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("variant", ["gda", "diff_v2 gated"])
def test_a_repeated_batch_is_learned(tmp_path, variant, collator):
    model = tiny_model(variant, initializer_range=0.1)
    run = trainer(model, tmp_path, collator, 8, max_steps=12, learning_rate=1e-2, gradient_checkpointing=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    assert run.evaluate()["eval_loss"] < 0.5 * before


@pytest.mark.parametrize("collator", COLLATORS)
def test_accumulated_micro_batches_are_one_large_batch(tmp_path, collator):
    """Rows of unequal length: each token counts the same, whichever micro-batch it came in."""
    steps = []
    for micro in (8, 1):
        model = tiny_model()
        before = [p.detach().clone() for p in model.parameters()]
        options = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "gradient_accumulation_steps": 8 // micro}
        run = trainer(model, tmp_path, collator, micro, **options)
        run.train()
        steps.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    assert max(s.abs().max().item() for s in steps[0]) > 0.01
    for whole, parts in zip(*steps, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5 * max(1, whole.abs().max().item()))


def test_evaluation_predicts_the_logits_and_the_loss(tmp_path):
    model = tiny_model()
    run = trainer(model, tmp_path, "padded", 8)
    prediction = run.predict(features())
    with torch.no_grad():
        exact = model.eval()(**pad_right(features()))
    assert_agrees(torch.from_numpy(prediction.predictions), exact.logits)
    assert prediction.metrics["test_loss"] == pytest.approx(exact.loss.item(), abs=1e-5)
