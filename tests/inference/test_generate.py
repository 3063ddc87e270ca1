"""Generation from a folder: what comes out for a seed, a batch or a conversation."""

import io
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers.prompt_files import prompt_file, results
from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.inference.generate import Sampling, Speed, generate, load
from motifarch.inference.prompts import conversation
from motifarch.inference.sampling import encode
from motifarch.tokenizer.encoding import set_special_tokens

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'robot' %}{{ raise_exception('no robots here') }}{% endif %}"
    "({{ message.role }}) {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
# Of several lengths, two of them the same, in no order of length.
PROMPTS = ["alpha beta gamma delta one two three", "one", "( ) = alpha", "", "two", "beta = ( gamma three )"]
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    return export(finished_run, tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def chat_folder(folder, tmp_path_factory):
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(copy)
    return copy


@pytest.fixture(scope="module")
def llama_folder(folder, tmp_path_factory):
    """Another model: few positions, other ends, a generation_config that asks for much else."""
    path = tmp_path_factory.mktemp("llama") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        initializer_range=0.3,  # far from uniform, so that no rounding decides
        eos_token_id=[tokenizer.eos_token_id, 65],
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=5, num_beams=3)
    model.generation_config.update(repetition_penalty=9.0, stop_strings=["a"], min_length=9, suppress_tokens=[70, 71])
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def pair(folder):
    """Random weights, for text of some variety, in float64: no rounding decides between tokens.

    Every output is a token.
    """
    model, tokenizer = load(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.double()
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model, tokenizer


def texts(model, tokenizer, prompts, sampling, **options):
    return [made.text for made in generate(model, tokenizer, prompts, sampling, **options)]


def greedy_by_hand(model, ids, steps, ends):
    """Without a cache, a whole pass for each token."""
    ids = torch.tensor([ids])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            token = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            if token.item() in ends:
                break
    return ids[0, start:].tolist()


def make_end(model, token):
    """Every token ends the text as soon as it is `token`."""
    model.generation_config.eos_token_id = [token]


def test_a_seed_decides_the_text(folder):
    model, tokenizer = load(folder)
    made = [texts(model, tokenizer, ["alpha"], Sampling(30, seed=seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_temperature_zero_takes_the_likeliest_token(pair):
    model, tokenizer = pair
    (made,) = generate(model, tokenizer, ["alpha beta"], Sampling(10, temperature=0, seed=3))
    new = greedy_by_hand(model, tokenizer("alpha beta").input_ids, 10, [tokenizer.eos_token_id])
    assert made.text == tokenizer.decode(new, skip_special_tokens=True)
    assert made.tokens == len(new)


def test_outputs_that_are_no_token_are_never_taken(folder):
    model, tokenizer = load(folder)
    padded, _ = load(folder)
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        rest = padded.get_output_embeddings().weight[len(tokenizer) :]
        assert len(rest)  # the vocabulary is rounded up
        rest.mul_(1000)
    for sampling in (GREEDY, Sampling(30, temperature=2.0, top_p=1.0)):
        assert texts(padded, tokenizer, PROMPTS, sampling) == texts(model, tokenizer, PROMPTS, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(12, temperature=1.5, top_p=1.0, seed=5)])
def test_a_batch_gives_what_each_prompt_gives_alone(pair, sampling):
    model, tokenizer = pair
    alone = texts(model, tokenizer, PROMPTS, sampling, batch_size=1)
    assert len(set(alone)) > 3  # they can be told apart
    for batch_size in (2, 4, 8):
        assert texts(model, tokenizer, PROMPTS, sampling, batch_size=batch_size) == alone
    if sampling is GREEDY:
        expected = [tokenizer(prompt).input_ids or [tokenizer.eos_token_id] for prompt in PROMPTS]
        new = [greedy_by_hand(model, ids, 12, [tokenizer.eos_token_id]) for ids in expected]
        assert alone == tokenizer.batch_decode(new, skip_special_tokens=True)


def test_more_prompts_than_are_sorted_together_stay_in_order(pair):
    model, tokenizer = pair
    prompts = [f"{'alpha ' * (n * 7 % 5)}{n}" for n in range(20)]
    batches = []
    sampling = Sampling(4, temperature=0)
    made = texts(model, tokenizer, prompts, sampling, batch_size=2, report=batches.append)
    assert made == [texts(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    assert batches == [2] * 10


def test_the_same_prompt_twice_is_sampled_twice_and_others_do_not_matter(pair):
    model, tokenizer = pair
    sampling = Sampling(12, temperature=1.5, top_p=1.0)
    twice = texts(model, tokenizer, ["alpha", "alpha"], sampling)
    assert twice[0] != twice[1]
    assert texts(model, tokenizer, ["beta = one two", "alpha"], sampling)[1] == twice[1]


def test_draws_follow_the_model_probabilities(pair):
    model, tokenizer = pair
    ids = tokenizer("alpha").input_ids
    with torch.no_grad():
        scaled = model(torch.tensor([ids])).logits[0, -1] / 0.7
    probabilities, order = scaled.softmax(-1).sort(descending=True)
    nucleus = int((probabilities.cumsum(0) < 0.8).sum()) + 1
    kept = probabilities[:nucleus] / probabilities[:nucleus].sum()
    assert nucleus > 1
    expected = Counter()  # of texts: some tokens, alone, are the same broken character
    for token, probability in zip(order[:nucleus].tolist(), kept.tolist(), strict=True):
        expected[tokenizer.decode([token], skip_special_tokens=True)] += 4000 * probability
    sampling = Sampling(1, temperature=0.7, top_p=0.8)
    counts = Counter(texts(model, tokenizer, ["alpha"] * 4000, sampling, batch_size=500))
    assert set(counts) <= set(expected)
    for text, mean in expected.items():  # within five standard deviations of a binomial count
        assert abs(counts[text] - mean) < 5 * (mean * (1 - mean / 4000)) ** 0.5 + 1


def test_what_follows_the_end_of_a_text_is_no_part_of_it(pair):
    model, tokenizer = pair
    rows = [tokenizer(prompt).input_ids or [tokenizer.eos_token_id] for prompt in PROMPTS]
    unending = [greedy_by_hand(model, ids, 12, []) for ids in rows]
    # A token that some rows reach, at different times, and others do not.
    end = max(
        {token for new in unending for token in new},
        key=lambda token: len({new.index(token) for new in unending if token in new}),
    )
    make_end(model, end)
    speed = Speed()
    made = list(generate(model, tokenizer, PROMPTS, GREEDY, speed=speed))
    expected = [greedy_by_hand(model, ids, 12, [end, tokenizer.eos_token_id]) for ids in rows]
    assert [m.tokens for m in made] == [len(new) for new in expected]
    assert len({m.tokens for m in made}) > 1
    ended = [new[-1] in (end, tokenizer.eos_token_id) for new in expected]
    assert [m.finish for m in made] == ["eos" if e else "length" for e in ended]
    stripped = [new[:-1] if e else new for new, e in zip(expected, ended, strict=True)]
    assert [m.text for m in made] == tokenizer.batch_decode(stripped, skip_special_tokens=True)
    assert speed.tokens == sum(len(new) for new in expected)
    assert speed.prompt_tokens == sum(map(len, rows))
    assert speed.rate == pytest.approx((speed.tokens - len(PROMPTS)) / speed.decode_seconds)


def test_the_static_cache_gives_the_same_text(pair, monkeypatch):
    model, tokenizer = pair
    caches = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda *a, **k: (caches.append(type(k["past_key_values"]).__name__), forward(*a, **k))[1],
    )
    dynamic = texts(model, tokenizer, PROMPTS, GREEDY)
    assert set(caches) == {"DynamicCache"}
    caches.clear()
    assert texts(model, tokenizer, PROMPTS, Sampling(12, temperature=0, cache="static")) == dynamic
    assert set(caches) == {"StaticCache"}


def test_a_model_without_static_cache_is_told_of_the_other(pair, monkeypatch):
    model, tokenizer = pair

    def refuse(**options):
        raise ValueError(f"no {options['generation_config'].cache_implementation} cache here")

    monkeypatch.setattr(model, "generate", refuse)
    with pytest.raises(UserError, match=r"no static cache here.*--cache dynamic"):
        list(generate(model, tokenizer, ["a"], Sampling(cache="static")))


def test_another_model_with_few_positions(llama_folder):
    model, tokenizer = load(llama_folder)
    model.double()
    prompts = ["a" * n for n in (20, 3, 22, 5, 20, 16)]  # a token each letter, of 24 positions
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    made = list(generate(model, tokenizer, prompts, Sampling(8, temperature=0)))
    ends = [tokenizer.eos_token_id, 65]
    expected = [greedy_by_hand(model, ids, min(8, 24 - len(ids)), ends) for ids in rows]
    assert [m.tokens for m in made] == [len(new) for new in expected]
    shown = [[token for token in new if token not in ends] for new in expected]
    assert [m.text for m in made] == tokenizer.batch_decode(shown, skip_special_tokens=True)
    assert list(generate(model, tokenizer, prompts, Sampling(8, temperature=0, cache="static"))) == made


def test_what_a_folder_asks_for_is_set_aside_and_named(llama_folder, capsys):
    model, tokenizer = load(llama_folder)
    said = capsys.readouterr().err
    assert all(name in said for name in ("repetition_penalty", "stop_strings", "min_length", "num_beams"))
    # Whoever generates with the model in another way, as lm-eval does, meets none of it either.
    row = tokenizer("beta", return_tensors="pt")
    new = model.generate(**row, max_new_tokens=9, do_sample=False)[0, row.input_ids.shape[1] :].tolist()
    assert new == greedy_by_hand(model, row.input_ids[0].tolist(), 9, [tokenizer.eos_token_id, 65])


def test_special_tokens_in_a_prompt_are_what_they_were_in_training(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    assert end not in encode(tokenizer, f"alpha {tokenizer.eos_token}")  # as `data prepare` does by default
    set_special_tokens(tokenizer, "tokens")
    assert end in encode(tokenizer, f"alpha {tokenizer.eos_token}")


def test_a_prompt_begins_as_a_document_and_has_no_end(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bare = encode(tokenizer, "alpha")
    tokenizer.add_special_tokens({"bos_token": "<s>", "sep_token": "</s>"})
    ids = dict(zip(("<s>", "</s>"), tokenizer.convert_tokens_to_ids(["<s>", "</s>"]), strict=True))
    both = TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    tokenizer.backend_tokenizer.post_processor = both
    assert encode(tokenizer, "alpha") == [ids["<s>"], *bare]
    assert encode(tokenizer, "") == [ids["<s>"]]


def test_unlimited_positions_and_foreign_tokens(llama_folder):
    model, tokenizer = load(llama_folder)
    del model.config.max_position_embeddings
    (made,) = generate(model, tokenizer, ["a" * 30], Sampling(3, temperature=0))
    assert 1 <= made.tokens <= 3
    model.resize_token_embeddings(50)
    with pytest.raises(UserError, match=r"prompt 2 has token \d+ but the model only 50.*tokenizer"):
        list(generate(model, tokenizer, ["!", "~~"], Sampling(3)))


def test_a_chat_template_wraps_the_prompt(chat_folder, capsys):
    model, tokenizer = load(chat_folder)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "alpha"}]
    wrapped = "(system) be brief\n(user) alpha\n(assistant)"
    sampling = Sampling(9, temperature=0)
    (reply,) = texts(model, tokenizer, [messages], sampling)
    assert [reply] == texts(model, tokenizer, [wrapped], sampling)
    options = ["--temperature", "0", "--max-new-tokens", "9"]
    assert run(["generate", str(chat_folder), "--chat", "--system", "be brief", "--prompt", "alpha", *options]) == 0
    assert capsys.readouterr().out == reply + "\n"


def test_a_chat_template_that_loops_is_ended(pair, monkeypatch):
    _, tokenizer = pair
    many = "{% for i in range(90000) %}"
    monkeypatch.setattr(tokenizer, "chat_template", f"{many * 3}{'{% endfor %}' * 3}")
    monkeypatch.setattr("motifarch.inference.sampling.TEMPLATE_LIMIT_S", 0.2)
    with pytest.raises(UserError, match="it may loop"):
        encode(tokenizer, conversation("a"))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(pair, monkeypatch, temperature):
    model, tokenizer = pair
    norm = model.model.norm.weight
    monkeypatch.setattr(norm, "data", torch.full_like(norm, torch.nan))
    with pytest.raises(UserError, match="not finite"):
        texts(model, tokenizer, ["a"], Sampling(2, temperature))


def test_a_chat_template_writes_the_special_tokens_itself(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    start = (tokenizer.eos_token, tokenizer.eos_token_id)
    adds_start = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    tokenizer.backend_tokenizer.post_processor = adds_start
    text = "(user) alpha\n(assistant)"
    plain = encode(tokenizer, text)
    assert plain[0] == tokenizer.eos_token_id
    assert encode(tokenizer, [{"role": "user", "content": "alpha"}]) == plain[1:]


def test_conversations_in_a_file(chat_folder, tmp_path, capsys):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "one"}]
    bare = [{"role": "user", "content": "one"}]
    lines = [{"prompt": "one", "id": 7}, {"messages": own}, {"messages": bare}]
    path = prompt_file(tmp_path, *lines)
    options = ["--prompts", str(path), "--temperature", "0", "--max-new-tokens", "6"]
    assert run(["generate", str(chat_folder), *options, "--system", "given", "--chat"]) == 0
    made = results(capsys.readouterr().out)
    given = [{"role": "system", "content": "given"}, *bare]
    model, tokenizer = load(chat_folder)
    expected = texts(model, tokenizer, [given, own, given], Sampling(6, temperature=0))
    assert [line.pop("text") for line in made] == expected
    assert [{key: line[key] for key in given_line} for line, given_line in zip(made, lines, strict=True)] == lines
    assert all(set(line) - {"id", "prompt", "messages"} == {"tokens", "finish"} for line in made)


def test_conversations_that_cannot_be(folder, chat_folder, tmp_path):
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=f"{bare} has no chat template.*without --chat"):
        run(["generate", str(bare), "--prompt", "alpha", "--chat"])
    bad = [{"role": "robot", "content": "x"}]
    path = prompt_file(tmp_path, {"prompt": "alpha"}, {"messages": bad})
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2.*no robots here"):
        run(["generate", str(chat_folder), "--prompts", str(path)])
    for options, reason in (
        (["--chat"], "nothing to answer"),
        (["--prompt", "a", "--system", "b"], "add --chat"),
        (["--prompts", str(prompt_file(tmp_path, "a", name="a.txt")), "--system", "b"], "add --chat"),
    ):
        with pytest.raises(UserError, match=reason):
            run(["generate", str(chat_folder), *options])


def test_too_little_memory_names_the_options_to_lower(pair, monkeypatch):
    model, tokenizer = pair

    def full(**options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(UserError, match="lower --batch-size"):
        list(generate(model, tokenizer, ["a", "b"]))


def test_refuses_with_a_reason(folder, finished_run, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="motifarch export"):
        load(finished_run)
    model, tokenizer = load(folder)
    with pytest.raises(UserError, match=r"the prompt has .* shorten the prompt"):
        list(generate(model, tokenizer, ["alpha " * 40_000]))
    for option in (
        ["--max-new-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--top-p", "0"],
        ["--batch-size", "0"],
    ):
        with pytest.raises(UserError, match=option[0]):
            run(["generate", str(folder), *option])


def test_command_line_streams_prompt_and_speed(folder, capsys):
    assert run(["generate", str(folder), "--prompt", "gamma", "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    model, tokenizer = load(folder)
    assert captured.out == "gamma" + texts(model, tokenizer, ["gamma"], Sampling(5))[0] + "\n"
    count = len(tokenizer("gamma").input_ids)
    assert f"[prompt {count} tokens in " in captured.err
    assert captured.err.endswith(" tokens/s]\n")


def test_the_prompt_may_come_from_standard_input(folder, capsys, monkeypatch):
    options = ["generate", str(folder), "--prompt", "-", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"alpha\n\nbeta \n")))
    assert run(options) == 0
    assert capsys.readouterr().out.startswith("alpha\n\nbeta ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        run(options)


def test_a_reader_that_stops_reading_gets_no_traceback(folder, tmp_path):
    path = prompt_file(tmp_path, "alpha", "beta", name="p.txt")
    code = "import sys; from motifarch.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "generate", str(folder), "--prompts", str(path), "--max-new-tokens", "2"]
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writing)
    assert made.returncode == 1
    assert "Traceback" not in made.stderr
    assert "BrokenPipe" not in made.stderr


def test_ctrl_c_ends_with_the_text_so_far(folder, capsys, monkeypatch):
    model, tokenizer = load(folder)
    forward, left = model.forward, iter(range(6))

    def interrupted(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", interrupted)
    prompt = ["alpha"]
    with pytest.raises(KeyboardInterrupt):
        list(generate(model, tokenizer, prompt, GREEDY, stream=True))
    monkeypatch.undo()
    shown = capsys.readouterr().out
    assert shown == "alpha" + texts(model, tokenizer, prompt, Sampling(6, temperature=0))[0] + "\n"
