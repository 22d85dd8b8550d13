"""Which picture a list means when no file is called exactly so."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from imagen_scale.data.sources.formats import PICTURES, ending_of
from imagen_scale.data.sources.skipped import printable
from imagen_scale.errors import DataError


class Meant(NamedTuple):
    """A file that a name may mean."""

    name: str  # of the file, relative to the set
    how: str  # in what they differ
    shift: tuple[str, str] | None  # folders before the name in the list, and before the file


class Names:
    """The files of a set, found again under names that differ a little.

    Names may differ by Windows' backslashes, case, the form of accents, blanks around them, a
    missing ending, or the folders before them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Takes the names of all files that may be meant, relative to the set."""
        self._whole: defaultdict[str, list[str]] = defaultdict(list)
        self._last: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            for form in {_plain(name), _without_ending(_plain(name))}:
                self._whole[form].append(name)
                self._last[form.rpartition("/")[2]].append(name)

    def alike(self, listed: str) -> list[str]:
        """Files of the same name in other folders or with other endings, for a message."""
        return self._last.get(_without_ending(_plain(listed)).rpartition("/")[2], [])

    def meant(self, listed: str, folder: str) -> Meant | None:
        """The only file that `listed` can mean; None if there is none or several.

        Args:
            listed: As the list has it.
            folder: Of the list, relative to the set; "." of the set's own.
        """
        found = self._meant(listed, folder)
        if found is None and (decoded := unquote(listed)) != listed:
            found = self._meant(decoded, folder)
            return found and found._replace(how="characters written as in addresses")
        return found

    def _meant(self, listed: str, folder: str) -> Meant | None:
        plain = _plain(listed)
        here = _plain(f"{folder}/{listed}") if folder != "." else plain
        for form in dict.fromkeys((here, plain)):
            found = self._whole.get(form, [])
            if len(found) == 1:
                return Meant(found[0], _difference(listed, found[0], folder), None)
            if found:
                return None
        found = self._last.get(plain.rpartition("/")[2], [])
        if len(found) != 1:
            return None
        before, beside = _folders(plain), _folders(_plain(found[0]))
        while before and beside and before[-1] == beside[-1]:
            before, beside = before[:-1], beside[:-1]
        return Meant(found[0], "the folders before them", ("/".join(before), "/".join(beside)))


def places(
    listed: Sequence[Any], base: Path, root: Path, names: Names
) -> list[tuple[Path, str] | DataError]:
    """The file of each row of a list.

    Args:
        listed: What the rows call their pictures.
        base: The list's folder.
        root: The set's folder.
        names: Its files.

    Returns:
        The file, and in what its name differs from the listed one, "" in nothing; or what is
        wrong with that.
    """
    folder = base.relative_to(root).as_posix()
    # Data frames make numbers of names: 1 for 1.png.
    texts = [str(name) if type(name) is int else name for name in listed]
    meant = [None if _is_there(name, base) else names.meant(name, folder) for name in texts]
    # Other folders before the name are believed where they are the same for all.
    shifts = {one.shift for one in meant if one and one.shift}
    found: list[tuple[Path, str] | DataError] = []
    for name, one in zip(listed, meant, strict=True):
        if one and (one.shift is None or len(shifts) == 1):
            found.append((root / one.name, one.how))
        elif not isinstance(name, str) or not name.strip():
            found.append(DataError(f"file_name is {name!r}; write the picture's file name."))
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            found.append(DataError("file_name leads outside the folder; move the file into it."))
        elif not _is_there(name, base) and (alike := names.alike(name)):
            there = " and ".join(map(printable, alike[:2]))
            found.append(
                DataError(f"the file cannot be found, but {there} lies there; correct the row.")
            )
        else:
            found.append((base / name, ""))
    return found


def _is_there(name: Any, base: Path) -> bool:
    """Whether a file is called so, or nothing can be."""
    if not isinstance(name, str) or not name.strip():
        return True
    try:
        is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        return is_inside and os.path.lexists(base / name)
    except ValueError:  # a NUL in it
        return True


def _difference(listed: str, name: str, folder: str) -> str:
    written = f"{folder}/{name}" if folder == "." else name
    if "\\" in listed:
        return "backslashes for slashes"
    if not _has_ending(listed):
        return "no ending"
    if folder != "." and not _plain(written).startswith(_plain(f"{folder}/{listed}")):
        return "the folder of the set before the name"
    return "case, accents or blanks"


def _plain(name: str) -> str:
    """What is left of a name when everything that may differ is taken from it."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/").strip().casefold()
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _folders(plain: str) -> list[str]:
    return plain.split("/")[:-1]


def _has_ending(name: str) -> bool:
    return ending_of(name.strip()) in PICTURES


def _without_ending(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if _has_ending(name) else name
