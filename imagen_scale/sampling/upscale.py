"""A super-resolution stage applied to any picture."""

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.data.blank import is_blank
from imagen_scale.data.sources.images import load_whole_picture
from imagen_scale.errors import DataError, UsageError, option
from imagen_scale.files.pictures import from_uint8
from imagen_scale.runs.inference import read_stage
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.runtimes.contract import Say
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Listener, out_of_memory
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.sampling.unread import NotRead

MAX_PIXELS = 2**26  # of the result: float32 images of 0.8 GB each, several at a time


class Upscaled(NamedTuple):
    """An enlarged picture, and how it was made."""

    image: Tensor  # (3, height, width) in [-1, 1]
    settings: StageSettings
    runtime: str  # its name
    not_read: list[NotRead]  # of the prompt


class Upscaler:
    """One trained super-resolution stage.

    Args:
        run: The run's folder.
        unet_number: From 2 on.
        runtime: What computes it, and how.
        allow_unfinished: Accept a stage whose training has not ended.
        say: As for `TrainedStages`.

    Raises:
        CheckpointError: If the stage is not trained.
        UsageError: If it is none of super-resolution.
    """

    def __init__(
        self,
        run: Path,
        unet_number: int,
        runtime: RuntimeOptions = RuntimeOptions(runtime="torch"),  # noqa: B008  # immutable
        *,
        allow_unfinished: bool = False,
        say: Say = lambda sentence: None,
    ) -> None:
        if unet_number < 2:
            raise UsageError(
                f"{option('unet')} {unet_number}: U-Net 1 makes pictures from text; "
                f"super-resolution begins at 2."
            )
        self.file = read_stage(run, unet_number, allow_unfinished)
        self.config = self.file.stage
        assert self.config.small_size is not None
        self.factor = self.config.size / self.config.small_size
        self.stages = TrainedStages([self.file], runtime=runtime, say=say)

    def __call__(
        self,
        picture: Tensor,
        prompt: str | None,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  # immutable
        listener: Listener = Listener(),  # noqa: B008  # immutable
    ) -> Upscaled:
        """Enlarges a picture to (3, h * factor, w * factor).

        Args:
            picture: (3, h, w) in [-1, 1].
            prompt: What it shows; None or an empty one leaves the text out, as in training with
                dropped captions.
            options: How; guidance is 1 unless given, and tiles are as large as the U-Net's own
                pictures.
            listener: Told of each step.
        """
        height, width = picture.shape[-2:]
        if height * width * self.factor**2 > MAX_PIXELS:
            raise UsageError(
                f"a picture of {width} x {height} px would become larger than {MAX_PIXELS:,} "
                f"pixels; cut it or shrink it first."
            )
        if "cond_scale" not in options.model_fields_set:
            options = options.changed(cond_scale=1.0)
        elif prompt is None or is_blank(prompt):
            raise UsageError(
                f"{option('cond_scale')}: guidance follows a text; give one with "
                f"{option('prompt')}."
            )
        (settings,) = self.stages.settings(options)
        text, _, (not_read,), _ = self.stages.encode([prompt or ""])
        tile = options.tile or self.config.size
        try:
            with closing(
                self.stages.stage(self.config.number, tile=tile, caches=settings.caches)
            ) as stage:
                image = stage.upscale(picture, text, options.seed, settings, listener)
        except torch.OutOfMemoryError:
            raise out_of_memory(self.stages.device) from None
        return Upscaled(image, settings, stage.runtime.name, not_read)


def read_picture(path: Path) -> Tensor:
    """A picture file as (3, height, width) in [-1, 1].

    Raises:
        DataError: If it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    try:
        picture = load_whole_picture(path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return from_uint8(torch.tensor(picture))
