"""Time on a card, which works on while Python goes ahead."""

import time

import torch


def now() -> float:
    """The time when all that was asked of the card is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device() -> torch.device:
    """The card, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def without_tf32() -> None:
    """Plain fp32 in matrix products and convolutions, which a comparison of numbers wants."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
