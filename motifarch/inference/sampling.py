"""Sampling from a causal language model: one prompt streamed, or many in batches.

The decoding is transformers' own ``generate``; what is added here are random draws that belong to a
prompt instead of its batch, batches of similar prompts, and errors that name the prompt.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from motifarch.counted import counted
from motifarch.errors import UserError, first_line
from motifarch.inference.speculative import SpeculativeDecoding, has_draft
from motifarch.inference.time_limit import OutOfTimeError, time_limit
from motifarch.tokenizer.encoding import begin_tokens, encode_texts, takes_special_tokens

Prompt = str | list[dict[str, str]]
"""Text to continue, or a conversation to answer: messages with "role" and "content"."""

TEMPLATE_LIMIT_S = 5.0
"""What a chat template may take for a conversation, where a millisecond is usual."""

CACHES = ("dynamic", "static")

# Prompts of similar length are found among this many batches' worth: enough, and soon done.
_WINDOW = 8


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: where to stop at the latest.
        temperature: 0 always takes the likeliest token.
        top_p: sample from the smallest set of tokens with this probability.
        seed: with the prompt's number (counted from 0), decides the prompt's random draws.
        cache: "dynamic" grows with the text; "static" has its final size at once, which lets a
            GPU's passes be compiled.
        speculative: draft tokens with the model's layer for multi-token prediction, which changes
            how fast they come.

    Raises:
        UserError: a value outside what is accepted.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    cache: str = "dynamic"
    speculative: bool = False

    def __post_init__(self) -> None:
        hot_enough = self.temperature == 0 or 1e-6 <= self.temperature <= 1000
        for option, value, accepted, holds in (
            ("--max-new-tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1),
            ("--temperature", self.temperature, "0, or from 1e-6 to 1000", hot_enough),
            ("--top-p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            ("--cache", self.cache, f"one of {', '.join(CACHES)}", self.cache in CACHES),
        ):
            if not holds:
                raise UserError(f"{option} is {value}; it must be {accepted}")
        if self.speculative and self.cache == "static":
            raise UserError("--speculative takes drafts back, and --cache static cannot; leave one of the two out")


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt: the text without the prompt, and how many ``tokens`` that
    took, the end-of-sequence token included; ``finish`` is "eos" if the model ended the text,
    "length" if the room or max_new_tokens did.
    """

    text: str
    tokens: int
    finish: str


