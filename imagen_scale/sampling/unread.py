"""What is not read of a long prompt; imagen-scale-runtime carries the same file."""

from typing import NamedTuple

SHOWN = 60  # characters of a prompt in a sentence


class NotRead(NamedTuple):
    """What a U-Net does not read of a prompt that is longer than its `max_text_len`."""

    option: str  # "prompt" or "negative_prompt"
    unet: int  # from 1
    read: int  # tokens, with the marks of the text's ends
    tokens: int  # of the whole prompt
    text: str  # from where it is not read


def shortened(text: str) -> str:
    """The beginning of a text, for a sentence."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}..."
