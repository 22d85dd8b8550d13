"""A trained run in Python: prompts in, PIL pictures out.

The same sampling as `imagen-scale sample`: equal pixels for equal options.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from imagen_scale.errors import UsageError, spelled
from imagen_scale.files.pictures import to_uint8
from imagen_scale.runs.folders import find_run
from imagen_scale.sampling.groups import Picture
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.residents import Residents
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.signature import takes
from imagen_scale.sampling.stage import Listener, OnEstimate
from imagen_scale.sampling.stages import TrainedStages


class Sample(NamedTuple):
    """One finished picture, and what it was made from."""

    prompt: str
    seed: int
    stages: list[Image.Image]  # of each stage, from the smallest on, RGB
    runtimes: list[str]  # what computed each stage

    @property
    def image(self) -> Image.Image:
        """The last stage's picture, RGB."""
        return self.stages[-1]


class Cascade:
    """A run's trained stages, ready to be sampled; made by `Cascade.load`.

    Weights are read when a stage is used for the first time. As far as memory allows, stages and
    text encoder stay loaded for the next call, until `close` or the end of a `with` block; features
    of prompts are kept too. Not to be used by several threads at once.
    """

    def __init__(self, stages: TrainedStages) -> None:
        self._stages = stages
        self._residents = stages.residents = Residents(stages.device)
        stages.remembered = {}

    def close(self) -> None:
        """Frees what is loaded; the next call loads it again."""
        self._residents.close()

    def __enter__(self) -> "Cascade":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @classmethod
    @takes(RuntimeOptions)
    def load(
        cls,
        run: str | Path | None = None,
        *,
        unet_limit: int | None = None,
        allow_unfinished: bool = False,
        device: str | None = None,
        say: Callable[[str], None] | None = None,
        **options: Any,
    ) -> "Cascade":
        """Opens a trained run.

        Args:
            run: The run's folder; None takes the newest under `runs/`.
            unet_limit: Use only the first so many U-Nets.
            allow_unfinished: Accept stages whose training has not ended.
            device: Where to compute, as torch names it ("cpu", "cuda:1"); None takes the first
                GPU, else the CPU.
            say: Told in sentences what "auto" chose, what was changed for want of memory, and
                what of a prompt is not read, e.g. `print`; None keeps quiet, but for prompts,
                of which `warnings` tells.
            options: Of the runtime.

        Raises:
            UsageError: If there is no such run, or an option is wrong.
            CheckpointError: Naming the stage that is missing, damaged or not trained to its end.
        """
        runtime = RuntimeOptions.make(**options)
        stages = TrainedStages.load(
            find_run(run),
            None if device is None else _device(device),
            runtime,
            unet_limit=unet_limit,
            allow_unfinished=allow_unfinished,
            say=lambda sentence: None if say is None else say(spelled(sentence)),
            warn=_warn if say is None else None,
        )
        return cls(stages)

    @property
    def image_sizes(self) -> list[int]:
        """Side of each stage's square pictures in pixels, from the smallest on."""
        return [stage.size for stage in self._stages.configs]

    @takes(SamplingOptions)
    def sample(
        self,
        prompts: str | Sequence[str],
        options: SamplingOptions | None = None,
        *,
        on_step: Callable[[int, int, int], None] | None = None,
        on_estimate: Callable[[int, int, int, list[Image.Image]], None] | None = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """Makes pictures from prompts and holds them all.

        A picture depends on its prompt, its seed and the options, not on the others of the call.
        Options that take a list have one value per stage; a single value counts for all, but for
        `cond_scale`: a single scale is the base stage's, and the others take 1.

        Args:
            prompts: One caption, or P of them.
            options: A `SamplingOptions`; what stands beside it, changes it. None: the defaults.
            on_step: Told of each step: U-Net number from 1, steps done, steps in all.
            on_estimate: Told the same, and the clean pictures that the step expects: RGB, of
                those that are computed together. What is made does not depend on it.
            changes: Of the options.

        Returns:
            P * num RGB pictures of the last stage, `image_sizes[-1]` pixels square; those of one
            prompt stand together.

        Raises:
            UsageError: Naming the option that is wrong, before any work.
            EnvironmentProblem: If the device's memory is too small.
            ImagenScaleError: If a runtime asked for by name cannot be used.
        """
        made = self.stream(prompts, options, on_step=on_step, on_estimate=on_estimate, **changes)
        return [sample.image for sample in made]

    @takes(SamplingOptions)
    def stream(
        self,
        prompts: str | Sequence[str],
        options: SamplingOptions | None = None,
        *,
        on_step: Callable[[int, int, int], None] | None = None,
        on_estimate: Callable[[int, int, int, list[Image.Image]], None] | None = None,
        **changes: Any,
    ) -> Iterator[Sample]:
        """Makes pictures from prompts and gives each as soon as it is finished, all stages of it.

        Args:
            prompts: As for `sample`, and so is every option.
            options: See `sample`.
            on_step: See `sample`.
            on_estimate: See `sample`.
            changes: Of the options.

        Returns:
            One `Sample` after the other.

        Raises:
            UsageError: Naming the option that is wrong, before any work.
        """
        captions = [prompts] if isinstance(prompts, str) else list(prompts)
        if not captions:
            raise UsageError("prompts: there is none; give one caption or more.")
        for i, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise UsageError(f"prompts[{i}]: {caption!r} is not a string.")
        listener = Listener(on_step, None if on_estimate is None else _with_images(on_estimate))
        options = (options or SamplingOptions()).changed(**changes)
        return map(_sample, self._stages.stream(captions, options, listener))


def _warn(sentence: str) -> None:
    warnings.warn(spelled(sentence), stacklevel=2)


def _sample(picture: Picture) -> Sample:
    images = [image for stage in picture.stages for image in _images(stage[None])]
    return Sample(picture.prompt, picture.seed, images, picture.runtimes)


def _images(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in to_uint8(pictures)]


def _with_images(
    on_estimate: Callable[[int, int, int, list[Image.Image]], None],
) -> OnEstimate:
    return lambda unet, step, steps, x_0: on_estimate(unet, step, steps, _images(x_0))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"device: {name!r} is none that torch knows; take e.g. 'cpu' or 'cuda:0'."
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device: {name!r}, but torch sees {torch.cuda.device_count()} GPUs here; leave it out "
            f"to take the best there is."
        )
    return device
