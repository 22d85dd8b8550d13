"""Prompts through all stages, some at a time, and each picture as soon as it is finished."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from imagen_scale.diffusion.guidance import branches
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.residents import Key, Residents
from imagen_scale.sampling.stage import Inputs, Listener, out_of_memory
from imagen_scale.sampling.tile_size import smaller_tile
from imagen_scale.sampling.unread import NotRead
from imagen_scale.sampling.wanted import Wanted

if TYPE_CHECKING:
    from imagen_scale.sampling.stages import TrainedStages

# Pictures that go through the cascade together: what is held of them is bounded, and where stages
# do not fit beside each other, their weights are read once for so many.
GROUP = 64


class Picture(NamedTuple):
    """One finished picture of a cascade."""

    prompt: str
    seed: int
    stages: list[Tensor]  # of each stage, (3, size, size) in [-1, 1]
    runtimes: list[str]  # what computed each stage
    not_read: list[NotRead]  # of its prompt and of the negative one


def stream_groups(
    cascade: "TrainedStages",
    wanted: Sequence[Wanted],
    settings: Sequence[StageSettings],
    options: SamplingOptions,
    listener: Listener,
) -> Iterator[Picture]:
    """Makes pictures, `GROUP` at a time; see `TrainedStages.stream`.

    Args:
        cascade: Makes them.
        wanted: What to make.
        settings: Of each stage, checked.
        options: How.
        listener: Told of each step.

    Raises:
        EnvironmentProblem: If the device's memory is too small.
        ImagenScaleError: If an export cannot be used; before any work.
    """
    residents = cascade.residents
    if residents is None:
        residents = Residents(cascade.device)
    usual = [of_stage.cond_scale for of_stage in settings]
    cascade.check_exports(settings, options.tile)
    try:
        for start in range(0, len(wanted), GROUP):
            group = wanted[start : start + GROUP]
            prompts, seeds = [one.prompt for one in group], [one.seed for one in group]
            text, negative, not_read, _ = cascade.encode(prompts, options.negative_prompt)
            made: list[Tensor] = []
            runtimes: list[str] = []
            for number, (file, of_stage) in enumerate(zip(cascade.files, settings, strict=True)):
                scales = [(one.cond_scales or usual)[number] for one in group]
                null = negative if any("null" in branches(scale) for scale in scales) else None
                inputs = Inputs(text, seeds, made[-1] if made else None, null, scales)
                parts = _parts(
                    cascade, residents, file, inputs, of_stage, options, listener, runtimes
                )
                if len(made) + 1 < len(settings):
                    made.append(torch.cat(list(parts)))
                    continue
                for i, image in enumerate(image for part in parts for image in part):
                    earlier = [images[i] for images in made]
                    yield Picture(prompts[i], seeds[i], [*earlier, image], runtimes, not_read[i])
    except torch.OutOfMemoryError:
        raise out_of_memory(cascade.device) from None
    finally:
        if cascade.residents is None:
            residents.close()


def _parts(
    cascade: "TrainedStages",
    residents: Residents,
    file: InferenceFile,
    inputs: Inputs,
    settings: StageSettings,
    options: SamplingOptions,
    listener: Listener,
    runtimes: list[str],
) -> Iterator[Tensor]:
    """A stage's pictures, a few at a time, and to `runtimes` the name of what computes them.

    Where memory is full, all that is held besides is freed, and it goes on with the next picture.
    """
    tile = smaller_tile(file.stage, options.tile)
    key = Key.of(file, cascade.runtime, tile, caches=settings.caches)
    done, count, named = 0, len(inputs.seeds), len(runtimes)
    while done < count:
        try:
            with residents.lend(
                key,
                lambda: cascade.stage(file.unet_number, tile=tile, caches=settings.caches),
                cascade.files,
            ) as stage:
                if len(runtimes) == named:  # not where it is tried again
                    runtimes.append(stage.runtime.name)
                for part in stage.parts(
                    inputs.part(done, count), settings, at_once=options.at_once, listener=listener
                ):
                    done += len(part)
                    yield part
        except torch.OutOfMemoryError:
            if not residents.make_room():
                raise
