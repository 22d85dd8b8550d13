"""Which pictures can be used: each is decoded once, and what fails is named and left out."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.formats import readable_formats
from imagen_scale.data.sources.opening import Source, Without, open_source
from imagen_scale.data.sources.skipped import Skipped, counted, printable
from imagen_scale.data.storage import Progress, exclusive, written_whole
from imagen_scale.errors import DataError
from imagen_scale.files.kept import read_kept

CONVERTED = "with a colour profile other than sRGB: converted to sRGB"
IGNORED = (
    "picture has a colour profile that is broken or not of its kind, and is read as sRGB",
    "pictures have a colour profile that is broken or not of their kind, and are read as sRGB",
)
FIRST = 10  # so many are listed in a message; the report has all


def usable_source(
    config: DataConfig, cache_dir: Path, progress: Progress | None = None
) -> tuple[Source, Path]:
    """Opens a source and leaves out what cannot be used.

    Verdicts depend on the files alone, never on the time that decoding takes, and are kept beside
    the prepared pictures until the files change: every rank and every later run sees the same
    pictures. What stays keeps its key, and with it its side of the validation split.

    Args:
        config: The `data` section.
        cache_dir: Verdicts and report go to `cache_dir/<fingerprint>/`.
        progress: Called as pictures are decoded for the first time.

    Returns:
        The usable pictures, and the path of `data_report.json`.

    Raises:
        DataError: If more than `data.max_bad_fraction` are not usable, naming the first ones.
        EnvironmentProblem: If the disk cannot be read or written.
        MissingExtraError: If the source needs a package that is not installed.
    """
    source = open_source(config)
    folder = cache_dir / source.fingerprint
    report = folder / "data_report.json"
    total = len(source) + len(source.skipped)
    with exclusive(folder / "screening.lock"):
        found = _Verdicts([], {}, [], 0)
        # Not worth the decoding when names and captions alone are bad enough.
        is_hopeless = len(source.skipped) > config.max_bad_fraction * total
        if not is_hopeless:
            found = _verdicts(source, folder / "unreadable.json", progress)
        unreadable = found.unreadable
        notes = list(source.notes)
        if found.ignored:
            names = [source.keys[i] for i in found.ignored]
            notes.append(f"{counted(names, *IGNORED)}.")
        skipped = [
            *source.skipped,
            *(Skipped(printable(source.keys[i]), reason) for i, reason in unreadable.items()),
        ]
        facts = {
            "source": config.source,
            "path": config.path,
            "used": total - len(skipped),
            "skipped": [skip._asdict() for skip in skipped],
            "notes": notes + [f"{found.converted:,} {CONVERTED}."] * bool(found.converted),
        }
        with written_whole(report) as out:
            out.write(json.dumps(facts, indent=1).encode())
    bad = f"{len(skipped)} of {total} pictures ({len(skipped) / total:.1%}) cannot be used"
    if len(skipped) > config.max_bad_fraction * total:
        lines = [f"  {skip.picture}: {skip.reason}" for skip in skipped[:FIRST]]
        if len(skipped) > FIRST:
            lines.append(f"  and {len(skipped) - FIRST} more, all of them in {report}")
        bad += " (none was decoded yet)" * is_hopeless
        raise DataError(
            f"data.path: {bad}, more than data.max_bad_fraction {config.max_bad_fraction:g} "
            f"allows; correct or remove them, or raise that share:\n" + "\n".join(lines)
        )
    for note in notes:
        warnings.warn(f"data.path: {note}", stacklevel=3)
    if skipped:
        warnings.warn(f"{bad} and are left out; see {report}", stacklevel=3)
    return (Without(source, unreadable) if unreadable else source), report


class _Verdicts(NamedTuple):
    """What decoding every picture once has shown."""

    formats: list[str]  # that could be read; a plugin may have come or gone
    unreadable: dict[int, str]  # why, by index
    ignored: list[int]  # pictures whose colour profile is not used
    converted: int  # how many are converted to sRGB


def _verdicts(source: Source, file: Path, progress: Progress | None) -> _Verdicts:
    """Decodes pictures that have not been decoded yet; the caller holds the lock."""
    formats = list(readable_formats())
    known = read_kept(file, _Verdicts)
    if known is None or known.formats != formats:
        unreadable, profiles = dict[int, str](), dict[int, str]()
        for i in range(len(source)):
            if reason := source.check(i):
                unreadable[i] = reason
            elif use := source.profile(i):
                profiles[i] = use
            if progress:
                progress("checking pictures", i + 1, len(source))
        known = _Verdicts(
            formats=formats,
            unreadable=unreadable,
            ignored=[i for i, use in profiles.items() if use == "ignored"],
            converted=sum(use == "converted" for use in profiles.values()),
        )
        with written_whole(file) as out:
            out.write(json.dumps(known._asdict()).encode())
    return known
