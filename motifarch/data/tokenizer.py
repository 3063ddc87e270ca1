"""The tokenizer: one that exists, or a byte-level BPE trained on the data."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from motifarch.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_SPELLED = "special_tokens_in_text"
_SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of text


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer by its name on the hub or its folder.

    Raises:
        UserError: if it cannot be loaded, or has no end-of-text token.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():  # a folder's tokenizer.json; what lies beside it counts too
        path = path.parent
    try:
        config = _config(path)
        tokenizer = AutoTokenizer.from_pretrained(
            str(path if path.exists() else name_or_path), config=config, trust_remote_code=False
        )
    except Exception as error:  # the library raises many kinds, from network errors to bad files
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"cannot load tokenizer {str(name_or_path)!r} ({reason}): give a folder with a tokenizer.json, a name "
            "on the hub that is within reach, or no --tokenizer, to train one"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {str(name_or_path)!r} has no end-of-text token, which must end each document: set its "
            "eos_token (tokenizer.eos_token = ...; tokenizer.save_pretrained(folder)) and pass --tokenizer folder"
        )
    return tokenizer


def _config(folder: Path) -> PreTrainedConfig | None:
    """For a model that transformers does not know, as an exported one here: asked for its tokenizer
    transformers would take the model for another one, and warn.
    """
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not fields or fields.get("model_type") in CONFIG_MAPPING:
        return None
    return PreTrainedConfig(tokenizer_class=fields.get("tokenizer_class"))  # type: ignore[call-arg]  # any field is one


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back exactly.

    The vocabulary includes the 256 bytes and the end of text; little text gives fewer tokens.

    Raises:
        UserError: if ``vocab_size`` has no room for the bytes.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size}: it must be at least {_SMALLEST_VOCABULARY} (256 bytes and an end)")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def capped(texts: Iterable[str], most_characters: int) -> Iterator[str]:
    """The first texts, until they hold ``most_characters`` together."""
    for text in texts:
        yield text[:most_characters]
        most_characters -= len(text)
        if most_characters <= 0:
            return


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


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides the token ids: equal for copies of a tokenizer, wherever they lie."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        # Left over from the last call, not part of what the tokenizer is.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = {"rules": rules, "eos_token_id": tokenizer.eos_token_id, "vocab_size": vocabulary_size(tokenizer)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
