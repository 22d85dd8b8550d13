"""Seeds made of names and numbers."""

import hashlib
import json


def seeded(*parts: int | str) -> int:
    """A number in [0, 2**63) that looks random but depends on `parts` alone."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
