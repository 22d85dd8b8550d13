"""Pictures and captions in tar shards: the convention of WebDataset and img2dataset."""

import io
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from imagen_scale.config import DataConfig
from imagen_scale.config.strict_json import refuse_duplicates
from imagen_scale.data.sources.captions import clean_caption
from imagen_scale.data.sources.file_source import FileSource
from imagen_scale.data.sources.images import (
    EXTENSIONS,
    MAX_FILE_BYTES,
)
from imagen_scale.data.sources.skipped import Skipped, noted, printable
from imagen_scale.data.sources.tar_index import Member, members, read_member
from imagen_scale.data.storage import fingerprint, first_line
from imagen_scale.errors import DataError, EnvironmentProblem

MAX_CAPTION_BYTES = 2**20  # of a .txt or .json; more is no caption


class _Place(NamedTuple):
    """Where a picture's bytes lie."""

    tar: int
    offset: int
    num_bytes: int


class WebDatasetSource(FileSource):
    """Pictures in `.tar` files, in the order of the files' names and then of their members.

    Members with the same name up to the first dot of its last part belong together: a picture,
    and its caption in `.txt` or else under `data.caption_column` in `.json`. Other members are
    not looked at. Nothing is extracted: the headers are read once, and a picture is read where it
    lies when it is asked for, in any order, so that every process reads its own share only.
    """

    attribution: str | None = None

    def __init__(self, config: DataConfig) -> None:
        """Reads the headers and captions of all shards, not the pictures."""
        self._tars = _tars(config)
        self._caption_column = config.caption_column
        self.captions: list[str] = []
        self.keys: list[str] = []
        self.skipped: list[Skipped] = []
        self._places: list[_Place] = []
        for number, tar in enumerate(self._tars):
            if config.max_items is not None and len(self.keys) >= config.max_items:
                break
            self._read_shard(number, tar)
        if config.max_items is not None:
            for items in (self.captions, self.keys, self._places):
                del items[config.max_items :]
        if not self.keys and not self.skipped:
            raise DataError(
                f"data.path: {config.path}: its {len(self._tars)} tar(s) hold no pictures; put "
                f"KEY.jpg and KEY.txt there for each."
            )
        _tell_downloads(self._tars)
        status = [tar.stat() for tar in self._tars]
        self.fingerprint = fingerprint(
            "webdataset",
            self.keys,
            [(one.st_size, one.st_mtime_ns, one.st_mode) for one in status],
        )

    def _name(self, i: int) -> str:
        return printable(self.keys[i])

    def _file(self, i: int) -> io.BytesIO:
        place = self._places[i]
        return io.BytesIO(self._read(self._tars[place.tar], place.offset, place.num_bytes))

    def _read(self, tar: Path, offset: int, num_bytes: int) -> bytes:
        try:
            return read_member(tar, offset, num_bytes)
        except OSError as error:
            raise EnvironmentProblem(
                f"{tar}: {first_line(error)}; look after the disk and run the command again."
            ) from error

    def _read_shard(self, number: int, tar: Path) -> None:
        samples: dict[str, dict[str, Member]] = {}
        for member in members(tar, self.skipped):
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")
            if not stem:  # hidden files, as macOS adds
                continue
            kind = _kind(ending.lower())
            if kind is None:
                continue
            key = str(path.with_name(stem))
            sample = samples.setdefault(key, {})
            if kind in sample:
                self.skipped.append(
                    Skipped(
                        printable(f"{tar.name}/{member.name}"),
                        f"{key} has a {kind} already; keep one.",
                    )
                )
            else:
                sample[kind] = member
        for key, sample in samples.items():
            with noted(f"{tar.name}/{key}", self.skipped):
                self._take(number, tar, key, sample)

    def _take(self, number: int, tar: Path, key: str, sample: dict[str, Member]) -> None:
        picture = sample.get("picture")
        if picture is None:
            raise DataError(self._why_no_picture(tar, sample))
        if picture.num_bytes > MAX_FILE_BYTES:
            raise DataError(
                f"too large: the file has {picture.num_bytes:,} bytes and at most "
                f"{MAX_FILE_BYTES:,} are read; scale the picture down."
            )
        self.captions.append(clean_caption(self._caption(tar, sample)))
        self.keys.append(f"{tar.name}/{key}")
        self._places.append(_Place(number, picture.offset, picture.num_bytes))

    def _caption(self, tar: Path, sample: dict[str, Member]) -> Any:
        if text := sample.get("text"):
            return self._text(tar, text)
        if "json" in sample:
            facts = self._facts(tar, sample["json"])
            if self._caption_column not in facts:
                raise DataError(
                    f"{sample['json'].name} has no {self._caption_column!r} (it has "
                    f"{printable(', '.join(map(str, facts)))}); set data.caption_column."
                )
            return facts[self._caption_column]
        raise DataError("has no caption; put KEY.txt or KEY.json beside it into the tar.")

    def _why_no_picture(self, tar: Path, sample: dict[str, Member]) -> str:
        """What img2dataset noted about a failed download, where it did."""
        reason = "has no picture; remove it or add one."
        if "json" in sample:
            facts = self._facts(tar, sample["json"])
            if facts.get("status") not in (None, "success"):
                why = f"{facts['status']}: {facts.get('error_message')}"
                reason = f"has no picture ({printable(why)}); remove it or download it again."
        return reason

    def _facts(self, tar: Path, member: Member) -> dict[str, Any]:
        try:
            facts = json.loads(self._text(tar, member), object_pairs_hook=refuse_duplicates)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{member.name} is not JSON: {error}; correct it.") from None
        if not isinstance(facts, dict):
            raise DataError(f"{member.name} holds a {type(facts).__name__}; write an object.")
        return facts

    def _text(self, tar: Path, member: Member) -> str:
        if member.num_bytes > MAX_CAPTION_BYTES:
            raise DataError(
                f"{member.name} holds more than {MAX_CAPTION_BYTES:,} bytes; shorten it."
            )
        try:
            return self._read(tar, member.offset, member.num_bytes).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{member.name} is not UTF-8 text; save it as UTF-8.") from None


