"""Text to token ids, in training and in prompts alike."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

_SPELLED = "special_tokens_in_text"


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before a text, such as ``<s>``: in training and in prompts alike."""
    inner = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer("a", verbose=False).input_ids
    starts = range(len(whole) - len(inner) + 1)
    return next((list(whole[:start]) for start in starts if whole[start : start + len(inner)] == inner), [])


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special_tokens: bool, begin: list[int]
) -> list[list[int]]:
    """Token ids of texts as they begin documents and prompts.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        special_tokens: whether special tokens spelled out in a text become those tokens; else they
            stay text.
        begin: put before each text that does not spell it.
    """
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [[*([] if ids[: len(begin)] == begin else begin), *ids] for ids in encoded["input_ids"]]


def chat_text(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], str] | None:
    """What writes conversations as text; None for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        return None
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))


def spelled_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens, as text spells them, with their ids."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {token: number for token, number in (named | added).items() if token}


def takes_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens spelled out in plain text are those tokens, as they were in the data
    that the tokenizer's model was trained on; as everywhere else if the tokenizer does not say.
    """
    return bool(tokenizer.init_kwargs.get(_SPELLED, "tokens") == "tokens")


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, spelled: str) -> None:
    """Note in the tokenizer, to be saved with it, what :func:`takes_special_tokens` says."""
    tokenizer.init_kwargs[_SPELLED] = spelled
