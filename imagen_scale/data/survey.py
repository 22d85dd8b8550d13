"""What a data set is like: counts, sizes, shapes, captions, duplicates."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from imagen_scale.config import Config
from imagen_scale.data.prepared import Prepared
from imagen_scale.data.sources.opening import Source
from imagen_scale.data.sources.skipped import Skipped, printable
from imagen_scale.data.split import groups as split_groups
from imagen_scale.data.split import split
from imagen_scale.data.storage import Progress, exclusive, written_whole
from imagen_scale.files.kept import read_kept

# Width / height below which a picture belongs to the shape; the last takes the rest.
SHAPES = (
    ("taller than 1:2", 0.5),
    ("portrait", 0.9),
    ("square", 1.12),
    ("landscape", 2.0),
    ("wider than 2:1", float("inf")),
)
MUCH = 0.1  # of a picture's area
Range = tuple[float, float, float]  # smallest, median, largest


class Survey(NamedTuple):
    """What `imagen-scale prepare` found; all counts are of usable pictures, but for `skipped`."""

    pictures: int
    trained_on: int
    held_out: int
    skipped: list[Skipped]
    notes: list[str]  # see `Source`
    distinct_captions: int
    caption_tokens: Range
    cut_captions: int  # pictures whose caption is longer than the shortest max_text_len
    max_text_len: int
    shorter_sides: Range | None  # pixels; None of drawings
    shapes: dict[str, int] | None  # pictures of each of `SHAPES`
    cut: int | None  # pictures that lose much to the centre crop; None where nothing is cut
    enlarged: dict[int, int]  # by stage size: pictures whose shorter side is smaller
    groups: int  # of pictures that are held out together or not at all; see `data.val_group`
    duplicates: list[list[str]] | None  # keys of equal pictures; None: not looked for
    split_duplicates: int  # of these groups, those on both sides of the validation split
    picture_bytes: dict[int, int | None]  # on disk by stage size; None: decoded at every read
    text_bytes: int


def survey(
    config: Config, prepared: Prepared, cache_dir: Path, progress: Progress | None = None
) -> Survey:
    """Looks at every usable picture's header, prepared pixels and caption.

    Args:
        config: The run.
        prepared: What `prepare` gave for it.
        cache_dir: Sizes are kept in `cache_dir/images/<fingerprint>/sizes.json`.
        progress: Called as pictures are looked at.
    """
    source = prepared.source
    train, held_out = split(config.data, source)
    tokens = [prepared.embeddings.num_tokens(caption) for caption in source.captions]
    limit = min(unet.max_text_len for unet in config.unets)
    sizes = _sizes(source, cache_dir / "images" / source.fingerprint / "sizes.json", progress)
    sides = None if sizes is None else [min(size) for size in sizes]
    groups = _duplicates(prepared, progress)
    distinct = set(source.captions)
    width = 4 if config.text.store_dtype == "float32" else 2
    report = json.loads(prepared.report.read_text(encoding="utf-8"))
    outside = set(held_out)
    return Survey(
        pictures=len(source),
        trained_on=len(train),
        held_out=len(held_out),
        skipped=[Skipped(**skip) for skip in report["skipped"]],
        notes=report["notes"],
        distinct_captions=len(distinct),
        caption_tokens=_range(tokens),
        cut_captions=sum(count > limit for count in tokens),
        max_text_len=limit,
        shorter_sides=None if sides is None else _range(sides),
        shapes=None if sizes is None else _shapes(sizes),
        cut=None if sizes is None or config.data.fit != "crop" else count_cut(sizes),
        enlarged={
            size: sum(side < size for side in sides or ()) for size in config.imagen.image_sizes
        },
        groups=len(set(split_groups(config.data, source))),
        duplicates=None
        if groups is None
        else [[printable(source.keys[i]) for i in group] for group in groups],
        split_duplicates=sum(
            0 < len(outside.intersection(group)) < len(group) for group in groups or ()
        ),
        picture_bytes={
            size: None if store.file is None else store.file.stat().st_size
            for size, store in prepared.images.items()
        },
        text_bytes=sum(
            prepared.embeddings.num_tokens(caption) * prepared.embeddings.dim * width
            for caption in distinct
        ),
    )


def count_cut(sizes: Sequence[tuple[int, int]]) -> int:
    """Pictures that lose more than `MUCH` of their area to the centre crop."""
    return sum(1 - min(size) / max(size) > MUCH for size in sizes)


def cut_sentence(cut: int, pictures: int) -> str:
    """What to do where many pictures are cut."""
    return (
        f"{cut:,} of {pictures:,} lose more than {MUCH:.0%} of their area to the centre crop; "
        f"data.fit pad keeps all of each, random_crop shows another part each time"
    )


def _range(values: Sequence[float]) -> Range:
    return min(values), median(values), max(values)


class _Sizes(NamedTuple):
    sizes: list[tuple[int, int] | None]  # width and height, by index


def _sizes(source: Source, file: Path, progress: Progress | None) -> list[tuple[int, int]] | None:
    """Width and height of every picture, read from the headers once; None of drawings."""
    with exclusive(file.with_suffix(".lock")):
        known = read_kept(file, _Sizes)
        if known is None or len(known.sizes) != len(source):
            known = _Sizes([])
            for i in range(len(source)):
                known.sizes.append(source.size(i))
                if progress:
                    progress("measuring pictures", i + 1, len(source))
            with written_whole(file) as out:
                out.write(json.dumps(known._asdict()).encode())
    sizes = [size for size in known.sizes if size is not None]
    return sizes if len(sizes) == len(source) else None


def _shapes(sizes: Sequence[tuple[int, int]]) -> dict[str, int]:
    counts = Counter(
        next(name for name, limit in SHAPES if width / height < limit) for width, height in sizes
    )
    return {name: counts[name] for name, _ in SHAPES}


def _duplicates(prepared: Prepared, progress: Progress | None) -> list[list[int]] | None:
    """Groups of pictures that are equal at the smallest size, pixel by pixel.

    None where that size is not stored, since every picture would have to be decoded again.
    """
    store = prepared.images[min(prepared.images)]
    if store.file is None:
        return None
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for i in range(len(store)):
        groups[hashlib.blake2b(store[i].tobytes(), digest_size=16).digest()].append(i)
        if progress:
            progress("looking for duplicates", i + 1, len(store))
    return [group for group in groups.values() if len(group) > 1]
