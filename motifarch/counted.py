"""Numbers with their nouns, for messages."""


def counted(number: int, thing: str) -> str:
    """``1 document``, ``2,000 documents``.

    Args:
        number: of the things.
        thing: a noun in the singular, with what may follow it: "document of one line".
    """
    noun, space, rest = thing.partition(" ")
    if number != 1:
        noun += "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{space}{rest}"