@dataclass
class Speed:
    """Time and tokens of the prompts so far, without padding.

    Attributes:
        prompts: how many were continued.
        prompt_tokens: theirs.
        prompt_seconds: until each batch had its first new tokens, by the prompts' own pass.
        tokens: made by the model, first ones and end-of-sequence tokens included.
        decode_seconds: from each batch's first new tokens to its last.
        speculation: counts drafts, where tokens are drafted.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0
    speculation: SpeculativeDecoding = field(default_factory=SpeculativeDecoding)

    @property
    def rate(self) -> float | None:
        """Decoded tokens per second after each prompt's first, over all rows; None if none."""
        decoded = self.tokens - self.prompts
        return decoded / self.decode_seconds if decoded else None

    def __str__(self) -> str:
        prompts = "prompt" if self.prompts == 1 else f"{self.prompts:,} prompts,"
        rate = "" if self.rate is None else f" at {self.rate:,.1f} tokens/s"
        read, made = counted(self.prompt_tokens, "token"), counted(self.tokens, "token")
        share, drafts = self.speculation.accepted_share, counted(self.speculation.drafted, "draft")
        taken = "" if share is None else f", {share:.0%} of {drafts} accepted"
        return f"{prompts} {read} in {self.prompt_seconds:.2f} s, {made}{rate}{taken}"


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, name: str = "the prompt") -> list[int]:
    """A prompt's token ids, never none: an empty text starts a document, and messages go through
    the tokenizer's chat template, up to where the reply starts. Errors call the prompt by ``name``.

    Raises:
        UserError: messages without a chat template or not accepted by it, text that is no Unicode,
            or an empty prompt for a tokenizer without a token to start from.
    """
    folder, text = tokenizer.name_or_path, prompt
    if not isinstance(text, str):
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {folder} has no chat template, which {name} needs to become a conversation; use "
                "--prompt without --chat, or set tokenizer.chat_template and save it there"
            )
        try:
            with time_limit(TEMPLATE_LIMIT_S):
                text = str(tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True))
        except OutOfTimeError:
            raise UserError(
                f"{name}: the chat template of {folder} is not done within {TEMPLATE_LIMIT_S:g} s: it may loop; mend "
                "tokenizer.chat_template, or use --prompt without --chat"
            ) from None
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise UserError(
                f"{name}: the chat template of {folder} does not take these messages ({first_line(error)}); change "
                "their roles, or leave out the system message"
            ) from None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds {text[error.start]!a}, half of a surrogate pair, which is no character; remove it"
        ) from None
    if isinstance(prompt, str):
        spelled, begin = takes_special_tokens(tokenizer), begin_tokens(tokenizer)
    else:  # a chat template writes the special tokens itself
        spelled, begin = True, []
    (ids,) = encode_texts(tokenizer, [text], special_tokens=spelled, begin=begin)
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if start is None:
        raise UserError(
            f"{name} is empty, and the tokenizer of {folder} has no end-of-text or beginning-of-text token to start "
            "a document from; give some text"
        )
    return [start]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    *,
    batch_size: int | None = None,
    stream: bool = False,
    names: Sequence[str] | None = None,
    speed: Speed | None = None,
    report: Callable[[int], object] | None = None,
) -> Iterator[Completion]:
    """Continue prompts, several at once, and give the results in the prompts' order as they come.

    All prompts are checked before the first is continued. Batches are made of prompts of similar
    length; one that leaves less room than ``max_new_tokens`` is batched only with others that leave
    as much.

    A prompt's random draws come from the seed and its number alone, so neither the other prompts
    nor the device change them. Its text may still change with those, where rounding moves a token's
    probability across a draw or, at temperature 0, decides between tokens that are as likely:
    padding and batch size change how a GPU sums.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: texts and conversations.
        sampling: how; default ``Sampling()``.
        batch_size: how many prompts to continue at once; default 8, or 1 with speculation, which
            continues no more.
        stream: print the text as it comes, after the prompt unless that is a conversation; for one
            prompt only.
        names: what errors call the prompts; default their numbers.
        speed: gets the time and tokens added.
        report: called after each batch with its number of prompts.

    Yields:
        A completion for each prompt.

    Raises:
        UserError: what :func:`encode` raises, a prompt without room in the model's positions or
            with tokens that the model does not have, a batch too large for the GPU's memory, or a
            cache or speculation that the model does not take.
    """
    sampling, speed = sampling or Sampling(), speed or Speed()
    if batch_size is None:
        batch_size = 1 if sampling.speculative else 8
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    if sampling.speculative:
        _check_speculative(model, batch_size)
    if stream and len(prompts) != 1:
        raise UserError(f"{len(prompts)} prompts cannot be streamed; stream one, or leave stream=True out")
    if names is None:
        names = ["the prompt"] if len(prompts) == 1 else [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    rows = [encode(tokenizer, prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    limits = [min(sampling.max_new_tokens, _room(model, ids, name)) for ids, name in zip(rows, names, strict=True)]
    streamer = None
    if stream:
        streamer = TextStreamer(tokenizer, skip_prompt=not isinstance(prompts[0], str), skip_special_tokens=True)

    finished: dict[int, Completion] = {}
    following = 0
    for batch in _batches(rows, limits, batch_size):
        made = _continue(model, tokenizer, [rows[i] for i in batch], batch, limits[batch[0]], sampling, streamer, speed)
        for i, (new, finish) in zip(batch, made, strict=True):
            context = rows[i] if isinstance(prompts[i], str) else []
            shown = new[:-1] if finish == "eos" else new
            finished[i] = Completion(_text(tokenizer, context, shown), len(new), finish)
        if report is not None:
            report(len(batch))
        while following in finished:
            yield finished.pop(following)
            following += 1


def _check_speculative(model: PreTrainedModel, batch_size: int) -> None:
    if batch_size > 1:
        raise UserError(f"--batch-size is {batch_size}, but --speculative continues one prompt at a time; set it to 1")
    if not has_draft(model):
        raise UserError(
            f"--speculative: {type(model).__name__} has no layer for multi-token prediction (num_nextn_predict_layers "
            "in its config.json), which drafts; leave --speculative out"
        )


def set_aside_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Leaves a model's generation config no setting but token ids, and keeps ids that the tokenizer
    lacks from being sampled. Returns the names of the settings that no longer decide.
    """
    own = model.generation_config or GenerationConfig()
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, suppress_tokens=missing_ids(model, tokenizer) or None)
    # 0 and 1 leave text alone, or only say how results are handed over.
    deciding = {name for name, value in own.to_diff_dict().items() if value not in (None, 0, 1)}
    return sorted(deciding - set(ids) - {"transformers_version"})


def missing_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Outputs that are no token of the tokenizer: vocabularies are padded to round sizes."""
    known = set(tokenizer.get_vocab().values())
    return [token for token in range(model.config.get_text_config().vocab_size) if token not in known]


def _room(model: PreTrainedModel, ids: list[int], name: str) -> int | float:
    """How many tokens the positions leave after a prompt; infinitely many without a limit."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    if max(ids) >= len(weight):
        raise UserError(
            f"{name} has token {max(ids)} but the model only {len(weight)} tokens; its tokenizer is another model's: "
            "put the model's own beside it"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(ids) >= positions:
        raise UserError(f"{name} has {len(ids)} tokens but the model {positions} positions; shorten the prompt")
    return math.inf if positions is None else positions - len(ids)


def _batches(rows: Sequence[list[int]], limits: Sequence[float], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows to continue together, the longest first, so that what does not fit into
    memory fails early.

    Those of a batch have the same limit: a row past its own would hold up the rest at positions
    that the model does not have.
    """
    for start in range(0, len(rows), _WINDOW * batch_size):
        window = range(start, min(start + _WINDOW * batch_size, len(rows)))
        order = sorted(window, key=lambda i: (limits[i], len(rows[i])), reverse=True)
        for _, group in groupby(order, key=lambda i: limits[i]):
            same = list(group)
            for first in range(0, len(same), batch_size):
                yield same[first : first + batch_size]


@torch.inference_mode()
def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    numbers: Sequence[int],
    limit: float,
    sampling: Sampling,
    streamer: TextStreamer | None,
    speed: Speed,
) -> list[tuple[list[int], str]]:
    """Each row's new tokens, an end-of-sequence token included, and how it finished."""
    own = model.generation_config
    configured = own.eos_token_id if own is not None else None
    ends = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None}
    pad = next((token for token in (tokenizer.pad_token_id, *sorted(ends)) if token is not None), 0)
    ids, mask = (
        pad_sequence(parts, batch_first=True, padding_value=padding, padding_side="left").to(model.device)
        for parts, padding in (
            ([torch.tensor(row) for row in rows], pad),
            ([torch.ones(len(row), dtype=torch.long) for row in rows], 0),
        )
    )
    processors: list[LogitsProcessor] = [_Finite()]
    if sampling.temperature > 0:
        top_p = [TopPLogitsWarper(float(sampling.top_p))] if sampling.top_p < 1 else []
        processors += [TemperatureLogitsWarper(float(sampling.temperature)), *top_p, _Draw(sampling.seed, numbers)]
    first_tokens = _FirstTokens(model.device)
    speed.speculation.streamer = streamer
    started = time.perf_counter()
    model.generation_config = GenerationConfig()  # the model's own would fill in what the options leave open
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=int(limit),
                # None, not "dynamic": models with a state of their own kind warn of any name.
                cache_implementation=None if sampling.cache == "dynamic" else sampling.cache,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                suppress_tokens=sorted(set(missing_ids(model, tokenizer)) - ends) or None,
            ),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([first_tokens]),
            custom_generate=speed.speculation if sampling.speculative else None,
            streamer=streamer,
        )[:, ids.shape[1] :].tolist()
    except KeyboardInterrupt:
        if streamer is not None:
            streamer.end()  # what it still held back for a word to end
        raise
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory with {counted(len(rows), 'prompt')} of up to {ids.shape[1]} tokens, and {int(limit)} "
            "new ones; lower --batch-size or --max-new-tokens"
        ) from None
    except ValueError as error:
        if sampling.cache == "static":
            raise UserError(
                f"{type(model).__name__} does not work with --cache static ({first_line(error)}); use --cache dynamic"
            ) from None
        raise
    finally:
        model.generation_config = own
    speed.decode_seconds += time.perf_counter() - first_tokens.time
    speed.prompt_seconds += first_tokens.time - started
    made = []
    for new in output:
        end = next((place for place, token in enumerate(new) if token in ends), None)
        made.append((new, "length") if end is None else (new[: end + 1], "eos"))
    speed.prompts += len(rows)
    speed.prompt_tokens += sum(map(len, rows))
    speed.tokens += sum(len(new) for new, _ in made)
    return made


