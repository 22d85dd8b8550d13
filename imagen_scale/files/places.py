"""Where a command writes: refused before any work where nothing can lie."""

from pathlib import Path

from ..errors import UsageError, option


def check_place(path: Path, *, name: str = "out") -> None:
    """Refuses a place that lies in a file.

    Args:
        path: Of a file or a folder to be written; it, and folders above it, need not exist.
        name: The option's.

    Raises:
        UsageError: If something above it is no folder.
    """
    above = next((folder for folder in path.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise UsageError(
            f"{option(name)} {path}: {above} is a file, and nothing can be written into it; name "
            f"a place in a folder."
        )


def check_folder(path: Path, *, name: str = "out") -> None:
    """The same of a folder to write into, which may exist.

    Raises:
        UsageError: If it, or something above it, is no folder.
    """
    check_place(path / "one of its files", name=name)
