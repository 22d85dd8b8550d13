"""Caption files beside pictures: those that are called as they should be, and near misses."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

# What trainers and taggers call them, beside .txt.
TEXT_ENDINGS = (".txt", ".caption", ".captions", ".cap", ".tags", ".tag", ".text", ".prompt")
ENDINGS = (*TEXT_ENDINGS, ".json")


class CaptionFiles:
    """The caption files of a folder, by the name of the picture that they are beside."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Takes all files; those that are no caption files are passed over."""
        self._beside: defaultdict[str, list[Path]] = defaultdict(list)
        self._anywhere: defaultdict[str, list[Path]] = defaultdict(list)
        self.files: list[Path] = []
        for file in files:
            if file in self:
                self.files.append(file)
                self._beside[_form(file.with_suffix(""))].append(file)
                self._anywhere[_form(file.with_suffix("")).rpartition("/")[2]].append(file)

    def __contains__(self, file: Path) -> bool:
        return file.suffix.lower() in ENDINGS

    def beside(self, picture: Path) -> list[Path]:
        """All that carry the picture's name, whether or not its ending stands before theirs."""
        forms = dict.fromkeys((_form(picture.with_suffix("")), _form(picture)))
        return [file for form in forms for file in self._beside.get(form, []) if file != picture]

    def usual(self, picture: Path) -> Path | None:
        """The `.txt` beside a picture, if anything is called so."""
        file = picture.with_suffix(".txt")
        return file if file != picture and os.path.lexists(file) else None

    def elsewhere(self, picture: Path) -> Path | None:
        """The only caption file of the picture's name in other folders."""
        found = self._anywhere.get(_form(picture.with_suffix("")).rpartition("/")[2], [])
        texts = [file for file in found if file.suffix.lower() in TEXT_ENDINGS]
        return texts[0] if len(texts) == 1 else None


def _form(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()
