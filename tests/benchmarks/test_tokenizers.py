"""The comparisons of tokenizers: documents held out, equal costs, paired statistics."""

import argparse
import json
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from benchmarks.tokenizers.compression import unseen
from benchmarks.tokenizers.corpus import is_held_out, pages, write
from benchmarks.tokenizers.models import main, make_models, make_tokenizers, statistics
from helpers.vocabularies import made_texts

PAGE = "<html><head><title>t</title></head><body><p>menu</p><div id='DisplayArea'>{}</div></body></html>"


def made_help(folder: Path, words: str) -> Path:
    """Forty pages, one of them twice, and a short one."""
    folder.mkdir()
    for i in range(40):
        lines = f"<h1>{i}</h1><script>hidden()</script>" + f"<p>{words} {i}</p>" * 2 + f"<p>{words} {words} of {i}</p>"
        (folder / f"{i}.html").write_text(PAGE.format(lines), encoding="utf-8")
    (folder / "copy.html").write_bytes((folder / "0.html").read_bytes())
    (folder / "short.html").write_text(PAGE.format("<p>short</p>"))
    return folder


def test_documents_are_held_out_in_both_languages_or_in_none(tmp_path: Path) -> None:
    held_out = {}
    for language, words in (("korean", "모델을 학습하는 방법 " * 8), ("english", "how to train a model " * 8)):
        found = write(pages(made_help(tmp_path / language, words)), tmp_path, language)
        records = {
            part: [json.loads(line) for line in (tmp_path / f"{language}_{part}.jsonl").open(encoding="utf-8")]
            for part in ("train", "held_out")
        }
        assert {part: len(rows) for part, rows in records.items()} == found
        assert sum(found.values()) == 40  # of a page and its copy one, of short ones none
        names = {part: {row["name"] for row in rows} for part, rows in records.items()}
        assert not names["train"] & names["held_out"]
        assert all(map(is_held_out, names["held_out"]))
        assert not any(map(is_held_out, names["train"]))
        text = records["train"][0]["text"]
        assert "hidden" not in text
        assert "menu" not in text
        assert text.count("\n") == 2  # a line that is there twice counts once
        held_out[language] = names["held_out"]
    assert held_out["korean"] == held_out["english"] != set()


def test_lines_of_training_pages_are_left_out(tmp_path: Path) -> None:
    for part, lines in (("train", "one\ntwo"), ("held_out", "two\nthree\nfour")):
        (tmp_path / f"english_{part}.jsonl").write_text(json.dumps({"text": lines}))
    assert [*unseen(tmp_path, ["english"])] == [("english", "three\nfour")]


def test_differences_are_scipys_paired_test() -> None:
    losses = {"bpe": [1.50, 1.61, 1.45], "superbpe": [1.47, 1.60, 1.41]}
    rows = [
        {"model": kind, "seed": seed, "bits_per_byte": bits}
        for kind, own in losses.items()
        for seed, bits in enumerate(own)
    ]
    rows.append({"model": "bpe", "seed": 3, "bits_per_byte": 9.0})  # has no partner
    difference = statistics(rows)["difference"]
    expected = stats.ttest_rel(losses["superbpe"], losses["bpe"])
    assert difference["n"] == 3
    assert difference["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert difference["half"] == pytest.approx((interval.high - interval.low) / 2)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    texts = [*made_texts()]
    python, korean = texts[:12], texts[12:]
    chunks = [text[i : i + 2000] for text in python for i in range(0, len(text), 2000)]
    for language, documents in (("korean", korean), ("english", chunks)):
        for part, own in (("train", documents[8:]), ("held_out", documents[:8])):
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in own)
            (folder / f"{language}_{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_models_cost_the_same_and_read_the_same(corpora: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(corpora=corpora, work=tmp_path, vocab_size=1500, steps=None)
    make_tokenizers(options, Console(quiet=True))
    plain, of_super = make_models(options)
    assert of_super["seq_len"] < plain["seq_len"]
    assert of_super["fields"]["intermediate_size"] > plain["fields"]["intermediate_size"]
    assert of_super["flops_per_row"] == pytest.approx(plain["flops_per_row"], rel=5e-3)
    assert of_super["bytes_per_row"] == pytest.approx(plain["bytes_per_row"], rel=1e-2)  # a token of a row's 100
    assert of_super["steps"] == plain["steps"] > 0


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(corpora: Path, tmp_path: Path) -> None:
    words = [str(corpora), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "found.json")]
    words += ["--vocab-size", "1500", "--steps", "2", "--seeds", "0"]
    assert main(words) == 0
    first = json.loads((tmp_path / "found.json").read_text())
    assert [row["model"] for row in first["runs"]] == ["bpe", "superbpe"]
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert weights
    assert main(words) == 0
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == first["runs"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")} == weights
