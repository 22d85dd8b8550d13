"""Files that are there whole or not at all."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def clear_temporary(parent: Path, name: str = "*") -> None:
    """Removes what kills left of `write_atomically`, of files whose names match."""
    for leftover in parent.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Brings a file, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place and renames it, so that readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
