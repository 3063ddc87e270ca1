"""Drafts change how fast tokens come, and none of them."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, StaticCache

from helpers.models import random_ids, tiny_model
from helpers.motif_3 import TINY, tiny_motif_3
from motifarch.cli import run
from motifarch.errors import UserError
from motifarch.export import export
from motifarch.inference.speculative import SpeculativeDecoding
from motifarch.models.motif import MotifForCausalLM

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


def guessing_model(seed: int = 0, **changes: Any) -> MotifForCausalLM:
    """A model whose next token is mostly a function of the last one, which its layer for
    multi-token prediction knows: many of its drafts are right.

    In float64, where rounding cannot decide between two words.
    """
    model = tiny_motif_3(seed=seed, **changes)
    predictor: Any = model.model.mtp_layers[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("wo.weight", "down_proj", "act_fn.bias")):
                parameter *= 0.1
        width = model.config.hidden_size
        predictor.input_proj.weight.copy_(torch.cat((torch.zeros(width, width), torch.eye(width)), dim=1))
        predictor.embed_norm.weight.fill_(1.0)
        predictor.final_layernorm.weight.copy_(model.model.norm.weight)
    return model


def prompt(length: int = 9, seed: int = 1) -> Tensor:
    return random_ids(1, length, seed=seed, vocab_size=TINY["vocab_size"])


def expected_counts(model: MotifForCausalLM, ids: Tensor, length: int) -> SpeculativeDecoding:
    """What is drafted and accepted on the way to ids (1, S) from its first ``length``, by the
    predictions of one pass over them all.
    """
    with torch.no_grad():
        predicted = model(ids, return_mtp_logits=True).mtp_logits.argmax(-1)[0].tolist()
    tokens, counts, known = ids[0].tolist(), SpeculativeDecoding(), length + 1
    while known < len(tokens):
        right = predicted[known - 2] == tokens[known]
        counts.drafted += 1
        # A pass gives a token, and another one where the draft was right, if any is wanted.
        counts.accepted += right and known + 1 < len(tokens)
        known += 1 + right
    return counts


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 5))])
def test_greedy_tokens_are_those_without_drafts(seed: int) -> None:
    """Far past the window; and what is drafted is what one pass over all tokens predicts."""
    model, ids, decoding = guessing_model(seed), prompt(seed=seed + 1), SpeculativeDecoding()
    options = GREEDY | {"max_new_tokens": 20 if seed == 0 else 60, "repetition_penalty": 1.2}
    plain = model.generate(ids, **options)
    found = model.generate(ids, custom_generate=decoding, **options)
    assert torch.equal(found, plain)
    assert decoding == expected_counts(model, found, ids.shape[1])
    assert 0 < decoding.accepted < decoding.drafted


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gda", "gda window", "diff_v2", "softmax"])
def test_other_attention_drafts_too(variant: str) -> None:
    model = tiny_model(variant, dtype=torch.float64, num_nextn_predict_layers=1)
    ids, options = prompt(), GREEDY | {"max_new_tokens": 40, "repetition_penalty": 1.5}
    found = model.generate(ids, custom_generate=SpeculativeDecoding(), **options)
    assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.slow
def test_text_ends_at_each_end_token_and_length() -> None:
    """Whether a pass gives the end first or after a draft."""
    model, ids = guessing_model(), prompt()
    free = model.generate(ids, max_new_tokens=12, **GREEDY)[0, 9:].tolist()
    for count, end in [(n, None) for n in (1, 2, 3)] + [(12, token) for token in free[:6]]:
        options = GREEDY | {"max_new_tokens": count, "eos_token_id": end}
        found = model.generate(ids, custom_generate=SpeculativeDecoding(), **options)[0, 9:].tolist()
        assert found == (free[: free.index(end) + 1] if end is not None else free[:count])


@pytest.mark.slow
def test_drawn_tokens_are_those_of_the_same_draws_without_drafts() -> None:
    model, ids, decoding = guessing_model(2), prompt(), SpeculativeDecoding()
    options = GREEDY | {"do_sample": True, "temperature": 0.5, "top_k": 0, "max_new_tokens": 24}
    torch.manual_seed(0)
    plain = model.generate(ids, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, custom_generate=decoding, **options), plain)
    assert 0 < decoding.accepted < decoding.drafted


@pytest.mark.slow
def test_a_padded_prompt_and_a_cache_that_goes_on() -> None:
    model, ids = guessing_model(), prompt(14)
    padded, mask = (torch.nn.functional.pad(t, (3, 0)) for t in (ids, torch.ones_like(ids)))
    options = GREEDY | {"max_new_tokens": 16}
    plain = model.generate(ids, **options)
    found = model.generate(padded, attention_mask=mask, custom_generate=SpeculativeDecoding(), **options)
    assert torch.equal(found[:, 3:], plain)

    cache = DynamicCache(config=model.config)
    decoding = SpeculativeDecoding()
    first = model.generate(ids, past_key_values=cache, custom_generate=decoding, **(options | {"max_new_tokens": 7}))
    assert torch.equal(
        model.generate(first, past_key_values=cache, custom_generate=decoding, **(options | {"max_new_tokens": 9})),
        plain,
    )
    assert cache.get_seq_length() == plain.shape[1] - 1


def test_what_it_does_not_serve_is_refused() -> None:
    model, ids, options = guessing_model(), prompt(), GREEDY | {"custom_generate": SpeculativeDecoding()}
    without = tiny_motif_3(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        without.generate(ids, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="one row"):
        model.generate(ids.expand(2, -1), max_new_tokens=2, **options)
    cache = StaticCache(model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="StaticCache, from which no token can be taken back"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="no output_scores"):
        model.generate(ids, output_scores=True, return_dict_in_generate=True, max_new_tokens=2, **options)


@pytest.mark.slow
def test_the_command_writes_the_same_text_and_tells_the_accepted_share(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = export(finished_run, tmp_path / "plain")
    folder = shutil.copytree(plain, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    model = guessing_model(vocab_size=len(AutoTokenizer.from_pretrained(plain)))
    model.save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("alpha\nbeta gamma\n")
    for temperature in ("0", "0.7"):
        options = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "20", "--temperature", temperature]
        texts = []
        for more in ([], ["--speculative"]):
            assert run(["generate", str(folder), *options, *more]) == 0
            said = capsys.readouterr()
            texts.append(said.out)
        assert texts[0] == texts[1]
        assert re.search(r"\d% of \d+ drafts accepted", said.err)
    written = []
    for more in ([], ["--speculative"]):  # streamed
        assert run(["generate", str(folder), "--prompt", "alpha", *options[2:], *more]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert len(written[0]) > len("alpha\n")
    for given, message in (
        ([str(plain)], "no layer for multi-token prediction"),
        ([str(folder), "--batch-size", "2"], "--batch-size is 2"),
        ([str(folder), "--cache", "static"], "--cache static"),
    ):
        with pytest.raises(UserError, match=message):
            run(["generate", *given, *options, "--speculative"])
