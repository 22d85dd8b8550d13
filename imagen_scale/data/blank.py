"""Texts that say nothing."""

import unicodedata


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    kinds = [unicodedata.category(c) for c in text]
    return all(kind[0] in "CZ" and kind != "Cs" for kind in kinds)  # Cs: of another encoding
