"""Where text is split before merges: none of a token reaches beyond."""

# Hangul, Chinese characters and kana, with the marks that belong to them.
_EAST_ASIAN = r"[\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}][\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}\p{M}]*"
_LETTERS = r"[[\p{L}\p{M}]&&[^\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}]]+"
_CONTRACTION = r"(?i:'(?:s|t|re|ve|m|ll|d)(?!\p{L}))?"
# At most three, counted from the right: 1234567 is 1, 234, 567.
_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_LINE_ENDS = r"\s*[\r\n]+"

WORDS = "|".join(
    (
        # A word takes the space or the mark before it along, as in " word" and "(word".
        rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_EAST_ASIAN})",
        rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_LETTERS}){_CONTRACTION}",
        _DIGITS,
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _LINE_ENDS,
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Words, numbers and marks, in the syntax of Oniguruma, which `tokenizers` has."""

LINES = "|".join((_DIGITS, _LINE_ENDS, r"(?:(?!\s*[\r\n])\P{N})+", r"\s+"))
"""Lines without their numbers: what merges across words are made in."""
