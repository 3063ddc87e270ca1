"""Generation from a folder: the same text for the same seed, cached as uncached, and refusals with a reason."""

from __future__ import annotations

import pytest
import torch

from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.generate import generate, load


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    return export(finished_run, tmp_path_factory.mktemp("generate") / "model")


def test_a_seed_decides_the_text(folder):
    model, tokenizer = load(folder)
    texts = [generate(model, tokenizer, "alpha", max_new_tokens=30, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("alpha")


def test_temperature_zero_takes_the_likeliest_token(folder):
    model, tokenizer = load(folder)
    text, speed = generate(model, tokenizer, "alpha beta", max_new_tokens=10, temperature=0, seed=3)
    ids = tokenizer("alpha beta", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(10):  # without a cache, a whole pass for each token
            token = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
            if token.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token], dim=1)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert speed > 0


def test_an_empty_prompt_starts_a_document(folder):
    model, tokenizer = load(folder)
    text, _ = generate(model, tokenizer, "", max_new_tokens=5)
    assert isinstance(text, str)


def test_refuses_with_a_reason(folder, finished_run, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="motifarch export"):
        load(finished_run)
    model, tokenizer = load(folder)
    with pytest.raises(UserError, match="shorten the prompt"):
        generate(model, tokenizer, "alpha " * 5000)
    for option in (["--max-new-tokens", "0"], ["--temperature", "-1"], ["--top-p", "0"]):
        with pytest.raises(UserError, match=option[0]):
            run(["generate", str(folder), *option])


def test_command_line_streams_prompt_and_speed(folder, capsys):
    assert run(["generate", str(folder), "--prompt", "gamma", "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("gamma")
    assert "tokens/s" in captured.err
