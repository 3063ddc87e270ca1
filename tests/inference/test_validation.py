"""`motifarch eval --data`: the loss that training measures, and its bits per byte."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import motifarch.models  # noqa: F401  # registers the model type
from helpers.tiny import RECIPE, prepare_text
from motifarch.commands.evaluate import main
from motifarch.data import PackedDataset, collate
from motifarch.data.prepare import main as prepare
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.inference.validation import validate
from motifarch.models.motif import MotifConfig, MotifForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    return export(finished_run, tmp_path_factory.mktemp("exported") / "model")


def test_it_is_the_loss_of_packed_rows(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "--data", str(data), "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    rows = PackedDataset.open(data, "validation")
    batch = collate([rows[i] for i in range(len(rows))])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        loss = float(model(**batch, num_items_in_batch=torch.tensor(1.0)).loss) / found["tokens"]
    assert found["tokens"] == int((batch["shift_labels"] != -100).sum())
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    # The split's text, counted where it came from.
    split = json.loads((data / "data.json").read_text())["splits"]["validation"]
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) * split["tokens"] / split["bytes"], rel=1e-5)
    assert f"{found['loss']:.4f} nats/token" in capsys.readouterr().out


def test_another_tokenizers_data_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was prepared with another tokenizer"):
        main([str(folder), "--data", str(prepare_text(tmp_path, seed=3))])


def test_what_to_evaluate_on_is_given_once(folder: Path, data: Path) -> None:
    with pytest.raises(UserError, match="either --tasks or --data"):
        main([str(folder)])
    with pytest.raises(UserError, match="--num-fewshot is for --tasks"):
        main([str(folder), "--data", str(data), "--num-fewshot", "2"])


def of_letters(length: int) -> PreTrainedTokenizerFast:
    """A token for so many of the letters a to d."""
    words = ["".join(letters) for letters in itertools.product("abcd", repeat=length)]
    made = Tokenizer(models.WordLevel({"</s>": 0} | {word: i for i, word in enumerate(words, 1)}, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[abcd]" * length), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="</s>")


def test_tokenizers_compare_in_bits_per_byte(tmp_path: Path) -> None:
    """Two models that know nothing of the same text, one of letters and one of pairs of them."""
    draw, letters = random.Random(0), 600
    rows = [json.dumps({"text": "".join(draw.choices("abcd", k=letters))}) for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    found = {}
    for length, vocab_size in ((1, 8), (2, 64)):  # 3 and 6 bits for each token
        tokenizer, folder, data = of_letters(length), tmp_path / f"model{length}", tmp_path / f"data{length}"
        tokenizer.save_pretrained(folder)
        sizes = dict(RECIPE["model"]) | {"vocab_size": vocab_size}
        model = MotifForCausalLM(MotifConfig(**sizes, tie_word_embeddings=True))
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        nn.init.zeros_(embedding.weight)  # all tokens are as likely
        model.save_pretrained(folder)
        options = ["--tokenizer", folder, "--output", data, "--seq-len", 50, "--validation-fraction", 0.5]
        prepare([f"--source=files:{tmp_path / 'text.jsonl'}", *map(str, options), "--num-proc", "1"])
        found[length] = validate(folder, data)
        tokens = letters / length + 1  # with the one that ends a document
        assert found[length]["loss"] == pytest.approx(math.log(vocab_size), rel=1e-6)
        assert found[length]["bits_per_byte"] == pytest.approx(math.log2(vocab_size) * tokens / letters, rel=1e-6)
    assert found[2]["loss"] == pytest.approx(2 * found[1]["loss"])
    assert found[2]["bits_per_byte"] == pytest.approx(found[1]["bits_per_byte"], rel=1 / letters)
