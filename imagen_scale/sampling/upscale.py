"""A super-resolution stage applied to any picture."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_scale.data.sources.images import load_whole_picture
from imagen_scale.errors import DataError, UsageError
from imagen_scale.runs.inference import read_stage
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.settings import Settings
from imagen_scale.sampling.stage import OnStep, Stage, out_of_memory
from imagen_scale.sampling.stages import TrainedStages

MAX_PIXELS = 2**26  # of the result: float32 images of 0.8 GB each, several at a time


class Upscaler:
    """One trained super-resolution stage.

    Args:
        run: The run's folder.
        unet_number: From 2 on.
        allow_unfinished: Accept a stage whose training has not ended.
        tile: Side of the tiles in pixels; None takes the size of training.
        how: `runtime`, `options` and `say` of `TrainedStages`.

    Raises:
        CheckpointError: If the stage is not trained.
        UsageError: If it is none of super-resolution.
    """

    def __init__(
        self,
        run: Path,
        unet_number: int,
        *,
        allow_unfinished: bool = False,
        tile: int | None = None,
        **how: Any,
    ) -> None:
        if unet_number < 2:
            raise UsageError(
                f"--unet {unet_number}: U-Net 1 makes pictures from text; super-resolution begins "
                f"at 2."
            )
        self.file = read_stage(run, unet_number, allow_unfinished)
        sizes = self.file.config.imagen.image_sizes
        self.factor = sizes[unet_number - 1] / sizes[unet_number - 2]
        self.cascade = TrainedStages([self.file], **how)
        self.tile = tile or sizes[unet_number - 1]

    def __call__(
        self,
        picture: Tensor,
        prompt: str | None,
        *,
        seed: int = 0,
        settings: dict[str, Any],
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, Settings, str]:
        """Enlarges a picture.

        Args:
            picture: (3, h, w) in [-1, 1].
            prompt: What it shows; None leaves the text out, as in training with dropped captions.
            seed: Same seed, same result.
            settings: As for `TrainedStages.settings`; guidance is 1 unless given.
            on_step: Told of each step.

        Returns:
            The picture, (3, h * factor, w * factor) in [-1, 1]; the settings; the runtime's name.
        """
        height, width = picture.shape[-2:]
        if height * width * self.factor**2 > MAX_PIXELS:
            raise UsageError(
                f"a picture of {width} x {height} px would become larger than {MAX_PIXELS:,} "
                f"pixels; cut it or shrink it first."
            )
        if prompt is None and "cond_scale" in settings:
            raise UsageError("--cond-scale: guidance follows a text; give one with --prompt.")
        scale = 1.0 if prompt else 0.0  # 0 is the branch without text
        (one,) = self.cascade.settings(**{"cond_scale": scale} | settings)
        if prompt:
            text = encode(self.file, [prompt])
        else:
            text = Text(torch.zeros(1, 1, self.file.text_embed_dim), torch.zeros(1, 1).bool())
        stage: Stage = self.cascade.stage(1, tile=self.tile)
        try:
            image = stage.upscale(text, seed, picture, one, on_step=on_step)
        except torch.OutOfMemoryError:
            raise out_of_memory(self.cascade.device) from None
        finally:
            stage.close()
        return image, one, stage.runtime.name


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
    return torch.from_numpy(picture).float() / 127.5 - 1
