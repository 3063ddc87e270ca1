"""Servers over HTTP, asked by the openai client, and pipelines: the tokens are generate()'s."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chats import letter_tokenizer
from helpers.host_models import RATIOS, host_model, moved
from helpers.python_process import run_python
from helpers.tiny import write_recipe
from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.integrations import patch

MESSAGES = [{"role": "user", "content": "alpha beta = gamma ( one"}]
TOKENS = 12

WITHOUT_MOTIFARCH = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("motifarch", "motif_kernels"):
            raise ModuleNotFoundError(f"no {name} here")

sys.meta_path.insert(0, Nothing())
from transformers.cli.transformers import app
app(sys.argv[1:], prog_name="transformers")
"""
COMMANDS = {
    "motifarch": [sys.executable, "-m", "motifarch.cli"],
    "transformers": [sys.executable, "-c", WITHOUT_MOTIFARCH],
}


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """Of a model that has learnt to write words: a byte that is no character gives no text."""
    made = tmp_path_factory.mktemp("served")
    code = "import sys; from motifarch.cli import main; main(sys.argv[1:])"
    run_python(code, "train", write_recipe(made, data), "--validation.every", "0")
    return export(made / "run", made / "model", with_code=True)


@pytest.fixture(scope="module")
def expected(folder) -> str:
    return answer(folder)


def answer(folder: Path) -> str:
    """What the model answers, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(text) > 4
    assert text.isascii()
    return text


@contextmanager
def serving(who: str, *arguments: object, log: Path) -> Iterator[OpenAI]:
    """A server in a process of its own, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(log.parent / "modules")}
    with log.open("w") as out:
        command = [*COMMANDS[who], "serve", *map(str, arguments), *options]
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        print(log.read_text())  # pytest shows it with a failure


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["plain", "continuous"])
@pytest.mark.parametrize("who", COMMANDS)
def test_a_chat_over_http_is_generates(folder, expected, tmp_path, who, batching):
    options = ["--trust-remote-code"] if who == "transformers" else []
    options += ["--continuous-batching", "--cb-num-blocks", 64] if batching == "continuous" else []
    with serving(who, folder, *options, log=tmp_path / "log.txt") as client:
        assert_answers(client, folder, expected)


def assert_answers(client: OpenAI, folder: Path, expected: str) -> None:
    """Streamed and whole."""
    options = {"model": str(folder), "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(piece or "" for piece in pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1, "not streamed"
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected
    assert whole.usage.completion_tokens <= TOKENS


@pytest.mark.slow
def test_a_patched_models_folder_is_served(tmp_path):
    model = host_model("llama")
    patch(model, ratio=RATIOS["llama"], sub_norm=True)
    moved(model).save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="--continuous-batching"):
        run(["serve", str(tmp_path / "model"), "--continuous-batching"])
    expected = answer(tmp_path / "model")
    with serving("motifarch", tmp_path / "model", log=tmp_path / "log.txt") as client:
        assert_answers(client, tmp_path / "model", expected)


def test_serving_refuses_what_is_no_models_folder(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        run(["serve", str(tmp_path)])


PIPELINE = """
    import sys
    if sys.argv[2] == "with":
        import motifarch.models
    else:
        class Nothing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("motifarch", "motif_kernels"):
                    raise ModuleNotFoundError(f"no {name} here")
        sys.meta_path.insert(0, Nothing())
    from transformers import pipeline
    generate = pipeline("text-generation", model=sys.argv[1], trust_remote_code=sys.argv[2] != "with", device="cpu")
    messages = [{"role": "user", "content": sys.argv[3]}]
    answer = generate(messages, max_new_tokens=int(sys.argv[4]), do_sample=False)
    print(answer[0]["generated_text"][-1]["content"], end="")
"""


@pytest.mark.slow
@pytest.mark.parametrize("motifarch", ["with", "without"])
def test_a_pipeline_chats(folder, expected, motifarch):
    assert run_python(PIPELINE, folder, motifarch, MESSAGES[0]["content"], TOKENS).strip() == expected.strip()
