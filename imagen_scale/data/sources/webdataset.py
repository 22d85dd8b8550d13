"""Pictures and captions in tar shards: the convention of WebDataset and img2dataset."""

import io
import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from imagen_scale.config import DataConfig
from imagen_scale.config.strict_json import refuse_duplicates
from imagen_scale.data.sources.captions import clean_caption
from imagen_scale.data.sources.file_source import PIXELS, FileSource
from imagen_scale.data.sources.formats import (
    HEAD_BYTES,
    PICTURES,
    ending_of,
    format_of,
    readable_formats,
    why_not_read,
)
from imagen_scale.data.sources.images import MAX_FILE_BYTES
from imagen_scale.data.sources.lists import matching
from imagen_scale.data.sources.shards import beside, shards, tell_downloads
from imagen_scale.data.sources.skipped import Skipped, counted, how_often, noted, printable
from imagen_scale.data.sources.tar_index import Member, members, read_member
from imagen_scale.data.sources.tar_samples import Sample, samples
from imagen_scale.data.storage import fingerprint, first_line
from imagen_scale.errors import DataError, EnvironmentProblem
from imagen_scale.files.caches import expanded

MAX_CAPTION_BYTES = 2**20  # of a .txt or .json; more is no caption


class _Place(NamedTuple):
    """Where a picture's bytes lie."""

    tar: int
    offset: int
    num_bytes: int


class WebDatasetSource(FileSource):
    """Pictures in `.tar` files, in the order of the files' names and then of their members.

    `tar_samples` says which members belong together: a picture, and its caption in `.txt` or else
    under `data.caption_column` in `.json`. Nothing is extracted: the headers are read once, and a
    picture is read where it lies when it is asked for, in any order, so that every process reads
    its own share only.
    """

    attribution: str | None = None

    def __init__(self, config: DataConfig) -> None:
        """Reads the headers and captions of all shards, not the pictures."""
        self._tars = shards(config)
        self._caption_column = config.caption_column
        self.captions: list[str] = []
        self.keys: list[str] = []
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self._places: list[_Place] = []
        self._loose: list[str] = []  # pictures that are passed over
        self._meant: Counter[str] = Counter()
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
        self.notes += how_often(self._meant)
        if self._loose:
            told = counted(self._loose, "other picture is not used", "other pictures are not used")
            self.notes.append(f"{told}.")
        self.notes += beside(expanded(config.path or ""))
        tell_downloads(self._tars)
        status = [tar.stat() for tar in self._tars]
        self.fingerprint = fingerprint(
            "webdataset",
            PIXELS,
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
        for sample in samples(members(tar, self.skipped)):
            for extra in sample.pictures[1:]:
                self.skipped.append(
                    Skipped(
                        printable(f"{tar.name}/{extra.name}"),
                        f"{sample.key} has a picture already; keep one.",
                    )
                )
            if not (sample.pictures or sample.near_pictures or sample.has_caption):
                for member in sample.others:
                    self._refuse_picture(tar, member)
                continue
            with noted(f"{tar.name}/{sample.key}", self.skipped):
                self._take(number, tar, sample)

    def _refuse_picture(self, tar: Path, member: Member) -> None:
        """Names a picture of a kind that is not read, or of no known ending and no caption."""
        head = self._head(tar, member)
        if ending_of(member.name) in PICTURES:
            reason = "has no caption; put KEY.txt or KEY.json beside it into the tar."
            if format_of(head) not in readable_formats():
                reason = why_not_read(member.name, head)
            self.skipped.append(Skipped(printable(f"{tar.name}/{member.name}"), reason))
        elif format_of(head):
            self._loose.append(f"{tar.name}/{member.name}")

    def _take(self, number: int, tar: Path, sample: Sample) -> None:
        picture = self._picture(tar, sample)
        if picture.num_bytes > MAX_FILE_BYTES:
            raise DataError(
                f"too large: the file has {picture.num_bytes:,} bytes and at most "
                f"{MAX_FILE_BYTES:,} are read; scale the picture down."
            )
        self.captions.append(clean_caption(self._caption(tar, sample)))
        self.keys.append(f"{tar.name}/{sample.key}")
        self._places.append(_Place(number, picture.offset, picture.num_bytes))
        unused = (*sample.near_pictures, *sample.others)
        self._loose += (
            f"{tar.name}/{one.name}"
            for one in unused
            if one != picture and (ending_of(one.name) in PICTURES)
        )

    def _picture(self, tar: Path, sample: Sample) -> Member:
        """The member that is the picture."""
        if sample.pictures:
            return sample.pictures[0]
        if len(sample.near_pictures) > 1:
            names = " and ".join(PurePosixPath(one.name).name for one in sample.near_pictures)
            raise DataError(
                f"has one caption for {printable(names)}; call one of them {sample.key}.jpg."
            )
        heads = {one: self._head(tar, one) for one in sample.others}
        found = sample.near_pictures or [
            one for one, head in heads.items() if format_of(head) in readable_formats()
        ]
        if len(found) == 1:
            ending = PurePosixPath(found[0].name).name.removeprefix(PurePosixPath(sample.key).name)
            self._meant[f"pictures are called KEY{ending}, and are taken for KEY's"] += 1
            return found[0]
        for one, head in heads.items():
            if format_of(head) or ending_of(one.name) in PICTURES:
                name = PurePosixPath(one.name).name
                raise DataError(f"its {printable(name)} {why_not_read(one.name, head)}")
        raise DataError(self._why_no_picture(tar, sample))

    def _caption(self, tar: Path, sample: Sample) -> Any:
        if sample.texts:
            return self._text(tar, sample.texts[0])
        near = sample.near_texts
        if sample.facts and not (
            near and matching(self._caption_column, self._facts(tar, sample.facts[0])) is None
        ):
            return self._fact(tar, sample.facts[0])
        if len(near) == 1:
            ending = PurePosixPath(near[0].name).name.removeprefix(PurePosixPath(sample.key).name)
            self._meant[f"captions are called KEY{ending}, and are taken for KEY's"] += 1
            is_json = near[0].name.lower().endswith(".json")
            return self._fact(tar, near[0]) if is_json else self._text(tar, near[0])
        if near:
            names = " and ".join(PurePosixPath(one.name).name for one in near)
            raise DataError(f"has the captions {printable(names)}; call one of them KEY.txt.")
        others = [printable(PurePosixPath(one.name).name) for one in sample.others[:2]]
        there = f" ({' and '.join(others)} lies there)" if others else ""
        raise DataError(f"has no caption; put KEY.txt or KEY.json beside it into the tar{there}.")

    def _fact(self, tar: Path, member: Member) -> Any:
        facts = self._facts(tar, member)
        name = matching(self._caption_column, facts)
        if name is None:
            raise DataError(
                f"{member.name} has no {self._caption_column!r} (it has "
                f"{printable(', '.join(map(str, facts)))}); set data.caption_column."
            )
        return facts[name]

    def _why_no_picture(self, tar: Path, sample: Sample) -> str:
        """What img2dataset noted about a failed download, where it did, or what lies there."""
        if sample.facts:
            facts = self._facts(tar, sample.facts[0])
            if facts.get("status") not in (None, "success"):
                why = f"{facts['status']}: {facts.get('error_message')}"
                return f"has no picture ({printable(why)}); remove it or download it again."
        others = ", ".join(PurePosixPath(one.name).name for one in sample.others)
        there = f" ({printable(others)} is none)" if others else ""
        return f"has no picture{there}; remove it or add one."

    def _head(self, tar: Path, member: Member) -> bytes:
        return self._read(tar, member.offset, min(member.num_bytes, HEAD_BYTES))

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
