"""Heads for sequences, tokens and answers: transformers' own, on a Motif model."""

import json

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from helpers.agreement import assert_agrees
from helpers.models import VARIANTS, random_ids, tiny_config, tiny_model
from motifarch.models.motif import (
    MotifForCausalLM,
    MotifForQuestionAnswering,
    MotifForSequenceClassification,
    MotifForTokenClassification,
    MotifModel,
)
from motifarch.weight_files import ModelFolderError

AUTO = {
    MotifForSequenceClassification: AutoModelForSequenceClassification,
    MotifForTokenClassification: AutoModelForTokenClassification,
    MotifForQuestionAnswering: AutoModelForQuestionAnswering,
}


def padded(side, *lengths):
    """Rows without 0, padded with it."""
    batch = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for i, length in enumerate(lengths):
        span = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        batch[i, span] = random_ids(1, length, seed=length)[0]
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_scored_by_its_last_token(variant, side):
    torch.manual_seed(0)
    model = MotifForSequenceClassification(tiny_config(variant, num_labels=3, pad_token_id=0)).eval()
    ids = padded(side, 4, 9, 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        for row, found in zip(ids, logits, strict=True):
            hidden = model.model(input_ids=row[row != 0][None]).last_hidden_state
            assert_agrees(found, model.score(hidden)[0, -1])


def test_losses_are_those_of_the_labels():
    ids = random_ids(2, 6)
    torch.manual_seed(0)
    rows = MotifForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()
    out = rows(input_ids=ids, labels=torch.tensor([2, 0]))
    assert_agrees(out.loss, F.cross_entropy(out.logits, torch.tensor([2, 0])))
    reward = MotifForSequenceClassification(tiny_config(num_labels=1, pad_token_id=0)).eval()
    out = reward(input_ids=ids, labels=torch.tensor([0.5, -1.0]))
    assert_agrees(out.loss, F.mse_loss(out.logits[:, 0], torch.tensor([0.5, -1.0])))
    tokens = MotifForTokenClassification(tiny_config(num_labels=4)).eval()
    labels = torch.randint(0, 4, (2, 6))
    labels[0, :2] = -100
    out = tokens(input_ids=ids, labels=labels)
    assert_agrees(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("kind", AUTO, ids=lambda kind: kind.__name__)
def test_saved_and_loaded(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(tiny_config(num_labels=3, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    loaded = AUTO[kind].from_pretrained(tmp_path)
    assert type(loaded) is kind
    ids = random_ids(2, 6)
    for found, expected in zip(loaded(ids).to_tuple(), model(ids).to_tuple(), strict=True):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected)
    assert torch.equal(MotifModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])


@pytest.mark.parametrize("variant", ["gda", "gda tied"])
@pytest.mark.parametrize("kind", AUTO, ids=lambda kind: kind.__name__)
def test_a_language_models_folder_gets_a_new_head(kind, variant, tmp_path):
    tiny_model(variant).save_pretrained(tmp_path)
    model, report = AUTO[kind].from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert {name.partition(".")[0] for name in report["missing_keys"]} == {kind.new_head}
    assert torch.equal(model.model.embed_tokens.weight, tiny_model(variant).model.embed_tokens.weight)
    head = AUTO[kind].from_pretrained(tmp_path, num_labels=1).get_submodule(kind.new_head)
    assert 0 < head.weight.std() < 1


def test_a_folder_that_lost_its_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = MotifForSequenceClassification(tiny_config(num_labels=2, pad_token_id=0))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"missing score\.weight"):
        MotifForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=r"missing lm_head\.weight"):
        MotifForCausalLM.from_pretrained(tmp_path)


def reward_trainer(model, folder, **options):
    rows = [{"input_ids": r[r != 0], "labels": float(i % 2)} for i, r in enumerate(padded("right", *range(3, 11)))]
    arguments = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments |= {"logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 8}

    def collate(features):
        ids = torch.nn.utils.rnn.pad_sequence([f["input_ids"] for f in features], batch_first=True)
        labels = torch.tensor([f["labels"] for f in features])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    arguments = TrainingArguments(output_dir=str(folder), **(arguments | options))
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)


def test_a_reward_model_is_trained(tmp_path):
    """As TRL's: one number for a row, from a language model's folder."""
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
    trainer = reward_trainer(model, tmp_path / "run", max_steps=20)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    trainer.save_model(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    ids = padded("right", 4, 9)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_accumulated_steps_average_the_loss(tmp_path):
    """Two calls of four rows give the gradient of one call of eight, where transformers' own models
    of this kind give twice that.
    """
    norms = []
    for steps in (1, 2):
        torch.manual_seed(0)
        model = MotifForSequenceClassification(tiny_config(num_labels=1, pad_token_id=0, initializer_range=0.1))
        options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 8 // steps}
        trainer = reward_trainer(model, tmp_path / str(steps), max_steps=1, **options)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_pipelines():
    words = {word: i for i, word in enumerate(["<pad>", "one", "two", "three", "four"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    config = tiny_config(vocab_size=5, num_labels=2, pad_token_id=0)
    texts = ["one two three", "four"]
    made = {
        "text-classification": MotifForSequenceClassification,
        "token-classification": MotifForTokenClassification,
        "feature-extraction": MotifModel,
        "text-generation": MotifForCausalLM,
    }
    for task, kind in made.items():
        options = {"max_new_tokens": 3} if task == "text-generation" else {}
        found = pipeline(task, model=kind(config).eval(), tokenizer=tokenizer, batch_size=2, device="cpu")(
            texts, **options
        )
        assert len(json.loads(json.dumps(found, default=str))) == 2
