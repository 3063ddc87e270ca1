"""Rows for new tokens: old text has the logits that it had, and new rows are what they replace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers.grown import loaded, saved
from helpers.vocabularies import made_texts
from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.tokenizer.extend import extend
from motifarch.tokenizer.special_tokens import SpecialTokens
from motifarch.tokenizer.train import as_pretrained, train_bpe

OLD, ROWS = 380, 384
NEW_TEXT = ["모델을 학습하는 방법은 다음과 같습니다. 그 사람은 학교에 가지 않았다."] * 3
OLD_TEXT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders old, and new with more tokens."""
    folder, special = tmp_path_factory.mktemp("tokenizers"), SpecialTokens()
    python = [text for text in made_texts() if "import" in text][:4]
    trained = train_bpe(python, OLD, special)
    assert trained.get_vocab_size() == OLD
    as_pretrained(trained, special).save_pretrained(folder / "old")
    as_pretrained(extend(trained, NEW_TEXT, 50)[0], special).save_pretrained(folder / "new")
    return folder


def model_folder(path: Path, tokenizer: Path, **config: Any) -> Path:
    saved(path, vocab_size=ROWS, initializer_range=0.1, **config)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [[], ["--random-rows", "--seed", "3"]], ids=["means", "drawn"])
def test_a_model_gets_rows_for_new_tokens(tokenizers: Path, tmp_path: Path, tied: bool, options: list[str]) -> None:
    source, output = model_folder(tmp_path / "small", tokenizers / "old", tie_word_embeddings=tied), tmp_path / "large"
    assert run(["grow", str(source), str(output), "--tokenizer", str(tokenizers / "new"), *options]) == 0
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    small, large = loaded(source), loaded(output)
    assert len(new) > OLD + 10
    assert large.config.vocab_size % 128 == 0
    assert large.config.vocab_size >= len(new)
    assert large.config.tie_word_embeddings == tied

    ids = old(OLD_TEXT, return_tensors="pt").input_ids
    assert torch.equal(new(OLD_TEXT, return_tensors="pt").input_ids, ids)
    # Equal up to the order of sums: products are of another width.
    torch.testing.assert_close(large(ids).logits[..., :OLD], small(ids).logits[..., :OLD], rtol=1e-5, atol=1e-5)

    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    for name in ("model.embed_tokens.weight",) if tied else ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:OLD], before[name][:OLD])
        for number in range(OLD, len(new)):
            pieces = old(new.decode([number]), add_special_tokens=False).input_ids if not options else []
            if pieces and "\ufffd" not in new.decode([number]):
                expected = before[name][pieces].mean(0)
                torch.testing.assert_close(after[name][number], expected)
        if options:
            spread = after[name][OLD : len(new)].std() / before[name][:OLD].std()
            assert 0.9 < spread < 1.1
    text = NEW_TEXT[0]
    assert len(new(text).input_ids) < len(old(text).input_ids)
    made = large.generate(**new(text, return_tensors="pt"), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape[1] == len(new(text).input_ids) + 4


def test_what_is_no_extension_is_refused(tokenizers: Path, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "small", tokenizers / "old")
    other = train_bpe(NEW_TEXT, 400, SpecialTokens())
    as_pretrained(other, SpecialTokens()).save_pretrained(tmp_path / "other")
    output = tmp_path / "large"
    for tokenizer, said in (
        (tmp_path / "other", "no extension of the model's"),
        (tokenizers / "old", "no token that the model's has not"),
    ):
        with pytest.raises(UserError, match=said):
            run(["grow", str(source), str(output), "--tokenizer", str(tokenizer)])
    with pytest.raises(UserError, match="--random-rows"):
        run(["grow", str(source), str(output), "--random-rows"])
    larger = model_folder(tmp_path / "without_rows", tokenizers / "new")
    with pytest.raises(UserError, match=f"{ROWS} rows: it is not its tokenizer"):
        run(["grow", str(larger), str(output), "--tokenizer", str(tokenizers / "new")])
    assert not output.exists()
