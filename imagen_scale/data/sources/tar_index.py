"""The members of a tar, found without extracting any: where each file's bytes lie."""

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from imagen_scale.data.sources.skipped import Skipped, printable
from imagen_scale.data.storage import first_line
from imagen_scale.errors import DataError

MAX_HEADER_BYTES = 2**20  # a header may announce any length, and tarfile reads it whole
BLOCK = 512  # bytes; a tar is made of these
PACKED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")  # how gzip, bzip2, xz and zstd files begin


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int  # of its first byte in the tar
    num_bytes: int


def members(tar: Path, skipped: list[Skipped]) -> Iterator[Member]:
    """Gives the regular files of a tar in their order; headers are read, contents are not.

    Links, devices, sparse files and names that lead outside are noted, never followed. Nothing is
    ever written to the disk.

    Args:
        tar: An uncompressed tar.
        skipped: Takes what is refused.

    Raises:
        DataError: If it is no tar, is compressed, is cut short, or is damaged.
    """
    try:
        with _opened(tar) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
            end = -1  # of the member before
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if archive.offset <= end or info.size < 0:
                    raise DataError("has a member of negative size")
                end = archive.offset
                if info.isdir():
                    continue
                if reason := _refusal(info):
                    skipped.append(Skipped(printable(f"{tar.name}/{info.name}"), reason))
                else:
                    yield Member(info.name, info.offset_data, info.size)
            # tarfile takes a damaged header for the end.
            file.seek(archive.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                raise DataError("is damaged or cut short")
    except DataError as error:
        raise DataError(f"{tar}: {error}; download or write it again.") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if _magic(tar) in PACKED:
            raise DataError(f"{tar}: is compressed; decompress it.") from None
        raise DataError(
            f"{tar}: is no tar, or a damaged one: {first_line(error)}; download or write it again."
        ) from None
    except OSError as error:
        raise DataError(f"{tar}: cannot be read: {first_line(error)}; correct that.") from None


def read_member(tar: Path, offset: int, num_bytes: int) -> bytes:
    """The bytes of a member.

    Raises:
        DataError: If the tar has become shorter.
        OSError: If the disk refuses.
    """
    with _opened(tar) as file:
        content = os.pread(file.fileno(), num_bytes, offset)
    if len(content) != num_bytes:
        raise DataError("the tar was changed since it was looked at; run the command again.")
    return content


class _Headers(io.RawIOBase):
    """A file of which nothing longer than a header may be read at once."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise DataError(f"has a header of {size:,} bytes")
        content: bytes = self._file.read(size)
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position


def _opened(tar: Path) -> Any:
    """A regular file; never waits, as opening a named pipe would."""
    file = open(tar, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError("is no regular file")
    return file


def _refusal(info: tarfile.TarInfo) -> str | None:
    if info.islnk() or info.issym():
        return "is a link, which may lead anywhere; put the file itself into the tar."
    if not info.isreg() or info.issparse():
        return "is no regular file; remove it."
    parts = PurePosixPath(info.name).parts
    if info.name.startswith("/") or ".." in parts:
        return "its name leads outside; rename it."
    return None


def _magic(tar: Path) -> bytes:
    try:
        with _opened(tar) as file:
            start: bytes = file.read(2)
    except (OSError, DataError):
        return b""
    return start
