"""Decoding that guesses several tokens ahead, and decoding that is compiled."""

import shutil
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from helpers.chats import letter_tokenizer
from helpers.compatibility import build, cells
from helpers.host_models import left_padded, token_ids

# Equal tokens are asked for in float64, where rounding cannot decide between two words.
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0], "max_new_tokens": 24}


def in_float64(name: str, **overrides: Any) -> Any:
    return build(name, **overrides).double()


@cells()
def test_assisted_decoding(name: str) -> None:
    """Whatever the assistant guesses, tokens are the model's own."""
    model, ids = in_float64(name), token_ids(1, 9)
    expected = model.generate(ids, **GREEDY)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    for assistant, most in ((in_float64(name), 12), (in_float64(name, num_hidden_layers=1), 25)):
        calls.clear()
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
        assert 0 < len(calls) <= most  # a good assistant's guesses are taken several at a time
    handle.remove()


@cells("gda")
def test_prompt_lookup(name: str) -> None:
    model, ids = in_float64(name), token_ids(1, 9).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY), expected)


@cells("gda")
def test_stop_strings(name: str) -> None:
    """Transformers hands the tokenizer, which finds them, on to the model."""
    model, ids, tokenizer = in_float64(name), token_ids(1, 9), letter_tokenizer()
    options = GREEDY | {"suppress_tokens": [0, *range(len(tokenizer), 97)]}
    text = tokenizer.decode(model.generate(ids, **options)[0, 9:])
    stop = text[4:7]
    stopped = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert tokenizer.decode(stopped[0, 9:]) == text[: text.index(stop) + 3]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which inductor compiles with; none is installed")
@cells()
def test_static_cache_compiled(name: str) -> None:
    """By inductor, whole and once, as transformers does by itself on a GPU."""
    torch._dynamo.reset()
    model = in_float64(name, num_hidden_layers=1)
    compile_config = CompileConfig(fullgraph=True, backend="inductor", mode="default")
    compile_config._compile_all_devices = True
    batch = left_padded([token_ids(8, seed=2), token_ids(5, seed=3)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = model.generate(**batch, cache_implementation="static", compile_config=compile_config, **GREEDY)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(out, model.generate(**batch, use_cache=False, **GREEDY))