def _kind(ending: str) -> str | None:
    if f".{ending}" in EXTENSIONS:
        return "picture"
    return {"txt": "text", "json": "json"}.get(ending)


def _tars(config: DataConfig) -> list[Path]:
    """The shards that `data.path` names: a tar, or a folder of them."""
    path = Path(config.path or "").expanduser()
    if path.is_dir():
        # Links on the way to the folder are the user's own; those in it are the data's.
        found = sorted(tar for tar in path.resolve().glob("*.tar") if not tar.name.startswith("."))
        for tar in found:
            if tar.is_symlink() and not config.follow_symlinks:
                raise DataError(
                    f"{tar}: is a symbolic link, which may lead outside the folder; put the file "
                    f"itself there, or set data.follow_symlinks to true."
                )
    else:
        found = [path.resolve()] if path.is_file() else []
    if not found:
        raise DataError(
            f"data.path: {config.path!r} is neither a .tar nor a folder with .tar files in it; "
            f"give the shards (compressed ones are not read: decompress them)."
        )
    return found


def _downloads(tars: list[Path]) -> Iterator[dict[str, Any]]:
    """What img2dataset counted beside each shard, where it did."""
    for tar in tars:
        try:
            counts = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_text(encoding="utf-8"))
            if all(isinstance(counts[name], int) for name in ("count", "successes")):
                yield counts
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _tell_downloads(tars: list[Path]) -> None:
    """Says how many addresses img2dataset could not download, and why most of them."""
    count = successes = 0
    reasons: Counter[str] = Counter()
    for counts in _downloads(tars):
        count += counts["count"]
        successes += counts["successes"]
        status = counts.get("status_dict")
        reasons.update(status if isinstance(status, dict) else {})
    del reasons["success"]
    if successes < count:
        why = f", most often because of {reasons.most_common(1)[0][0]!r}" if reasons else ""
        warnings.warn(
            f"img2dataset could not download {count - successes:,} of {count:,} addresses"
            f"{printable(why)}; they are not in the tars.",
            stacklevel=4,
        )
