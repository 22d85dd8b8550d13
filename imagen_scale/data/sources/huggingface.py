"""Pictures and captions of a Hugging Face data set, from the hub or from disk."""

import io
import os
from pathlib import Path
from typing import Any

from imagen_scale.config import DataConfig
from imagen_scale.data.network import network_reason
from imagen_scale.data.sources.captions import clean_caption
from imagen_scale.data.sources.file_source import PIXELS, FileSource
from imagen_scale.data.sources.lists import csv_rows, matching, read_text
from imagen_scale.data.sources.skipped import Skipped, named, noted, printable
from imagen_scale.data.storage import fingerprint, first_line
from imagen_scale.errors import DataError, MissingExtraError
from imagen_scale.files.caches import expanded


class HuggingFaceSource(FileSource):
    """A data set from the Hugging Face hub or from a local folder, in the order of its rows."""

    attribution: str | None = None

    def __init__(self, config: DataConfig) -> None:
        """Loads (downloads on first use) the data set; pictures are decoded when asked for."""
        rows = _load_rows(config)
        from datasets import Image

        self.notes: list[str] = []
        column = self._matching(config, "image_column", rows.column_names)
        captions = self._matching(config, "caption_column", rows.column_names)
        feature = rows.features[column]
        if not isinstance(feature, Image):
            if not _holds_bytes(feature):
                raise DataError(_no_pictures(config, column, rows))
            rows = rows.cast_column(column, Image(decode=False))
            self.notes.append(f"the bytes in the column {column!r} are taken for pictures.")
        if config.max_items is not None:
            rows = rows.select(range(min(config.max_items, len(rows))))
        if not len(rows):
            raise DataError(f"data.path: {config.path} has no rows; choose another data.split.")
        self._where = f"{config.path} ({config.split})"
        self.captions: list[str] = []
        self.keys: list[str] = []
        self.skipped: list[Skipped] = []
        names = getattr(rows.features[captions], "names", None)  # of labels
        if names:
            self.notes.append(f"the names of the labels in {captions!r} are taken for captions.")
        for i, caption in enumerate(rows[captions]):
            with noted(str(i), self.skipped):
                if names and isinstance(caption, int):
                    caption = names[caption] if 0 <= caption < len(names) else None
                self.captions.append(clean_caption(caption))
                self.keys.append(str(i))
        # `datasets` keeps it private, yet it is what its own cache of prepared rows is keyed by.
        self.fingerprint = fingerprint(
            "huggingface",
            PIXELS,
            rows._fingerprint,
            column,
            config.follow_symlinks,
            [skipped.picture for skipped in self.skipped],
        )
        # Undecoded, so that pictures go through `load_picture` like all others.
        self._rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
        self._column = column
        self._follow_symlinks = config.follow_symlinks
        self._roots = _roots(config)

    def _matching(self, config: DataConfig, key: str, columns: list[str]) -> str:
        """The column that the configuration names, or the only one that is nearly called so."""
        wanted = getattr(config, key)
        name = matching(wanted, columns)
        if name is None:
            raise DataError(
                f"data.{key}: {config.path} has no column {wanted!r}; its columns are "
                f"{', '.join(columns)}."
            )
        if name != wanted:
            self.notes.append(f"its column {name!r} is taken for {wanted!r}.")
        return name

    def _name(self, i: int) -> str:
        return f"{self._where}, row {self.keys[i]}"

    def _file(self, i: int) -> Path | io.BytesIO:
        cell = self._rows[int(self.keys[i])][self._column]
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise DataError("has no picture; remove the row.")
        if cell["bytes"] is not None:
            return io.BytesIO(cell["bytes"])
        file = Path(cell["path"])
        # A data set may name any file of this machine.
        real = Path(os.path.realpath(file))
        inside = file if self._follow_symlinks else real
        if ".." in file.parts or not any(inside.is_relative_to(root) for root in self._roots):
            raise DataError(
                f"its file {printable(str(file))} lies outside the data set; put the pictures "
                f"themselves into it."
            )
        return real


