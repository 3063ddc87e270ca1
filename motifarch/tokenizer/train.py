"""A byte-level BPE, trained on text."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from motifarch.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of text


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