class _Finite(LogitsProcessor):
    """Refuses scores that no token can be taken by."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (B, V), as they are."""
        # +inf and NaN are each row's largest; where all are -inf, so is that.
        if not scores.amax(-1).isfinite().all():
            raise UserError(
                "the model's logits are not finite (NaN or infinite): its weights are damaged, or too large for the "
                "dtype it computes in; export or copy the folder anew"
            )
        return scores


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn from a random sequence that is the row's own:
    transformers draws for all rows from one, so that a text would change with the prompts beside
    it.
    """

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        self.sequences = [random.Random(f"{seed} {number}") for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (B, V) -> (B, V), -inf but for the token drawn."""
        below = scores.double().softmax(-1).cumsum(-1)
        total = below[:, -1:]
        draws = torch.tensor([[sequence.random()] for sequence in self.sequences], dtype=total.dtype).to(total.device)
        # Short of the total even after rounding: never a token of probability 0.
        target = torch.minimum(draws * total, total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(below, target, right=True)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


class _FirstTokens(StoppingCriteria):
    """Stops nothing: notes when the first new tokens were there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.time = math.nan

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if math.isnan(self.time):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the pass is only queued until here
            self.time = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _text(tokenizer: PreTrainedTokenizerBase, context: list[int], new: list[int]) -> str:
    """New tokens as text, decoded after what they continue, which keeps leading spaces."""
    before, whole, alone = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (context, context + new, new)
    )
    return whole[len(before) :] if whole.startswith(before) else alone
