"""What lies in a folder of pictures: each file is used, or counted and named."""

from collections import Counter
from pathlib import Path

from imagen_scale.data.sources.caption_files import CaptionFiles
from imagen_scale.data.sources.formats import (
    PICTURES,
    ending_of,
    format_of,
    readable_endings,
    readable_formats,
    why_not_read,
)
from imagen_scale.data.sources.lists import list_kind
from imagen_scale.data.sources.walk import files_below, head_of

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
ARCHIVES = (".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
TABLES = (".parquet", ".arrow")
# Lists of other programs.
FOREIGN_LISTS = (".xlsx", ".xls", ".ods", ".xml", ".yaml", ".yml", ".token", ".lst", ".toml")


class FolderFiles:
    """The files below a folder, told apart by name, and where that says nothing by content.

    Attributes:
        pictures: What may be used: known endings, and pictures of any name that have a caption.
        unread: What looks like a picture or has a caption of its own but is not read, with the
            reason.
        lists: Lists of captions that are called as they should be.
        near_lists: Lists that are nearly called so.
        other_lists: Files of a list's kind that are called otherwise.
        foreign_lists: Lists of other programs, which are not read.
        strangers: Those, and caption files without a picture's name, in any folder.
        captions: Caption files.
        archives: Packed files and tables, which may hold pictures.
        loose: Pictures that are passed over: of no known ending and without caption, or of a kind
            that is not read and beside a picture that is.
    """

    def __init__(self, folder: Path, follow_symlinks: bool) -> None:
        """Lists the folder; contents are looked at where a name tells nothing."""
        files = list(files_below(folder, follow_symlinks))
        self.captions = CaptionFiles(files)
        self.lists = [file for file in files if file.name in METADATA_NAMES]
        self.near_lists = [
            file
            for file in files
            if file.name not in METADATA_NAMES
            and file.name.lower().startswith("metadata.")
            and list_kind(file.name)
        ]
        self.other_lists = [
            file
            for file in files
            if list_kind(file.name) not in ("", "parquet")
            and file not in (*self.lists, *self.near_lists)
        ]
        self.foreign_lists = [file for file in files if ending_of(file.name) in FOREIGN_LISTS]
        self.archives = [
            file
            for file in files
            if file.suffix.lower() in (*ARCHIVES, *TABLES) and file not in self.near_lists
        ]
        # A linked folder too, so that it is named rather than passed over.
        self.pictures = [f for f in files if ending_of(f.name) in readable_endings() or f.is_dir()]
        self.unread: dict[Path, str] = {}
        self.loose: list[Path] = []
        known = {*self.pictures, *self.lists, *self.near_lists, *self.other_lists, *self.archives}
        stems = {file.with_suffix("") for file in self.pictures}
        for file in files:
            if file not in known and file not in self.captions:
                self._sort(file, head_of(file, follow_symlinks), stems)
        self.pictures.sort()
        self.in_order = sorted((*self.pictures, *self.unread))
        beside = {text for file in self.in_order for text in self.captions.beside(file)}
        self.other_lists = [file for file in self.other_lists if file not in beside]
        stems = {file.with_suffix("") for file in self.in_order}  # whose facts they hold
        self.foreign_lists = [f for f in self.foreign_lists if f.with_suffix("") not in stems]
        told = {*self.near_lists, *self.other_lists}
        names = {file.stem.casefold() for file in self.in_order}
        texts = [f for f in self.captions.files if f.stem.casefold() not in names and f not in told]
        self.strangers = [*self.foreign_lists, *texts]

    def _sort(self, file: Path, head: bytes, stems: set[Path]) -> None:
        """Where a file belongs whose ending is none of a picture that is read."""
        is_picture = format_of(head) is not None or ending_of(file.name) in PICTURES
        has_twin = file.with_suffix("") in stems  # drawn in one program, saved for another
        caption = next(iter(self.captions.beside(file)), None)
        is_named_so = ending_of(file.name) in PICTURES
        if format_of(head) in readable_formats() and not has_twin and (is_named_so or caption):
            self.pictures.append(file)
        elif is_picture and not has_twin and (is_named_so or caption):
            self.unread[file] = why_not_read(file.name, head)
        elif is_picture:
            self.loose.append(file)
        elif caption and not has_twin:
            self.unread[file] = f"has the caption {caption.name}, and is no picture."


def what_lies_there(files: FolderFiles) -> str:
    """What a folder without pictures holds instead, and what reads it."""
    endings = Counter(file.suffix.lower() for file in files.archives)
    found = ", ".join(f"{count:,} {ending}" for ending, count in endings.items())
    if set(endings) & {".tar"}:
        return f' ({found} lie there: data.source "webdataset" reads .tar)'
    if set(endings) & set(TABLES):
        return f' ({found} lie there: data.source "huggingface" reads them)'
    return f" ({found} lie there: unpack them)" if found else ""
