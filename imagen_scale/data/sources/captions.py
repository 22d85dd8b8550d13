"""The rules for captions, whatever file or data set they come from."""

import unicodedata
from typing import Any

from imagen_scale.data.blank import is_blank
from imagen_scale.errors import DataError


def clean_caption(caption: Any) -> str:
    """A caption as the text encoder gets it.

    White space and control characters, of which a stray byte-order mark is one, become single
    blanks. Everything else stays: letters of every script, their direction marks, and length,
    since the encoder cuts by tokens.

    Args:
        caption: What the list or the caption file holds; None where it holds nothing.

    Returns:
        Text with at least one visible character.

    Raises:
        DataError: With the reason only; the caller knows the picture's name.
    """
    if caption is None:
        raise DataError("the caption is missing; write one or remove the picture.")
    if not isinstance(caption, str):
        raise DataError(
            f"the caption is a {type(caption).__name__}, not text; give one text per picture."
        )
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise DataError("the caption holds a broken character; correct it.") from None
    text = " ".join("".join(" " if _is_control(c) else c for c in caption).split())
    if is_blank(text):
        raise DataError("the caption is empty; write one or remove the picture.")
    return text


def _is_control(character: str) -> bool:
    return character == "\ufeff" or unicodedata.category(character) == "Cc"
