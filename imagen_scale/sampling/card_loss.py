"""Faults of a card after which a process computes nothing more on it; no torch."""

import re

# Of CUDA: "leaves the process in an inconsistent state and any further CUDA work will return the
# same error" (CUDA Runtime API, cudaError_t); 999 is an unknown error, of which no better is known.
LASTING = {214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 999}


def is_card_lost(reason: str) -> bool:
    """Whether what ONNX Runtime says of a failed call is such a fault."""
    return any(int(number) in LASTING for number in re.findall(r"CUDA failure (\d+)", reason))


def card_lost(what: str, reason: str) -> str:
    """What is said of it."""
    return (
        f"{what}: the card failed ({reason}), and computes nothing more for this process. Start "
        f"again; if it happens again, look into `dmesg` for the driver's own words."
    )
