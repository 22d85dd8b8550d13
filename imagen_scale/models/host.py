"""What the machine's memory holds, or a container's."""

from pathlib import Path
from typing import NamedTuple

CGROUP = Path("/sys/fs/cgroup")


class HostMemory(NamedTuple):
    """Host memory in bytes."""

    available: int
    total: int


def host_memory() -> HostMemory:
    """Host memory, or what a container may use of it."""
    import psutil

    host = psutil.virtual_memory()
    limit = _number(CGROUP / "memory.max")
    if limit is None:
        return HostMemory(host.available, host.total)
    used = (_number(CGROUP / "memory.current") or 0) - _file_cache()
    return HostMemory(min(host.available, limit - used), min(host.total, limit))


def _file_cache() -> int:
    """Bytes of files that the kernel keeps there and gives back when memory is asked for."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.partition(" ")[::2] for line in lines)
    return int(values.get("inactive_file", 0))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None
