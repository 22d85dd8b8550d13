"""The files of a folder, found without following links and without ever waiting."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from imagen_scale.data.sources.formats import HEAD_BYTES
from imagen_scale.errors import DataError


def files_below(folder: Path, follow_symlinks: bool) -> Iterator[Path]:
    """Visible files below `folder` by name; linked folders count as files when not followed."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}; correct that.")

    seen = set()
    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=follow_symlinks):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        if not follow_symlinks:
            names += [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        # `.cache`, `._copy.jpg` and the like are not looked at.
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    yield from sorted(found)


def head_of(file: Path, follow_symlinks: bool) -> bytes:
    """The first bytes of a regular file; none of anything else."""
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow_symlinks else os.O_NOFOLLOW)
    try:
        descriptor = os.open(file, flags)
    except (OSError, ValueError):
        return b""
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.read(descriptor, HEAD_BYTES) if is_file else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)
