"""What the system hands over as text and may be any bytes; imagen-scale-runtime carries the same.

Python decodes it with the locale's encoding and keeps bytes that are none of it as halves of
surrogate pairs.
"""

from pathlib import Path


def typed(text: str) -> str:
    """Text from the command line or the environment as it was meant; as it is if none was."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        return text


def is_text(path: Path) -> bool:
    """Whether a path is Unicode text: compiled libraries open no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
