"""Names that a record gives to the files beside it."""


def leads_out(name: str) -> bool:
    """Whether a name is of no file in the record's folder or below it.

    By the name alone: what stands there may be a link, as in the cache of the Hugging Face hub.
    """
    parts = name.split("/")
    return any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in parts[0]
