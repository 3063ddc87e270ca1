"""`motifarch eval --data`: the loss that training measures, and its bits per byte."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import motifarch.models  # noqa: F401  # registers the model type
from helpers.tiny import prepare_text
from motifarch.commands.evaluate import main
from motifarch.data import PackedDataset, collate
from motifarch.errors import UserError
from motifarch.export import export


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
