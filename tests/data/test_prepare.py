"""The command as a user meets it: what it makes, says, refuses and survives."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.distributed import TIMEOUT, descendants, started, wait_until
from helpers.terminal import on_a_terminal
from motifarch.data import PackedDataset
from motifarch.data.prepare import main
from motifarch.errors import UserError
from motifarch.tokenizer.loading import load_tokenizer

QUICK = ["--num-proc", "1", "--seq-len", "16", "--vocab-size", "280"]

# What forks is a process of its own. Where tests have used DTensors, torch 2.13 hangs in the
# children that another thread forks, for they end the process groups that the first thread's cache
# of shardings holds.
COMMAND = [sys.executable, "-m", "motifarch.data.prepare", *QUICK, "--num-proc", "2"]


def prepare(output: Path, *sources: str, options: list[str] | None = None) -> dict:
    arguments = [argument for source in sources for argument in ("--source", source)]
    assert main([*arguments, "--output", str(output), *QUICK, *(options or [])]) == 0
    return json.loads((output / "data.json").read_text())


def stream(output: Path, split: str) -> list[int]:
    data = PackedDataset.open(output, split)
    return [int(data[0].input_ids[0]), *(int(t) for i in range(len(data)) for t in data[i].input_ids[1:])]


def contents(output: Path) -> dict[str, list]:
    return {split: datasets.load_from_disk(str(output / split))[:] for split in ("train", "validation")}


def test_the_documents_come_back_from_the_blocks(corpus: Path, tmp_path: Path) -> None:
    record = prepare(tmp_path / "data", f"files:{corpus}/*.txt", options=["--validation-fraction", "0.3"])
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    texts = {path.read_text() for path in corpus.glob("*.txt")}
    seen = 0
    for split, counts in record["splits"].items():
        tokens = stream(tmp_path / "data", split)
        assert len(tokens) == counts["blocks"] * 16 + 1 == counts["tokens"] - counts["dropped_tokens"]
        documents = tokenizer.decode(tokens).split(tokenizer.eos_token)
        whole, last = documents[:-1], documents[-1]
        assert set(whole) <= texts
        assert any(text.startswith(last) for text in texts)
        assert counts["documents"] - len(whole) <= 1
        seen += counts["documents"]
        texts -= set(whole)
    assert seen == 30


def test_on_a_terminal_bars_are_motifarchs_own(corpus: Path, tmp_path: Path) -> None:
    shown = on_a_terminal([*COMMAND, "--source", f"files:{corpus}/*.txt", "--output", str(tmp_path / "data")])
    assert re.search(r"tokenising.*100%", shown)  # what two forked processes counted
    assert not re.search("examples/s|Saving the dataset", shown)  # datasets' own


def test_the_record(corpus: Path, tmp_path: Path) -> None:
    record = prepare(tmp_path / "data", f"files:{corpus}/*.txt")
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    assert record["format_version"] == 2
    assert record["seq_len"] == 16
    assert record["vocab_size"] == len(tokenizer) == 280
    assert record["eos_token_id"] == tokenizer.eos_token_id
    assert record["settings"]["sources"] == [f"files:{corpus}/*.txt"]
    assert record["inputs"][0]["files"] == 30
    assert record["skipped"] == {"count": 0, "reasons": {}}
    assert {"motifarch", "datasets", "tokenizers"} <= set(record["versions"])
    assert sorted(os.listdir(tmp_path / "data")) == ["data.json", "tokenizer", "train", "validation"]
    assert os.listdir(tmp_path) == ["data"]


def test_text_json_lines_and_parquet_hold_the_same(tmp_path: Path, make_text: Callable[..., str]) -> None:
    texts = [make_text(i) for i in range(12)]
    for folder in ("text", "lines", "table"):
        (tmp_path / folder).mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(text)
    (tmp_path / "lines" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "table" / "a.parquet")
    made = [f"files:{tmp_path / folder}/*" for folder in ("text", "lines", "table")] + [f"hf:{tmp_path / 'lines'}"]
    records = [prepare(tmp_path / f"out{i}", source) for i, source in enumerate(made)]
    records.append(prepare(tmp_path / "out4", made[3], options=["--streaming"]))
    assert len({record["fingerprint"] for record in records}) == 1
    first = contents(tmp_path / "out0")
    assert all(contents(tmp_path / f"out{i}") == first for i in range(1, 5))


@pytest.mark.slow
def test_number_of_processes_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "--source", f"files:{corpus}/*.txt"]
    for number in ("1", "2", "3"):
        subprocess.run([*command, "--output", str(tmp_path / number), "--num-proc", number], check=True)
    fingerprints = {json.loads((tmp_path / n / "data.json").read_text())["fingerprint"] for n in ("1", "2", "3")}
    assert len(fingerprints) == 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_a_given_tokenizer_is_used(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path / "one", f"files:{corpus}/*.txt", options=["--tokenizer", str(tokenizer_folder)])
    assert first["vocab_size"] == 300
    again = prepare(
        tmp_path / "two", f"files:{corpus}/0*.txt", options=["--tokenizer", str(tmp_path / "one/tokenizer")]
    )
    assert again["tokenizer_fingerprint"] == first["tokenizer_fingerprint"]


def test_an_end_of_text_spelled_out_does_not_end_a_document(tmp_path: Path, make_text: Callable[..., str]) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{make_text(i)} <|endoftext|> {make_text(i + 100)}")
    record = prepare(tmp_path / "data", f"files:{tmp_path}/*.txt")
    ends = sum(stream(tmp_path / "data", split).count(record["eos_token_id"]) for split in record["splits"])
    assert ends <= 8


def test_bad_files_are_skipped_counted_and_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    sources = [f"files:{corpus}/*.txt", f"files:{tmp_path}/*.txt"]
    record = prepare(tmp_path / "data", *sources)
    assert record["skipped"] == {
        "count": 4,
        "reasons": {
            "empty": {"count": 2, "names": ["blank.txt", "empty.txt"]},
            "binary": {"count": 1, "names": ["image.txt"]},
            "not UTF-8": {"count": 1, "names": ["latin.txt"]},
        },
    }
    said = capsys.readouterr().out
    assert "skipped 4 documents: 2 empty (blank.txt, empty.txt); 1 binary (image.txt); 1 not UTF-8 (latin.txt: " in said
    with pytest.raises(UserError, match=r"--strict: blank\.txt is skipped \(empty\)"):
        prepare(tmp_path / "strict", *sources, options=["--strict"])
    assert not (tmp_path / "strict").exists()
    with pytest.raises(UserError, match=r"--strict: .* 4 documents skipped"):
        prepare(tmp_path / "data", *sources, options=["--strict"])


def test_duplicates_and_languages_are_left_out_counted_and_named(
    tmp_path: Path, make_text: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    texts = [make_text(i) for i in range(10)]
    german = "Dieses Dokument erklärt, wie man Daten vorbereitet: Dateien werden gelesen und gepackt."
    for name, some in {"a.jsonl": [*texts, german], "b.jsonl": [texts[3], texts[4] + "the end", make_text(99)]}.items():
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in some))
    sources = [f"files:{tmp_path}/a.jsonl", f"files:{tmp_path}/b.jsonl"]
    options = ["--deduplicate", "minhash", "--languages", "en", "ko", "--strict"]
    record = prepare(tmp_path / "data", *sources, options=options)
    reasons = record["filtered"]["reasons"]
    assert reasons["near duplicate"] == {"count": 2, "names": ["b.jsonl:1", "b.jsonl:2"]}
    assert [reasons[reason]["names"] for reason in reasons if "in de" in reason] == [["a.jsonl:11"]]
    assert record["skipped"]["count"] == 0
    assert "left out 3 documents" in capsys.readouterr().out
    assert [(found["source"], found["documents"]) for found in record["lengths"]] == [(sources[0], 10), (sources[1], 1)]
    first = record["lengths"][0]
    assert first["bytes"] == sum(len(text.encode()) for text in texts)
    assert first["quantiles"]["0.05"] <= first["quantiles"]["0.5"] <= first["longest"] <= first["tokens"]
    assert sum(found["tokens"] for found in record["lengths"]) == sum(s["tokens"] for s in record["splits"].values())
    prepare(tmp_path / "data", *sources, options=options)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"deduplicate was 'minhash', now 'exact'"):
        prepare(tmp_path / "data", *sources, options=["--deduplicate", "exact", "--languages", "ko", "en"])


def test_rerun_finds_it_done(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = f"files:{corpus}/*.txt"
    prepare(tmp_path / "data", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    capsys.readouterr()
    prepare(tmp_path / "data", source, options=["--num-proc", "2"])
    assert "already prepared with these settings" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_other_settings_or_files_are_refused_unless_overwritten(tmp_path: Path, make_text: Callable[..., str]) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(make_text(i))
    source, output = f"files:{tmp_path}/*.txt", tmp_path / "data"
    first = prepare(output, source)
    with pytest.raises(UserError, match=r"seed was 0, now 1\).*--overwrite"):
        prepare(output, source, options=["--seed", "1"])
    with pytest.raises(UserError, match="vocab_size was 280, now 290"):
        prepare(output, source, options=["--vocab-size", "290"])
    (tmp_path / "0.txt").write_text("changed")
    with pytest.raises(UserError, match=r"the files of files:.* have changed.*--overwrite"):
        prepare(output, source)
    assert json.loads((output / "data.json").read_text()) == first
    assert prepare(output, source, options=["--overwrite"])["fingerprint"] != first["fingerprint"]
    assert not list(tmp_path.glob(".data*"))


def test_a_folder_of_something_else_is_never_replaced(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("thesis")
    for options in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="exists and is not a prepared data folder"):
            prepare(tmp_path, f"files:{corpus}/*.txt", options=options)
    assert (tmp_path / "precious").read_text() == "thesis"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "100000"], r"the train part has [\d,]+ tokens in \d+ documents, a block needs 100,001"),
        (["--seq-len", "0"], "--seq-len is '0'"),
        (["--validation-fraction", "1"], "--validation-fraction 1.0"),
        (["--vocab-size", "100"], "--vocab-size 100: it must be at least 258"),
        (["--max-documents", "0"], "--max-documents is '0'"),
        (["--max-documents", "1", "--validation-fraction", "0.0001"], "there is one document"),
        (["--encoding", "hex"], "--encoding 'hex': no encoding of text"),
        (["--document-separator", ""], "--document-separator ''"),
        (["--languages", "korean"], "--languages korean: take of "),
        (["--duplicate-threshold", "0.5"], "--duplicate-threshold 0.5 is of --deduplicate minhash"),
        (["--num-proc", "0"], "--num-proc is '0'"),
        (["--tokenizer", "/no/such/folder"], "cannot load tokenizer '/no/such/folder'"),
    ],
)
def test_impossible_requests_leave_nothing(corpus: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "data", f"files:{corpus}/*.txt", options=options)
    assert os.listdir(tmp_path) == []


# What follows ends a process of its own in the middle of its work.


@pytest.fixture
def many(tmp_path: Path, make_text: Callable[..., str]) -> list[str]:
    """A command that tokenises long enough to be caught at it."""
    with (tmp_path / "many.jsonl").open("w") as file:
        for i in range(2500):
            file.write(json.dumps({"text": make_text(i, words=1000)}) + "\n")
    command = [sys.executable, "-m", "motifarch.data.prepare", "--source", f"files:{tmp_path / 'many.jsonl'}"]
    return [*command, "--output", str(tmp_path / "data"), "--vocab-size", "260", "--num-proc", "2"]


def wait_until_tokenising(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the pool's processes are at work."""
    wait_until(lambda: bool(list(folder.glob(".data.preparing/scratch/tmp*"))), process)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again(many: list[str], tmp_path: Path) -> None:
    with started(0, *many[1:]) as process:
        wait_until_tokenising(process, tmp_path)
        workers = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "data").exists()
    assert (tmp_path / ".data.preparing").exists()
    wait_until(lambda: all(map(is_gone, workers)))  # nobody waits for a parent that is no more
    done = subprocess.run(many, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "left by a run that was killed" in done.stdout
    assert len(PackedDataset.open(tmp_path / "data")) > 0
    assert sorted(os.listdir(tmp_path)) == ["data", "many.jsonl"]


def test_ctrl_c_is_one_line_and_leaves_nothing(many: list[str], tmp_path: Path) -> None:
    # Tests that run in a shell's background ignore SIGINT, and their children would.
    with started(0, *many[1:], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        wait_until_tokenising(process, tmp_path)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted: .*data was not made; run the same command to start over\n", said)
    assert os.listdir(tmp_path) == ["many.jsonl"]


def test_a_full_disk_is_one_clear_message(many: list[str], tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    with started(0, *many[1:], preexec_fn=limit) as process:
        _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2
    assert re.fullmatch(r"error: .*data can't be written \(File too large\): free some space, .*\n", said)
    assert os.listdir(tmp_path) == ["many.jsonl"]
