"""Pictures in a folder, with a list of captions or a caption file beside each picture."""

import os
import stat
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.captions import clean_caption
from imagen_scale.data.sources.file_source import FileSource
from imagen_scale.data.sources.images import (
    EXTENSIONS,
)
from imagen_scale.data.sources.lists import Row, csv_rows, jsonl_rows, read_text
from imagen_scale.data.sources.skipped import Skipped, named, noted, printable
from imagen_scale.data.storage import fingerprint, first_line
from imagen_scale.errors import DataError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_SIDECAR_BYTES = 2**20  # more is no caption


class FolderSource(FileSource):
    """Pictures in a folder and its subfolders, in the order of the list or of their names.

    Captions stand in `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder convention: a
    `file_name` column, relative to that file), else in a `.txt` beside each picture. Nothing
    outside the folder is ever opened, unless `data.follow_symlinks` says that links may lead out.
    """

    attribution: str | None = None

    def __init__(self, config: DataConfig) -> None:
        """Reads the captions and looks at every file's size and time, not at its contents."""
        folder = Path(config.path or "").expanduser()
        if not config.path or not folder.is_dir():
            raise DataError(
                f"data.path: {config.path!r} is not a folder; give the folder of pictures."
            )
        # Links on the way to the folder are the user's own; those below it are the data's.
        self._folder = folder.resolve()
        self._follow_symlinks = config.follow_symlinks
        self.captions: list[str] = []
        self.keys: list[str] = []
        self.skipped: list[Skipped] = []
        self._stats: list[tuple[int, ...]] = []
        self._listed: set[str] = set()

        files = list(_files(self._folder, config.follow_symlinks))
        # A linked folder too, so that it is named rather than passed over.
        pictures = [f for f in files if f.suffix.lower() in EXTENSIONS or f.is_dir()]
        lists = [file for file in files if file.name in METADATA_NAMES]
        if lists:
            self._read_lists(lists, config)
            if not self._listed and not self.skipped:
                raise DataError(f"{lists[0]}: lists no pictures; write one row per picture.")
            if config.max_items is None:
                self._tell_unlisted(pictures)
        elif pictures:
            self._read_sidecars(pictures[: config.max_items])
        else:
            raise DataError(
                f"{folder}: no pictures found; put files ending in {', '.join(EXTENSIONS)} there."
            )
        self.fingerprint = fingerprint("folder", self.keys, self._stats)

    def _file(self, i: int) -> Path:
        return self._folder / self.keys[i]

    def _name(self, i: int) -> str:
        return printable(self.keys[i])

    def _read_lists(self, lists: list[Path], config: DataConfig) -> None:
        rows = (
            (file, *row) for file in lists for row in self._rows(file, lists, config.caption_column)
        )
        has_captions = False
        for file, line, row in islice(rows, config.max_items):
            has_captions = has_captions or config.caption_column in row
            where = f"{file.relative_to(self._folder)}, line {line}"
            if row.get("file_name"):
                where += f": {row['file_name']}"
            with noted(where, self.skipped):
                picture = _listed_file(file.parent, row.get("file_name"))
                self._take(picture, row.get(config.caption_column))
        if not has_captions and self.skipped:
            raise DataError(
                f"{lists[0]}: no row has the column {config.caption_column!r} (columns of the "
                f"last: {', '.join(map(str, row))}); add it, or set data.caption_column."
            )

    def _rows(self, file: Path, lists: list[Path], caption_column: str) -> Iterator[Row]:
        """Line number and content of each row of a metadata file."""
        if file.suffix == ".csv" and file.with_suffix(".jsonl") in lists:
            raise DataError(f"{file.parent}: holds both {' and '.join(METADATA_NAMES)}; keep one.")
        with named(str(file)):
            self._check_file(file)
            text = read_text(file)
        if file.suffix == ".csv":
            yield from csv_rows(file, text, ("file_name", caption_column))
        else:
            yield from jsonl_rows(file, text)

    def _tell_unlisted(self, pictures: list[Path]) -> None:
        names = [picture.relative_to(self._folder).as_posix() for picture in pictures]
        unlisted = [name for name in names if name not in self._listed]
        if unlisted:
            warnings.warn(
                f"{self._folder}: {len(unlisted)} pictures are not used because no metadata file "
                f"lists them, e.g. {printable(unlisted[0])}.",
                stacklevel=4,
            )

    def _read_sidecars(self, pictures: list[Path]) -> None:
        for picture in pictures:
            with noted(picture.relative_to(self._folder).as_posix(), self.skipped):
                self._check_file(picture)
                sidecar = picture.with_suffix(".txt")
                if not os.path.lexists(sidecar):
                    raise DataError(
                        f"has no caption; write it into {sidecar.name} beside it, or list all "
                        f"pictures in {METADATA_NAMES[0]}."
                    )
                with named(f"its caption file {printable(sidecar.name)}"):
                    if self._check_file(sidecar).st_size > MAX_SIDECAR_BYTES:
                        raise DataError(f"holds more than {MAX_SIDECAR_BYTES:,} bytes; shorten it.")
                    caption = read_text(sidecar)
                self._take(picture, caption)

    def _take(self, picture: Path, caption: Any) -> None:
        key = picture.relative_to(self._folder).as_posix()
        if key in self._listed:
            raise DataError("was listed before; keep one row per picture.")
        self._listed.add(key)
        status = self._check_file(picture)
        self.captions.append(clean_caption(caption))
        self.keys.append(key)
        # The mode too: a picture that could not be read may be made readable.
        self._stats.append((status.st_size, status.st_mtime_ns, status.st_mode))

    def _check_file(self, file: Path) -> os.stat_result:
        """Refuses what is not a regular file inside the folder."""
        try:
            status = file.stat()
            is_linked = os.path.realpath(file) != str(file)
        except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
            raise DataError(
                f"the file cannot be found: {first_line(error)}; add it or remove the row."
            ) from None
        if is_linked and not self._follow_symlinks:
            raise DataError(
                "is reached through a symbolic link, which may lead outside the folder; put the "
                "file itself there, or set data.follow_symlinks to true."
            )
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise DataError(f"is {kind}; put a picture there or remove it.")
        return status


def _files(folder: Path, follow_symlinks: bool) -> Iterator[Path]:
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


def _listed_file(base: Path, file_name: Any) -> Path:
    if not isinstance(file_name, str) or not file_name.strip():
        raise DataError(f"file_name is {file_name!r}; write the picture's file name.")
    if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
        raise DataError("file_name leads outside the folder; move the file into it.")
    return base / file_name
