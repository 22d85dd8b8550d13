"""Which members of a tar belong together: a picture and its caption, by their names.

WebDataset's keys end at the first dot. But names of pictures hold dots too, so a key ends here
where the last known ending begins; what then lacks a picture or a caption is joined with what it
would belong to under WebDataset's rule.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from imagen_scale.data.sources.caption_files import TEXT_ENDINGS
from imagen_scale.data.sources.formats import PICTURES, ending_of, readable_endings
from imagen_scale.data.sources.tar_index import Member


class Sample:
    """The members of one key.

    Attributes:
        key: Their name without ending.
        pictures: Those of an ending that is read; the first counts.
        texts: `KEY.txt`.
        facts: `KEY.json`.
        others: Everything else of the key.
        near_pictures: Pictures of longer names, such as `KEY.left.jpg`.
        near_texts: Captions of other or longer endings, such as `KEY.caption` or `KEY.jpg.txt`.
    """

    def __init__(self, key: str) -> None:
        """A key without members."""
        self.key = key
        self.pictures: list[Member] = []
        self.texts: list[Member] = []
        self.facts: list[Member] = []
        self.others: list[Member] = []
        self.near_pictures: list[Member] = []
        self.near_texts: list[Member] = []

    @property
    def has_caption(self) -> bool:
        """Whether any member may hold one."""
        return bool(self.texts or self.facts or self.near_texts)

    @property
    def is_whole(self) -> bool:
        """Whether both halves are there."""
        return bool(self.pictures) and self.has_caption

    def add(self, member: Member, ending: str) -> None:
        """Takes a member of the key."""
        if ending in readable_endings():
            self.pictures.append(member)
        elif ending == ".txt":
            self.texts.append(member)
        elif ending == ".json":
            self.facts.append(member)
        elif ending in TEXT_ENDINGS:
            self.near_texts.append(member)
        else:
            self.others.append(member)

    def join(self, other: "Sample") -> None:
        """Takes the members of a longer key."""
        self.near_pictures += other.pictures
        self.near_texts += (*other.texts, *other.facts, *other.near_texts)
        self.others += other.others


def samples(members: Iterable[Member]) -> list[Sample]:
    """Groups members in the order of their keys' first ones; hidden files are left out."""
    found: dict[str, Sample] = {}
    for member in members:
        path = PurePosixPath(member.name)
        if path.name.startswith("."):  # as macOS adds
            continue
        ending = ending_of(path.name)
        is_known = ending in (*PICTURES, *TEXT_ENDINGS, ".json")
        # Of an unknown ending WebDataset's rule is all there is.
        name = path.name[: -len(ending)] if is_known else path.name.partition(".")[0]
        key = str(path.with_name(name or path.name))
        found.setdefault(key, Sample(key)).add(member, ending)
    _join_halves(found)
    return list(found.values())


def _join_halves(found: dict[str, Sample]) -> None:
    """Joins samples of which a half is missing with what their names begin with."""
    halves: defaultdict[str, list[str]] = defaultdict(list)
    for key, sample in found.items():
        if not sample.is_whole and (target := _target(key, found)):
            halves[target].append(key)
    for target, keys in halves.items():
        if target in found or len(keys) > 1:
            first = found.setdefault(target, Sample(target))
            for key in keys:
                first.join(found.pop(key))


def _target(key: str, found: dict[str, Sample]) -> str | None:
    """The longest part of a dotted name that is a key, else the part before its first dot."""
    folder, slash, name = key.rpartition("/")
    shorter = name
    while "." in shorter:
        shorter = shorter.rpartition(".")[0]
        if (target := f"{folder}{slash}{shorter}") in found:
            return target
    return f"{folder}{slash}{name.partition('.')[0]}" if "." in name[1:] else None
