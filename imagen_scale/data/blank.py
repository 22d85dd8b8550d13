"""Texts that say nothing."""

import unicodedata


def says_nothing(rest: str) -> bool:
    """Whether a text's end is nothing that a tokenizer would read: blanks and marks on letters."""
    return all(unicodedata.category(c)[0] in "CZM" for c in rest)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    kinds = [unicodedata.category(c) for c in text]
    return all(kind[0] in "CZ" and kind != "Cs" for kind in kinds)  # Cs: of another encoding
