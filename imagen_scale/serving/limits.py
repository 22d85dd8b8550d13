"""How much one request may ask for."""

from typing import NamedTuple


class Limits(NamedTuple):
    """What is more is refused before any work."""

    pictures: int = 10  # of one request
    steps: int = 250  # of a stage
    prompt: int = 4000  # characters of the prompt, and of the negative one
    body: int = 2**16  # bytes
