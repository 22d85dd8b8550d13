"""Pictures in a folder, with a list of captions or a caption file beside each picture."""

import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.captions import clean_caption
from imagen_scale.data.sources.file_source import PIXELS, FileSource
from imagen_scale.data.sources.folder_files import FolderFiles, what_lies_there
from imagen_scale.data.sources.formats import EXTENSIONS
from imagen_scale.data.sources.lists import FILE_NAME, json_caption, read_listing, read_text
from imagen_scale.data.sources.near_names import Names, places
from imagen_scale.data.sources.skipped import (
    Skipped,
    counted,
    how_often,
    named,
    noted,
    printable,
)
from imagen_scale.data.storage import fingerprint, first_line
from imagen_scale.errors import DataError
from imagen_scale.files.caches import expanded

MAX_SIDECAR_BYTES = 2**20  # more is no caption


class FolderSource(FileSource):
    """Pictures in a folder and its subfolders, in the order of the list or of their names.

    Captions stand in `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder convention: a
    `file_name` column, relative to that file), else in a `.txt` beside each picture. What is
    written a little differently is taken where it can mean one thing only, and noted. Nothing
    outside the folder is ever opened, unless `data.follow_symlinks` says that links may lead out.
    """

    attribution: str | None = None

    def __init__(self, config: DataConfig) -> None:
        """Reads the captions and looks at every file's size and time, not at its contents."""
        folder = expanded(config.path or "")
        if not config.path or not folder.is_dir():
            raise DataError(
                f"data.path: {config.path!r} is not a folder; give the folder of pictures. "
                f"`imagen-scale init FOLDER` writes a configuration for yours; without any, "
                f"`imagen-scale init` takes the embedded emoji."
            )
        # Links on the way to the folder are the user's own; those below it are the data's.
        self._folder = folder.resolve()
        self._config = config
        self.captions: list[str] = []
        self.keys: list[str] = []
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self._stats: list[tuple[int, ...]] = []
        self._listed: set[str] = set()
        self._read: set[Path] = set()  # caption files
        self._meant: Counter[str] = Counter()  # how many files were not called as they should be

        files = FolderFiles(self._folder, config.follow_symlinks)
        lists = files.lists
        # A list that is not called as it should be counts where no picture has a caption file.
        if not lists and not any(map(files.captions.beside, files.pictures)):
            lists = files.near_lists
            for file in lists:
                self.notes.append(f"{self._key(file)} is taken for the list of captions.")
        if lists:
            self._read_lists(lists, files)
            if not self._listed and not self.skipped:
                raise DataError(f"{lists[0]}: lists no pictures; write one row per picture.")
        elif files.pictures or files.unread:
            self._read_sidecars(files)
        else:
            raise DataError(
                f"{folder}: no pictures found; put files ending in {', '.join(EXTENSIONS)} there"
                f"{what_lies_there(files)}."
            )
        self.notes += how_often(self._meant)
        if config.max_items is None:
            self._tell_unused(files, lists)
        self.fingerprint = fingerprint("folder", PIXELS, self.keys, self._stats)

    def _file(self, i: int) -> Path:
        return self._folder / self.keys[i]

    def _name(self, i: int) -> str:
        return printable(self.keys[i])

    def _key(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def _read_lists(self, lists: list[Path], files: FolderFiles) -> None:
        column, left = self._config.caption_column, self._config.max_items
        names = Names(map(self._key, (*files.in_order, *files.loose)))
        row: dict[str, Any] = {}
        has_captions = False
        for file in lists:
            if others := [one for one in lists if one.parent == file.parent and one != file]:
                both = " and ".join(sorted((one.name for one in (file, *others)), reverse=True))
                raise DataError(f"{file.parent}: holds both {both}; keep one.")
            with named(str(file)):
                self._check_file(file)
            listing = read_listing(file, column)
            rows = listing.rows[:left]
            left = None if left is None else left - len(rows)
            self.notes += (f"{self._key(file)}: {how}." for how in listing.meant)
            found = places(
                [row.get(FILE_NAME) for _, row in rows], file.parent, self._folder, names
            )
            for (line, row), place in zip(rows, found, strict=True):
                has_captions = has_captions or column in row
                where = f"{self._key(file)}, {line}"
                if row.get(FILE_NAME):
                    where += f": {row[FILE_NAME]}"
                with noted(where, self.skipped):
                    if isinstance(place, DataError):
                        raise place
                    self._take(place[0], row.get(column))
                    if place[1]:
                        self._meant[f"names in {self._key(file)} differ from the files' by "
                                    f"{place[1]}"] += 1  # fmt: skip
        if not has_captions and self.skipped:
            raise DataError(
                f"{lists[0]}: no row has the column {column!r} (columns of the "
                f"last: {', '.join(map(str, row))}); add it, or set data.caption_column."
            )

    def _read_sidecars(self, files: FolderFiles) -> None:
        for picture in files.in_order[: self._config.max_items]:
            with noted(self._key(picture), self.skipped):
                if reason := files.unread.get(picture):
                    raise DataError(reason)
                self._check_file(picture)
                sidecar = self._sidecar(picture, files)
                with named(f"its caption file {printable(sidecar.name)}"):
                    if self._check_file(sidecar).st_size > MAX_SIDECAR_BYTES:
                        raise DataError(f"holds more than {MAX_SIDECAR_BYTES:,} bytes; shorten it.")
                    self._read.add(sidecar)
                    caption = read_text(sidecar)
                    if sidecar.suffix.lower() == ".json":
                        caption = json_caption(caption, self._config.caption_column)
                self._take(picture, caption)

    def _sidecar(self, picture: Path, files: FolderFiles) -> Path:
        """The caption file of a picture."""
        if usual := files.captions.usual(picture):
            return usual
        found = files.captions.beside(picture)
        if len(found) > 1:
            raise DataError(
                f"has no {picture.stem}.txt, and {' and '.join(file.name for file in found)} lie "
                f"beside it; keep one of them."
            )
        if found:
            ending = found[0].name.removeprefix(picture.stem)
            self._meant[f"captions are taken from files that end in {ending}"] += 1
            return found[0]
        lists = (*files.near_lists, *files.other_lists, *files.strangers)
        near = [files.captions.elsewhere(picture), *lists]
        there = "".join(f" ({self._key(file)} lies there)" for file in near[:2] if file)
        raise DataError(
            f"has no caption; write it into {picture.with_suffix('.txt').name} beside it, or list "
            f"all pictures in metadata.jsonl{there}."
        )

    def _tell_unused(self, files: FolderFiles, lists: list[Path]) -> None:
        """Notes every file that looks as if it should have been used."""

        def note(found: Iterable[Path], singular: str, plural: str) -> None:
            if names := [self._key(file) for file in found]:
                self.notes.append(counted(names, singular, plural) + ".")

        if lists:
            unlisted = [
                file
                for file in (*files.in_order, *files.loose)
                if self._key(file) not in self._listed
            ]
            note(unlisted, "picture is not used because no metadata file lists it",
                 "pictures are not used because no metadata file lists them")  # fmt: skip
        else:
            note(files.loose, "other picture is not used", "other pictures are not used")
        told = {*self._read, *lists, *files.near_lists, *files.other_lists}
        note(
            (file for file in files.captions.files if file not in told),
            "caption file is not used",
            "caption files are not used",
        )
        told_of = (*files.near_lists, *files.other_lists, *files.foreign_lists)
        unread = [file for file in told_of if file not in lists]
        note(unread, "list is not read", "lists are not read")
        note(files.archives, "packed file is not looked into", "packed files are not looked into")

    def _take(self, picture: Path, caption: Any) -> None:
        key = self._key(picture)
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
        if is_linked and not self._config.follow_symlinks:
            raise DataError(
                "is reached through a symbolic link, which may lead outside the folder; put the "
                "file itself there, or set data.follow_symlinks to true."
            )
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise DataError(f"is {kind}; put a picture there or remove it.")
        return status
