"""A byte-level BPE, trained on text."""

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from motifarch.errors import UserError
from motifarch.tokenizer.special_tokens import CHAT_TEMPLATE, SpecialTokens
from motifarch.tokenizer.split_pattern import WORDS

_BYTES = 256
_PIECE = 4096  # characters


def train_bpe(texts: Iterable[str], vocab_size: int, special: SpecialTokens) -> Tokenizer:
    """A byte-level BPE of words: any text can be encoded, and decoding gives it back in NFC.

    `tokenizers` counts words as it reads: memory grows with how many differ, not with the text.

    Args:
        texts: read once.
        vocab_size: tokens, the 256 bytes and the special ones among them; little text gives fewer.
        special: the first tokens.

    Raises:
        UserError: no room for the bytes and special tokens, or a text that is no Unicode.
    """
    check_vocab_size(vocab_size, special)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = split_by(WORDS)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special.tokens,  # type: ignore[arg-type]  # names serve
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # `tokenizers` gathers 256 items before it counts their words: of whole documents, a gigabyte.
    bpe.train_from_iterator((piece for text in unicode_only(texts) for piece in pieces(text)), trainer)
    return bpe


def least_size(special: SpecialTokens) -> int:
    """Tokens of a vocabulary without any merge."""
    return _BYTES + len(special.tokens)


def check_vocab_size(vocab_size: int, special: SpecialTokens) -> None:
    """Raise UserError unless bytes and special tokens have room."""
    least = least_size(special)
    if vocab_size < least:
        raise UserError(
            f"--vocab-size {vocab_size}: it must be at least {least}, for {_BYTES} bytes and "
            f"{len(special.tokens)} special tokens"
        )


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Splits text into the pattern's matches, and these into bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    # The type stubs lack the sequence's argument.
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def unicode_only(texts: Iterable[str]) -> Iterator[str]:
    """The texts.

    Raises:
        UserError: one has half of a surrogate pair, which no encoding of Unicode can hold.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"a text that begins with {text[:40]!a} is no Unicode (character {error.start:,} is "
                f"{text[error.start]!a}, half of a pair): read its file in the encoding that it has (--encoding)"
            ) from None
        yield text


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of some thousand characters, cut where lines end if they do."""
    begin = 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def as_pretrained(
    bpe: Tokenizer, special: SpecialTokens, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers has them, which saves an ordinary folder.

    Args:
        bpe: the tokenizer.
        special: its special tokens.
        model_max_length: what transformers warns beyond, tokens.
    """
    length = {} if model_max_length is None else {"model_max_length": model_max_length}
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special.named, **length)
    if special.whole:
        made.chat_template = CHAT_TEMPLATE
    return made


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a preparation that is given none: with an end of text and padding alone.

    Raises:
        UserError: see :func:`train_bpe`.
    """
    special = SpecialTokens(whole=False, reserved=0)
    return as_pretrained(train_bpe(texts, vocab_size, special), special)


def capped(texts: Iterable[str], most_characters: int) -> Iterator[str]:
    """The first texts, until they hold ``most_characters`` together."""
    for text in texts:
        yield text[:most_characters]
        most_characters -= len(text)
        if most_characters <= 0:
            return
