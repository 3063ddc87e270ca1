"""Conversations of different lengths, a tokenizer with a chat template, and their loss by hand."""

import string
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_WORDS = ["<pad>", "<end>", "user", "assistant", *"0123456789+=", "what", "is", "the", "sum"]
_IDS = {word: i for i, word in enumerate(_WORDS)}

# Ends of turns are the assistant's to write, and so are learnt.
_TEMPLATE = """\
{%- for message in messages %}{{ message.role + ' ' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + ' <end>' }}{% endgeneration %}
{%- else %}{{ message.content + ' <end>' }}{% endif %}{{ ' ' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant' }}{% endif %}"""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: ids below 61, 0 for padding."""
    words = Tokenizer(models.WordLevel(_IDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter: ids below 61, 0 for padding; every other token is text."""
    signs = ["<pad>", *string.ascii_letters, *string.digits[:8]]
    letters = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<pad>"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def _sum(a: int, b: int, words: str) -> list[dict[str, str]]:
    question = f"{words} {a} + {b}".strip()
    return [{"role": "user", "content": question}, {"role": "assistant", "content": f"{a} + {b} = {a + b}"}]


CHATS = [
    _sum(1, 2, ""),
    _sum(3, 4, "what is the sum") + _sum(2, 2, "the sum"),
    _sum(5, 1, "what is"),
    _sum(2, 7, "") + _sum(0, 8, "what is") + _sum(4, 4, ""),
]


def encoded(chat: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """A conversation's ids, and which of them the assistant wrote; without the template."""
    ids, written = [], []
    for message in chat:
        words = [*message["content"].split(), "<end>"]
        ids += [_IDS[message["role"]], *(_IDS[word] for word in words)]
        written += [False] + [message["role"] == "assistant"] * len(words)
    return torch.tensor(ids), torch.tensor(written)


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of each token but the first, given those before it, of a sequence alone."""
    logits = model(ids[None]).logits[0, :-1].float()
    return F.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]


def mean_loss(model: Any, *, assistant_only: bool) -> Tensor:
    """Over the tokens of all :data:`CHATS`, each read by itself."""
    terms = []
    for ids, written in map(encoded, CHATS):
        losses = -log_probabilities(model, ids)
        terms.append(losses[written[1:]] if assistant_only else losses)
    return torch.cat(terms).mean()
