"""Where text is split before merges: none of a token reaches beyond.

Each pattern looks at a character a bounded number of times: the engine gives up, with a panic,
after ten million steps of one match, and a run of spaces or digits may be of any length.
"""

# Hangul, Chinese characters and kana, with the marks that belong to them. The sign of a long vowel
# is of no script.
_SCRIPTS = r"\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70"
_EAST_ASIAN = rf"[{_SCRIPTS}][{_SCRIPTS}\p{{M}}]*"
_LETTERS = rf"[[\p{{L}}\p{{M}}]&&[^{_SCRIPTS}]]+"
_CONTRACTION = r"(?i:'(?:s|t|re|ve|m|ll|d)(?!\p{L}))?"
# At most three, counted from the right: 1234567 is 1, 234, 567. Only a number's first group counts
# what follows.
_DIGITS = r"(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})++(?!\p{N}))|\p{N}{1,3}"
_SPACES = r"[^\S\r\n]*+"  # of a line
_LINE_ENDS = rf"(?:{_SPACES}[\r\n]++)++"

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

LINES = "|".join((_DIGITS, _LINE_ENDS, rf"(?:{_SPACES}[^\s\p{{N}}]++)++", r"\s+"))
"""Lines without their numbers: what merges across words are made in."""
