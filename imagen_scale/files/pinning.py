"""Whether host memory can be pinned, so that copies to and from a card need not be waited for."""

import platform


def can_pin() -> bool:
    """Whether there is a card, and its driver pins as much as is asked for.

    Under WSL 2 pinned memory is limited and its exhaustion is reported as a full card.
    """
    import torch

    return torch.cuda.is_available() and "microsoft" not in platform.release().lower()
