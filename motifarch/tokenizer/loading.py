"""A tokenizer that exists, and what tells it from others."""

import hashlib
import json
import unicodedata
from pathlib import Path

from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from motifarch.errors import UserError
from motifarch.tokenizer.tiktoken_files import is_ranks, read_ranks


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


def composes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decomposed characters (Hangul as macOS writes it) get the tokens of composed ones."""
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None  # type: ignore[attr-defined]
    return normalizer is not None and normalizer.normalize_str("\u1100\u1161") == "\uac00"


def as_composed(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text as the tokenizer's tokens give it back, as far as composition goes."""
    if text.isascii() or not composes(tokenizer):
        return text
    return unicodedata.normalize("NFC", text)


def open_vocabulary(name: str | Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer: a folder's, one of the hub, or a list of ranks
    (:mod:`motifarch.tokenizer.tiktoken_files`).

    Raises:
        UserError: it cannot be loaded, or has no fast form.
    """
    if is_ranks(str(name)):
        backend = read_ranks(str(name))
        end = next(token for token in ("<|endoftext|>", "</s>") if backend.token_to_id(token) is not None)
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, clean_up_tokenization_spaces=False)
    found = load_tokenizer(name)
    if not isinstance(found, PreTrainedTokenizerFast) or not found.is_fast:
        raise UserError(
            f"tokenizer {str(name)!r} is a {type(found).__name__}, which has no fast form (tokenizer.json): convert it "
            "first, as transformers' AutoTokenizer.from_pretrained(..., use_fast=True) does where it can"
        )
    return found


def with_backend(tokenizer: PreTrainedTokenizerFast, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that encodes with another backend: names and template stay."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )
    copy.chat_template = tokenizer.chat_template
    return copy
