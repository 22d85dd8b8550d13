"""Sampling: a trained cascade from text to pictures, one stage in memory at a time."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagen_scale.diffusion.sampler import Sampler
from imagen_scale.diffusion.spacing import Spacing
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.runs.inference import InferenceFile, read_stage
from imagen_scale.sampling.prompts import encode, encode_groups
from imagen_scale.sampling.runtimes.contract import (
    EXPORTED,
    Options,
    RuntimeName,
    Say,
    Text,
    no_negative_prompt,
)
from imagen_scale.sampling.settings import DEFAULTS, Settings, _each, is_guided
from imagen_scale.sampling.stage import OnEstimate, OnStep, Stage, default_device, out_of_memory

# Pictures that go through the cascade together: what is held of them is bounded, and a stage's
# weights are read once for so many.
GROUP = 64


class Picture(NamedTuple):
    """One finished picture of a cascade."""

    prompt: str
    seed: int
    stages: list[Tensor]  # of each stage, (3, size, size) in [-1, 1]
    runtimes: list[str]  # what computed each stage


class TrainedStages:
    """A run's trained stages.

    Args:
        files: One inference file per stage, in order, from U-Net 1 on.
        device: Where to compute; None takes the first GPU, else the CPU.
        runtime: What computes the U-Nets.
        options: How.
        say: Told what "auto" chose and what was changed for want of memory.
    """

    def __init__(
        self,
        files: list[InferenceFile],
        device: torch.device | None = None,
        *,
        runtime: RuntimeName = "torch",
        options: Options = Options(),  # noqa: B008  # immutable
        say: Say = lambda sentence: None,
    ) -> None:
        self.files = files
        self.device = device or default_device()
        self.runtime, self.options, self.say = runtime, options, _once(say)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        unet_limit: int | None = None,
        allow_unfinished: bool = False,
        device: torch.device | None = None,
        **how: Any,
    ) -> "TrainedStages":
        """Opens the stages of a run; the weights are read when a stage is used.

        Args:
            run: The run's folder.
            unet_limit: Use only the first so many U-Nets.
            allow_unfinished: Accept stages whose training has not ended.
            device: As for `TrainedStages`.
            how: `runtime`, `options` and `say` of `TrainedStages`.

        Raises:
            CheckpointError: Naming the stage that is missing, damaged or not trained to its end.
            UsageError: If `unet_limit` is out of range.
        """
        run = Path(run)
        first = read_stage(run, 1, allow_unfinished)
        num_unets = len(first.config.unets)
        if unet_limit is not None and not 1 <= unet_limit <= num_unets:
            raise UsageError(
                f"--unet-limit {unet_limit}: this cascade has U-Nets 1 to {num_unets}."
            )
        numbers = range(2, (unet_limit or num_unets) + 1)
        files = [first, *(read_stage(run, n, allow_unfinished) for n in numbers)]
        for file in files:
            if file.text_fingerprint != first.text_fingerprint:
                raise CheckpointError(
                    f"{run}: U-Net {file.unet_number} was trained with another version of the text "
                    f"encoder than U-Net 1. Train one of them again with --unet N --fresh."
                )
        return cls(files, device, **how)

    def stage(self, unet_number: int, *, tile: int | None = None, negative: bool = False) -> Stage:
        """Loads one stage; close it before the next."""
        return Stage(
            self.files[unet_number - 1],
            self.device,
            runtime=self.runtime,
            options=self.options,
            tile=tile,
            negative=negative,
            say=self.say,
        )

    def settings(
        self,
        *,
        steps: int | Sequence[int] = DEFAULTS.steps,
        cond_scale: float | Sequence[float] = 3.0,
        sampler: Sampler | Sequence[Sampler] = DEFAULTS.sampler,
        spacing: Spacing | Sequence[Spacing] = DEFAULTS.spacing,
        threshold: float | Sequence[float | None] | None = None,
        eta: float | Sequence[float] = 0.0,
    ) -> list[Settings]:
        """The settings of each stage, checked.

        A list gives one value per stage; a single value counts for all. Only guidance differs: a
        single scale is the base stage's, and the others take 1, since their low-resolution
        picture already says what to draw.

        Raises:
            UsageError: Naming the option that is wrong.
        """
        stages = len(self.files)
        if isinstance(cond_scale, int | float):
            cond_scale = [float(cond_scale), *[1.0] * (stages - 1)]
        rows = zip(
            _each("--steps", steps, stages),
            _each("--cond-scale", cond_scale, stages),
            _each("--sampler", sampler, stages),
            _each("--spacing", spacing, stages),
            _each("--eta", eta, stages),
            _each("--threshold", threshold, stages),
            strict=True,
        )
        settings = [
            one if one.threshold is not None
            else one._replace(threshold=file.config.imagen.dynamic_thresholding_percentile)
            for one, file in zip((Settings(*row) for row in rows), self.files, strict=True)
        ]  # fmt: skip
        for one in settings:
            if one.steps < 1:
                raise UsageError(f"--steps {one.steps}: at least 1 step is needed.")
            if not math.isfinite(one.cond_scale):
                raise UsageError(f"--cond-scale {one.cond_scale}: a finite number is needed.")
            if not 0 <= one.eta <= 1:
                raise UsageError(f"--eta {one.eta}: between 0 (none) and 1 (all of DDPM's noise).")
            if one.eta and one.sampler != "ddim":
                raise UsageError(f"--eta {one.eta}: goes with --sampler ddim, not {one.sampler}.")
            if one.threshold is not None and not 0 < one.threshold <= 1:
                raise UsageError(f"--threshold {one.threshold}: a percentile above 0, at most 1.")
        return settings

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num: int = 1,
        **options: Any,
    ) -> list[Tensor]:
        """Makes pictures from prompts and holds them all; see `stream` for many.

        Args:
            prompts: P captions.
            seed: The j-th picture of each prompt uses seed + j.
            num: Pictures per prompt.
            options: As for `stream`.

        Returns:
            Each stage's pictures, (P * num, 3, size, size) in [-1, 1]; those of one prompt
            stand together.
        """
        pictures = list(self.stream(prompts, seed=seed, num=num, **options))
        stages = zip(*(picture.stages for picture in pictures), strict=True)
        return [torch.stack(images) for images in stages]

    def stream(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num: int = 1,
        tile: int | None = None,
        at_once: int | None = None,
        on_step: OnStep | None = None,
        on_estimate: OnEstimate | None = None,
        negative_prompt: str | None = None,
        **settings: Any,
    ) -> Iterator[Picture]:
        """Makes pictures from prompts and gives each as soon as it is finished.

        `GROUP` pictures at a time go through all stages, one stage in memory at a time.

        Args:
            prompts: Captions.
            seed: The j-th picture of each prompt uses seed + j.
            num: Pictures per prompt.
            tile: Side of the tiles in pixels for stages larger than that; None for none.
            at_once: Images computed together; None takes `PIXELS_AT_ONCE`.
            on_step: Told of each step.
            on_estimate: Told of each step and of the pictures as they are expected there; what
                is made does not depend on it.
            negative_prompt: What guidance leads away from, in place of no text at all.
            settings: As for `settings`.

        Raises:
            EnvironmentProblem: If the device's memory is too small.
            UsageError: If an option is wrong; before any work.
        """
        per_stage = self.settings(**settings)
        self._check_negative_prompt(negative_prompt, per_stage)
        wanted = [(prompt, seed + j) for prompt in prompts for j in range(num)]
        return self._stream(
            wanted, per_stage, tile=tile, at_once=at_once, on_step=on_step,
            on_estimate=on_estimate, negative_prompt=negative_prompt,
        )  # fmt: skip

    def _stream(
        self,
        wanted: Sequence[tuple[str, int]],
        per_stage: Sequence[Settings],
        *,
        tile: int | None,
        at_once: int | None,
        on_step: OnStep | None,
        on_estimate: OnEstimate | None,
        negative_prompt: str | None,
    ) -> Iterator[Picture]:
        stage: Stage | None = None
        try:
            for start in range(0, len(wanted), GROUP):
                group = wanted[start : start + GROUP]
                seeds = [seed for _, seed in group]
                text, negative = self._encode([prompt for prompt, _ in group], negative_prompt)
                made: list[Tensor] = []
                runtimes: list[str] = []
                for number, how in enumerate(per_stage, start=1):
                    led_away = negative if is_guided(how) else None
                    if stage is None or len(per_stage) > 1:
                        if stage is not None:
                            stage.close()
                        stage = self.stage(
                            number, tile=self._tile(number, tile), negative=led_away is not None
                        )
                    runtimes.append(stage.runtime.name)
                    parts = stage.parts(
                        text, seeds, how, lowres=made[-1] if made else None,
                        at_once=at_once, on_step=on_step, on_estimate=on_estimate,
                        negative=led_away,
                    )  # fmt: skip
                    if number < len(per_stage):
                        made.append(torch.cat(list(parts)))
                        continue
                    for i, image in enumerate(image for part in parts for image in part):
                        earlier = [images[i] for images in made]
                        yield Picture(*group[i], [*earlier, image], runtimes)
        except torch.OutOfMemoryError:
            raise out_of_memory(self.device) from None
        finally:
            if stage is not None:
                stage.close()

    def _tile(self, unet_number: int, tile: int | None) -> int | None:
        size = self.files[unet_number - 1].stage.size
        return tile if tile is not None and tile < size else None

    def _check_negative_prompt(self, negative_prompt: str | None, how: Sequence[Settings]) -> None:
        if not negative_prompt:
            return
        if not any(is_guided(one) for one in how):
            raise UsageError(
                "--negative-prompt: acts through guidance, and every --cond-scale is 1, which is "
                "none; give one above 1."
            )
        if self.runtime in EXPORTED:
            raise no_negative_prompt(f"--runtime {self.runtime}")

    def _encode(
        self, prompts: Sequence[str], negative_prompt: str | None
    ) -> tuple[Text, Text | None]:
        """The prompts, and the one that guidance leads away from."""
        if not negative_prompt:
            return self.encode(prompts), None
        text, negative = encode_groups(self.files[0], [prompts, [negative_prompt]])
        return text, negative

    def encode(self, prompts: Sequence[str]) -> Text:
        """See `encode`."""
        return encode(self.files[0], prompts)


def _once(say: Say) -> Say:
    """Says each sentence once: a stage is opened again for every group of pictures."""
    said: set[str] = set()

    def say_once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            say(sentence)

    return say_once
