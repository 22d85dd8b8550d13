"""Bytes in words."""


def gb(nbytes: float) -> str:
    """Bytes in words, 1 GB = 10^9."""
    if abs(nbytes) >= 1e12:
        return f"{nbytes / 1e12:.1f} TB"
    return f"{nbytes / 1e9:.2f} GB"