def _holds_bytes(feature: Any) -> bool:
    """Whether a column holds encoded pictures: plain bytes, or {bytes, path} as img2dataset has."""
    fields = dict(feature) if isinstance(feature, dict) else {}
    kind = getattr(fields.get("bytes", feature), "dtype", None)
    return kind in ("binary", "large_binary") and set(fields) <= {"bytes", "path"}


def _no_pictures(config: DataConfig, column: str, rows: Any) -> str:
    """Why a column cannot be the pictures, and which could be."""
    from datasets import Image

    feature = rows.features[column]
    kind = getattr(feature, "dtype", None) or type(feature).__name__
    first = rows[0][column] if len(rows) else None
    there = f", such as {printable(first)!r}" if isinstance(first, str) else ""
    others = [
        name for name, one in rows.features.items() if isinstance(one, Image) or _holds_bytes(one)
    ]
    hint = f"name one of {', '.join(others)}" if others else "none of its columns holds any"
    return (
        f"data.image_column: the column {column!r} of {config.path} holds {kind}, not pictures"
        f"{there}; {hint} (type Image, bytes, or {{bytes, path}})."
    )


def _is_oddly_ended(file: Path) -> bool:
    """Whether `datasets` does not know a Parquet file by its name."""
    return file.suffix.lower() == ".parquet" != file.suffix


def _roots(config: DataConfig) -> list[Path]:
    """Where the files of a data set may lie: in its folder, or in the caches of `datasets`."""
    import datasets
    from huggingface_hub import constants

    folder = expanded(config.path or "")
    roots = [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    if folder.is_dir():
        roots.append(folder)
    return [Path(form(root)) for root in roots for form in (os.path.abspath, os.path.realpath)]


def _file_rows(datasets: Any, file: Path) -> Any:
    """The rows of a single file."""
    kind = {".parquet": "parquet", ".arrow": "arrow"}.get(file.suffix.lower())
    if kind is None:
        source = {".tar": "webdataset"}.get(file.suffix.lower(), "folder")
        raise DataError(
            f"data.path: {file} is a {file.suffix or 'file'}; give a .parquet, a folder written by "
            f'save_to_disk, or a name on the hub (data.source "{source}" may be what is meant).'
        )
    try:
        return datasets.load_dataset(kind, data_files=str(file), split="train")
    except Exception as error:  # of many types
        raise DataError(
            f"data.path: {file} cannot be read: {first_line(error)}; write it again."
        ) from error


def _check_tables(folder: Path, caption_column: str) -> None:
    """Refuses a folder of pictures whose table does not fit its header.

    `datasets` reads tables with pandas, which takes the first cells of a row that is too long for
    an index: captions would be cut at a comma without a word.
    """
    for table in sorted(folder.rglob("metadata.csv")) if folder.is_dir() else ():
        with named(str(table)):
            text = read_text(table)
        for _ in csv_rows(table, text, ("file_name", caption_column)):
            pass


def _load_rows(config: DataConfig) -> Any:
    """The `datasets.Dataset` that the configuration names."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            "data.source: 'huggingface' needs the package datasets; run pip install datasets."
        ) from None

    path = config.path or ""
    folder = expanded(path)
    if folder.is_file():
        return _file_rows(datasets, folder)
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(folder)
            if config.split not in splits:
                raise DataError(
                    f"data.split: {folder} has no split {config.split!r}; it has "
                    f"{', '.join(splits)}."
                )
            return splits[config.split]
        if (folder / "state.json").is_file():  # one split, saved on its own
            return datasets.load_from_disk(folder)
        _check_tables(folder, config.caption_column)
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, split=config.split)
    except DataError:
        raise
    except Exception as error:  # hub, network, file system and parsers each raise their own types
        reason = first_line(error) if folder.exists() else network_reason(error)
        if odd := [file.name for file in sorted(folder.glob("**/*")) if _is_oddly_ended(file)]:
            reason += f" ({odd[0]} lies there: call it {odd[0][:-8]}.parquet)"
        raise DataError(
            f"data.path: the data set {path!r} (split {config.split!r}) cannot be loaded: "
            f"{reason}; check name, split and network (set HF_TOKEN if it is private), "
            f"or give a local folder written by save_to_disk."
        ) from error
