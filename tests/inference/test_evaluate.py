"""Evaluation: scores equal those worked out by hand from the model's own logits."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from helpers.models import tiny_model
from motifarch.cli import run
from motifarch.commands.evaluate import main
from motifarch.errors import UserError
from motifarch.inference.evaluate import evaluate, index_tasks, load_tasks, resolve_tasks
from motifarch.tokenizer.train import train_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (pip install 'motifarch[eval]')"
)

QUESTIONS = [
    ("one and two make", ["three", "one", "twenty two or more of them"], 0),
    ("the colour of the sky is", ["green", "blue"], 1),
    ("alpha comes before", ["beta", "the end", "alpha itself, as everybody knows", "one"], 0),
    ("nobody ever", ["knows", "comes"], 1),
    ("blue", ["green or blue", "one", "two"], 2),
]
SETTINGS: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "metadata": {"version": 1},
    "doc_to_text": "{{question}}",
}
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
    },
    "tiny_last_word": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "tiny_continuation": {
        "output_type": "generate_until",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"max_gen_toks": 6, "until": ["</s>"], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{question} {' '.join(choices)}" for question, choices, _ in QUESTIONS], 300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluated") / "model"
    tiny_model("gda", vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def tasks(tmp_path, model, tokenizer) -> Path:
    """A folder of tasks on one file of questions; every second continuation is the model's own."""
    lines = []
    for number, (question, choices, answer) in enumerate(QUESTIONS):
        ids = tokenizer(question, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True) if number % 2 == 0 else "something else"
        lines.append({"question": question, "choices": choices, "answer": answer, "continuation": text})
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "tasks"
    path.mkdir()
    for name, settings in TASKS.items():
        own = SETTINGS | settings | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (path / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return path


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Of the continuation's tokens after the context, one token after the other, in float64."""
    before = tokenizer(context).input_ids
    after = tokenizer(context + continuation).input_ids[len(before) :]
    total = 0.0
    for token in after:
        with torch.no_grad():
            total += model(torch.tensor([before])).logits[0, -1].double().log_softmax(-1)[token].item()
        before = [*before, token]
    return total


@needs_harness
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_those_worked_out_by_hand(folder, model, tokenizer, tasks, dtype):
    if dtype == "bfloat16":
        model = model.bfloat16()
    scores = evaluate(folder, [str(tasks)], batch_size=3, dtype=dtype)["results"]

    choices = [[log_likelihood(model, tokenizer, q, f" {c}") for c in options] for q, options, _ in QUESTIONS]
    best = [row.index(max(row)) for row in choices]
    by_length = [
        max(range(len(row)), key=lambda i, row=row, options=options: row[i] / len(options[i]))
        for row, (_, options, _) in zip(choices, QUESTIONS, strict=True)
    ]
    answers = [answer for *_, answer in QUESTIONS]
    right = [sum(map(int.__eq__, guess, answers)) / len(answers) for guess in (best, by_length)]
    assert [scores["tiny_choice"]["acc,none"], scores["tiny_choice"]["acc_norm,none"]] == right
    # Rows of other lengths may round otherwise: in bfloat16 one digit in 256 of a logit, of which a
    # score is a mean.
    close = {"rel": 1e-5 if dtype == "float32" else 2e-3}
    given = [row[answer] for row, answer in zip(choices, answers, strict=True)]
    perplexity = scores["tiny_last_word"]["perplexity,none"]
    assert math.log(perplexity) == pytest.approx(-sum(given) / len(given), **close)
    start = tokenizer.decode([tokenizer.bos_token_id or tokenizer.eos_token_id])
    rolled = sum(log_likelihood(model, tokenizer, start, question) for question, *_ in QUESTIONS)
    size = sum(len(question.encode()) for question, *_ in QUESTIONS)
    assert scores["tiny_text"]["bits_per_byte,none"] == pytest.approx(-rolled / size / math.log(2), **close)
    if dtype == "float32":
        assert scores["tiny_continuation"]["exact_match,none"] == 3 / 5


@needs_harness
def test_batches_change_no_score(folder, tasks):
    alone, together = (evaluate(folder, [str(tasks)], batch_size=size)["results"] for size in (1, 5))
    for name in TASKS:
        for metric, score in alone[name].items():
            assert together[name][metric] == (pytest.approx(score, rel=1e-5) if isinstance(score, float) else score)


@needs_harness
def test_fewshot_examples_come_before_the_question(folder, model, tokenizer, tasks):
    results = evaluate(folder, [str(tasks / "tiny_choice.yaml")], num_fewshot=1, limit=1)
    assert results["n-shot"] == {"tiny_choice": 1}
    question, choices, answer = QUESTIONS[0]
    shot = f"{question} {choices[answer]}\n\n"
    scores = [log_likelihood(model, tokenizer, shot + question, f" {c}") for c in choices]
    assert results["results"]["tiny_choice"]["acc,none"] == float(scores.index(max(scores)) == answer)


@needs_harness
def test_command_line(folder, tasks, tmp_path, capsys):
    output = tmp_path / "new" / "scores.json"
    spec = f"{tasks / 'tiny_choice.yaml'},{tasks / 'tiny_text.yaml'}"
    options = ["--tasks", spec, "--limit", "2", "--batch-size", "4", "--output", str(output)]
    assert run(["eval", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "tiny_choice" in printed
    assert "bits_per_byte" in printed
    written = json.loads(output.read_text())
    assert set(written["results"]) == {"tiny_choice", "tiny_text"}
    assert written["n-samples"]["tiny_choice"] == {"original": 5, "effective": 2}
    assert written["folder"] == str(folder)


def write_group(folder: Path, *members: str) -> Path:
    group = {
        "group": "tiny_group",
        "task": list(members),
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
        "metadata": {"version": 1},
    }
    path = folder / "group.yaml"
    path.write_text(yaml.safe_dump(group))
    return path


@needs_harness
@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_group_has_its_tasks_mean(folder, tasks, whole_folder):
    group = write_group(tasks, "tiny_choice", "tiny_last_word")
    results = evaluate(folder, [str(tasks if whole_folder else group)], limit=3)
    scores = [results["results"][name]["acc,none"] for name in ("tiny_choice", "tiny_last_word")]
    assert results["groups"]["tiny_group"]["acc,none"] == pytest.approx(sum(scores) / 2)
    assert ("tiny_text" in results["results"]) == whole_folder
    with pytest.raises(UserError, match=r"'tiny_choice'.*name it once"):
        evaluate(folder, [str(group), "tiny_choice"])


@pytest.fixture
def few_of_its_own(tmp_path, monkeypatch):
    """Two of lm-eval's own tasks in place of all: 15,000 files take too long to read."""
    from lm_eval.tasks import manager

    for name in ("arc", "hellaswag"):
        shutil.copytree(Path(manager.__file__).parent / name, tmp_path / "own" / name)
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "own" / "manager.py"))


@needs_harness
def test_lm_evals_own_tasks_are_known_by_name(tasks, few_of_its_own):
    assert "hellaswag" not in index_tasks([str(tasks)]).all_tasks
    write_group(tasks, "tiny_choice", "hellaswag")
    manager = index_tasks([str(tasks)])  # now a group names one of them
    assert resolve_tasks(manager, ["hellaswag", "arc_eas*"]) == ["hellaswag", "arc_easy"]
    with pytest.raises(UserError, match="no task 'helaswag'; close to it are hellaswag"):
        resolve_tasks(manager, ["helaswag"])
    with pytest.raises(UserError, match="no task 'qqqqqq'; `lm-eval ls tasks` lists all"):
        resolve_tasks(manager, ["qqqqqq"])
    with pytest.raises(UserError, match="'arc_easy' needs a data set from the Hugging Face Hub, which is out of reach"):
        load_tasks(manager, ["arc_easy"])


@pytest.mark.slow  # the harness indexes its tasks anew for each
@needs_harness
def test_tasks_that_cannot_be_loaded_are_refused_by_name(folder, tasks, tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read"):
        evaluate(folder, [str(tasks / "gone.yaml")])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no task"):
        evaluate(folder, [str(empty)])
    broken = tasks / "broken.yaml"
    for text in ("task: [", "output_type: multiple_choice\n", "task: broken\ndataset_path: json\n"):
        broken.write_text(text)
        with pytest.raises(UserError, match=r"broken\.yaml' cannot be loaded"):
            evaluate(folder, [str(broken)])
    settings = yaml.safe_load((tasks / "tiny_choice.yaml").read_text())
    broken.write_text(yaml.safe_dump(settings | {"unsafe_code": True}))
    with pytest.raises(UserError, match="runs code that the model writes"):
        evaluate(folder, [str(broken)])


@needs_harness
def test_a_folder_that_is_no_model_is_refused(folder, tasks, tmp_path):
    with pytest.raises(UserError, match=r"no Hugging Face model folder"):
        evaluate(tmp_path, [str(tasks)])
    with pytest.raises(UserError, match="device 'cudo' is not there"):
        evaluate(folder, [str(tasks)], device="cudo")


def test_without_the_harness_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'motifarch\[eval\]'"):
        evaluate(folder, ["hellaswag"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tasks", " , "], "names no task"),
        (["--tasks", "a", "--limit", "2.5"], "--limit is 2.5"),
        (["--tasks", "a", "--limit", "0"], "--limit is 0"),
        (["--tasks", "a", "--batch-size", "0"], "--batch-size is '0'"),
        (["--tasks", "a", "--batch-size", "many"], "--batch-size is 'many'"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot is '-1'"),
        (["--tasks", "a", "--output", "."], "is a folder"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(options, reason):
    with pytest.raises(UserError, match=reason):
        main(["nowhere", *options])
