"""Vocabularies that are lists of ranks: tiktoken's files, Mistral's Tekken, and those in packages.

A token's rank is its id, and the merge that makes it comes before those of higher ranks.
"""

import base64
import importlib.resources
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from motifarch.errors import UserError

# Where text is split, as tiktoken's openai_public.py has it, and the special tokens.
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "cl100k_base": (
        _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
        r"|\p{N}{1,3}" + _MARKS,
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}

PACKAGES = ("bpe-openai:cl100k_base", "bpe-openai:o200k_base", "mistral-common:tekken_240911")
"""Vocabularies in packages that may be installed."""


def is_ranks(name: str) -> bool:
    """Whether this names a list of ranks: a file of tiktoken's or Tekken, or one in a package."""
    return name in PACKAGES or Path(name).suffix == ".tiktoken" or Path(name).name.startswith("tekken")


def read_ranks(name: str) -> Tokenizer:
    """The tokenizer of a list of ranks.

    Args:
        name: a file ``o200k_base.tiktoken`` or ``cl100k_base.tiktoken``, a ``tekken*.json``, or one
            of :data:`PACKAGES`.

    Raises:
        UserError: the file cannot be read or says nothing of how text is split; the package is not
            installed.
    """
    package, _, vocabulary = name.partition(":")
    if name in PACKAGES and package == "bpe-openai":
        return _from_ranks(_of_bpe_openai(vocabulary), *_KNOWN[vocabulary])
    path = Path(name)
    if name in PACKAGES:
        try:
            path = Path(str(importlib.resources.files("mistral_common"))) / "data" / f"{vocabulary}.json"
        except ModuleNotFoundError:
            raise _not_installed(name, package) from None
    try:
        if path.suffix == ".json":
            return _tekken(json.loads(path.read_text(encoding="utf-8")))
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the vocabulary {name!r} ({error}): give a whole file of tiktoken's") from None
    if path.stem not in _KNOWN:
        raise UserError(
            f"{name}: a file of tiktoken's says nothing of where text is split, and {path.stem} is not known; known "
            f"are {', '.join(_KNOWN)}: name the file so, or give the folder of a Hugging Face tokenizer"
        )
    return _from_ranks(ranks, *_KNOWN[path.stem])


def _of_bpe_openai(vocabulary: str) -> dict[bytes, int]:
    try:
        import bpe_openai  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ModuleNotFoundError:
        raise _not_installed(f"bpe-openai:{vocabulary}", "bpe-openai") from None
    encoding = bpe_openai.get_encoding(vocabulary)
    last = min(_KNOWN[vocabulary][1].values())
    tokens = {}
    for rank in range(last):
        try:
            tokens[encoding.decode_single_token_bytes(rank)] = rank
        except (KeyError, ValueError):  # a rank that is no token
            continue
    return tokens


def _not_installed(name: str, package: str) -> UserError:
    return UserError(f"{name}: the package {package} is not installed: pip install {package}")


def _tekken(content: dict[str, object]) -> Tokenizer:
    config, entries = content["config"], content["vocab"]
    assert isinstance(config, dict)
    assert isinstance(entries, list)
    special = config["default_num_special_tokens"]
    # Special tokens come first; the file has more tokens than the model.
    number = config["default_vocab_size"] - special
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries[:number]}
    names = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<SPECIAL_{i}>": i for i in range(3, special)}
    return _from_ranks(ranks, config["pattern"], names, first=special)


def _from_ranks(ranks: dict[bytes, int], pattern: str, special: dict[str, int], first: int = 0) -> Tokenizer:
    """A tokenizer with the ids ``first + rank``."""
    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: ranks  # type: ignore[method-assign,assignment]
    plain = json.loads(converter.tokenizer().to_str())
    vocabulary = {token: first + rank for token, rank in plain["model"]["vocab"].items()}
    # Among the others, a special token keeps its id when further tokens come.
    plain["model"]["vocab"] = vocabulary | special
    made = Tokenizer.from_str(json.dumps(plain))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made
