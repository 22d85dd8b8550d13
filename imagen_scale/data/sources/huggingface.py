"""Pictures and captions of a Hugging Face data set, from the hub or from disk."""

import io
import os
from pathlib import Path
from typing import Any

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.captions import clean_caption
from imagen_scale.data.sources.file_source import FileSource
from imagen_scale.data.sources.lists import csv_rows, read_text
from imagen_scale.data.sources.skipped import Skipped, named, noted, printable
from imagen_scale.data.storage import fingerprint, first_line
from imagen_scale.errors import DataError, MissingExtraError


class HuggingFaceSource(FileSource):
    """A data set from the Hugging Face hub or from a local folder, in the order of its rows."""

    attribution: str | None = None

    def __init__(self, config: DataConfig) -> None:
        """Loads (downloads on first use) the data set; pictures are decoded when asked for."""
        rows = _load_rows(config)
        for key in ("image_column", "caption_column"):
            column = getattr(config, key)
            if column not in rows.column_names:
                raise DataError(
                    f"data.{key}: {config.path} has no column {column!r}; its columns are "
                    f"{', '.join(rows.column_names)}."
                )
        from datasets import Image

        feature = rows.features[config.image_column]
        if not isinstance(feature, Image):
            raise DataError(
                f"data.image_column: the column {config.image_column!r} of {config.path} holds "
                f"{type(feature).__name__}, not pictures; name the column of type Image."
            )
        if config.max_items is not None:
            rows = rows.select(range(min(config.max_items, len(rows))))
        if not len(rows):
            raise DataError(f"data.path: {config.path} has no rows; choose another data.split.")
        self._where = f"{config.path} ({config.split})"
        self.captions: list[str] = []
        self.keys: list[str] = []
        self.skipped: list[Skipped] = []
        for i, caption in enumerate(rows[config.caption_column]):
            with noted(str(i), self.skipped):
                self.captions.append(clean_caption(caption))
                self.keys.append(str(i))
        # `datasets` keeps it private, yet it is what its own cache of prepared rows is keyed by.
        self.fingerprint = fingerprint(
            "huggingface",
            rows._fingerprint,
            config.image_column,
            config.follow_symlinks,
            [skipped.picture for skipped in self.skipped],
        )
        # Undecoded, so that pictures go through `load_picture` like all others.
        rows = rows.select_columns([config.image_column])
        self._rows = rows.cast_column(config.image_column, Image(decode=False))
        self._column = config.image_column
        self._follow_symlinks = config.follow_symlinks
        self._roots = _roots(config)

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


def _roots(config: DataConfig) -> list[Path]:
    """Where the files of a data set may lie: in its folder, or in the caches of `datasets`."""
    import datasets
    from huggingface_hub import constants

    folder = Path(config.path or "").expanduser()
    roots = [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    if folder.is_dir():
        roots.append(folder)
    return [Path(form(root)) for root in roots for form in (os.path.abspath, os.path.realpath)]


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
    folder = Path(path).expanduser()
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
        raise DataError(
            f"data.path: the data set {path!r} (split {config.split!r}) cannot be loaded: "
            f"{first_line(error)}; check name, split and network (set HF_TOKEN if it is private), "
            f"or give a local folder written by save_to_disk."
        ) from error
