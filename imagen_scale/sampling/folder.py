"""Pictures of a cascade on disk: a PNG file each, and beside it what it was made from."""

from functools import lru_cache
from pathlib import Path

from imagen_scale.files.atomic import sha256
from imagen_scale.files.numbers import taken_number
from imagen_scale.files.picture_files import save_sample
from imagen_scale.files.pictures import to_uint8
from imagen_scale.sampling.groups import Picture
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.version import __version__


class SampleFolder:
    """Writes the pictures of one call; others in the folder, or coming into it, are left alone.

    Args:
        folder: Where to; made if it is missing.
        cascade: What makes the pictures.
        options: How.

    Raises:
        UsageError: If an option is wrong.
    """

    def __init__(self, folder: Path, cascade: TrainedStages, options: SamplingOptions) -> None:
        self.settings, self.options = cascade.settings(options), options
        folder.mkdir(parents=True, exist_ok=True)  # refused now rather than after the work
        self.folder = folder
        self.models = [_hash(file.path) for file in cascade.files]
        self.numbers: list[int] = []  # of the pictures written so far

    @property
    def written(self) -> int:
        """How many pictures there are by now."""
        return len(self.numbers)

    @property
    def grid(self) -> Path:
        """Where the pictures of this call are shown together; the first must be written."""
        return self.folder / f"grid_{self.numbers[0]:05d}.png"

    def write(self, picture: Picture) -> Path:
        """Writes one picture, its last stage; gives the PNG file."""
        stages = [
            {**settings.model_dump(), "runtime": name, "model_sha256": model}
            for settings, name, model in zip(
                self.settings, picture.runtimes, self.models, strict=True
            )
        ]
        facts = {
            "prompt": picture.prompt,
            "negative_prompt": self.options.negative_prompt or None,
            "not_read": [lost._asdict() for lost in picture.not_read],
            "seed": picture.seed,
            "tile": self.options.tile,
            "stages": stages,
            "version": __version__,
        }
        image = to_uint8(picture.stages[-1][None])[0]
        with taken_number(self.folder, max(self.numbers, default=0) + 1) as number:
            path = save_sample(self.folder, number, image, facts)
        self.numbers.append(number)
        return path


def _hash(path: Path) -> str:
    status = path.stat()
    return _hash_as_it_is(path, status.st_mtime_ns, status.st_size)


@lru_cache
def _hash_as_it_is(path: Path, mtime_ns: int, size: int) -> str:
    """Gigabytes are read once for as long as a file stays as it is."""
    return sha256(path)
