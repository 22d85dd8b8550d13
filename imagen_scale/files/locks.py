"""Locks between processes of one machine, and of several where the file system carries them."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lock `path`; other processes wait here until it is released.

    The operating system frees the lock of a process that dies, so no stale lock can remain.

    Args:
        path: The lock file; its folder is made, and it stays.
        say: Told that another process is waited for, and which, where that is to be known.

    Raises:
        OSError: If the folder cannot be created or written.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=say is None)
    except Timeout:
        assert say is not None
        holder = path.read_text(encoding="utf-8", errors="replace").strip()
        say(f"{path.parent}: waiting for {holder or 'another process'}, which works there")
        lock.acquire()
    try:
        if say is not None:
            path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()
