"""What torch's compiled library prints by itself, past Python."""

import os


def settle_torch_log() -> None:
    """Makes it tell errors only; to be called before torch is imported.

    A connection to a rank that dies meanwhile warns with twenty lines of addresses, above the one
    line of this project that names the rank. What the user has set stays.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
