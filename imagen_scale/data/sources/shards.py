"""The tars of a set, and what lies beside them."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.folder_files import ARCHIVES
from imagen_scale.data.sources.formats import PICTURES, ending_of
from imagen_scale.data.sources.skipped import counted, printable
from imagen_scale.data.sources.walk import files_below
from imagen_scale.errors import DataError
from imagen_scale.files.caches import expanded


def shards(config: DataConfig) -> list[Path]:
    """The shards that `data.path` names: a tar, or a folder of them."""
    path = expanded(config.path or "")
    if path.is_dir():
        # Links on the way to the folder are the user's own; those in it are the data's.
        found = sorted(
            tar
            for tar in path.resolve().iterdir()
            if tar.suffix.lower() == ".tar" and not tar.name.startswith(".")
        )
        for tar in found:
            if tar.is_symlink() and not config.follow_symlinks:
                raise DataError(
                    f"{tar}: is a symbolic link, which may lead outside the folder; put the file "
                    f"itself there, or set data.follow_symlinks to true."
                )
    else:
        found = [path.resolve()] if path.is_file() else []
    if not found:
        deeper = sorted(path.glob("*/**/*.tar"))[:1] if path.is_dir() else []
        there = f"; {deeper[0].parent} holds some: give that" if deeper else ""
        raise DataError(
            f"data.path: {config.path!r} is neither a .tar nor a folder with .tar files in it"
            f"{there or '; give the shards'} (compressed ones are not read: decompress them)."
        )
    return found


def beside(folder: Path) -> list[str]:
    """Files beside the shards that look as if they should have been read."""
    if not folder.is_dir():
        return []
    packed, deeper, pictures = list[str](), list[str](), list[str]()
    for file in files_below(folder.resolve(), follow_symlinks=False):
        name = file.relative_to(folder.resolve()).as_posix()
        if file.suffix.lower() == ".tar":
            if "/" in name:
                deeper.append(name)
        elif file.suffix.lower() in ARCHIVES:
            packed.append(name)
        elif ending_of(name) in PICTURES:
            pictures.append(name)
    told = (
        (packed, "packed file is not read", "packed files are not read", "decompress them"),
        (deeper, "tar is not read", "tars are not read", "subfolders are not looked into"),
        (pictures, "picture is not used", "pictures are not used", "only those in tars are"),
    )
    return [f"{counted(names, *forms)}; {why}." for names, *forms, why in told if names]


def _downloads(tars: list[Path]) -> Iterator[dict[str, Any]]:
    """What img2dataset counted beside each shard, where it did."""
    for tar in tars:
        try:
            counts = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_text(encoding="utf-8"))
            if all(isinstance(counts[name], int) for name in ("count", "successes")):
                yield counts
        except (OSError, ValueError, KeyError, TypeError):
            continue


def tell_downloads(tars: list[Path]) -> None:
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
