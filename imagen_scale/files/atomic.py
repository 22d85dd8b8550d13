"""Files that are there whole or not at all."""

import hashlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

# Nobody writes for so long without a change of the file's time.
ABANDONED_S = 3600.0


def temporary_path(path: Path) -> Path:
    """Where a file is written before it is renamed, named after this host and process.

    The folder may lie on a file system that other machines write to and whose locks reach only one
    of them.
    """
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


def clear_temporary(parent: Path, name: str = "*") -> None:
    """Removes what kills left of `write_atomically`, of files whose names match.

    What a living process of this machine writes stays. Of another machine's processes nothing is
    known: what they wrote stays until it is old.
    """
    for leftover in parent.glob(f".{name}.*.tmp"):
        host, _, pid = leftover.name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
        is_ours = host == _host() and pid.isdecimal()
        try:
            if _is_alive(int(pid)) if is_ours else _is_young(leftover):
                continue
        except FileNotFoundError:  # renamed meanwhile
            continue
        leftover.unlink(missing_ok=True)


def _host() -> str:
    return platform.node().replace(".", "_").replace("/", "_")


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; this one writes nothing while it clears."""
    return pid != os.getpid() and Path(f"/proc/{pid}").exists()


def _is_young(path: Path) -> bool:
    return time.time() - path.stat().st_mtime < ABANDONED_S


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
    """Writes a file beside its place and renames it, so that readers never see half of it.

    Raises:
        OSError: Naming the file, which a full disk's own error does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:  # else it names itself, and a name would hide that
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
