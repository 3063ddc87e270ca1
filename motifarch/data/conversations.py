"""Conversations to fine-tune on: a chat template's tokens, of which the assistant's are trained."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from motifarch.data.documents import Tally
from motifarch.errors import UserError, first_line

# As transformers looks for them.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Gives a tokenizer the chat template in a file, to be saved with it.

    Raises:
        UserError: the file can't be read.
    """
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path} can't be read ({first_line(error)}): give a Jinja file") from None


def check_marks(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's chat template, which marks what the assistant writes.

    Raises:
        UserError: there is no template, it has no marks, or the tokenizer can't follow them.
    """
    name = tokenizer.name_or_path
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError:  # none, or several by name without a default
        raise UserError(
            f"--messages: the tokenizer {name} has no chat template to write conversations with: give a file with one "
            "as --chat-template, such as recipes/sft/chat.jinja"
        ) from None
    if not _MARK.search(template):
        raise UserError(
            f"--messages: the chat template of {name} has no {{% generation %}} marks, and they alone say which tokens "
            "are the assistant's: write {% generation %} before and {% endgeneration %} after what the assistant says "
            "(its end-of-turn token included) in a copy of it, and give that as --chat-template"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"--messages: the tokenizer {name} is a slow one, which does not say where its tokens lie in the text: "
            "convert it to a fast one (AutoTokenizer.from_pretrained(..., use_fast=True), then save_pretrained)"
        )
    return template


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[str]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """The token ids and the loss mask [n] of conversations, which are messages as JSON."""
    encoded: Any = tokenizer.apply_chat_template(
        [json.loads(messages) for messages in conversations],
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        yield list(ids), np.array(mask, dtype=bool)


@dataclass
class Fitter:
    """Cuts conversations to what a block holds, and notes what is lost by that."""

    seq_len: int
    eos_token: tuple[str, int]
    """Name and number of the end-of-text token."""
    skipped: Tally
    truncated: Tally
    noticed: Tally
    strict: bool = False
    dropped_tokens: int = 0
    trained_tokens: int = 0

    def fit(self, conversations: Iterable[tuple[str, np.ndarray]]) -> Iterator[np.ndarray]:
        """The beginnings that fit of named conversations (token ids with their mask, [n] each);
        those without a token to train are left out.

        Raises:
            UserError: with ``strict``, one is left out.
        """
        for name, stored in conversations:
            kept = stored[: self.seq_len + 1]
            trained = kept[1:][kept[1:] >= 0]  # nothing predicts the first token
            if not trained.size:
                reason = "without a token of the assistant's"
                if (stored[1:] >= 0).any():
                    reason += f" in their first {self.seq_len + 1:,} (--seq-len)"
                if self.strict:
                    raise UserError(f"--strict: {name} is {reason}: remove it from the sources, or leave --strict out")
                self.skipped.add(name, reason)
                continue
            if len(kept) < len(stored):
                self.truncated.add(name, f"cut to {self.seq_len + 1:,} tokens (--seq-len)")
            eos, number = self.eos_token
            if number not in stored:
                self.noticed.add(name, f"conversation without a trained {eos}, with which generation ends")
            self.dropped_tokens += len(stored) - len(kept)
            self.trained_tokens += trained.size
            yield kept
