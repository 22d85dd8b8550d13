"""A run's trained stages, from text to pictures."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.diffusion.guidance import branches
from imagen_scale.errors import UsageError, option
from imagen_scale.runs.inference import InferenceFile, check_one_encoder, read_stages
from imagen_scale.sampling.groups import Picture, stream_groups
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.prompts import Encoded, read_prompts
from imagen_scale.sampling.residents import Key, Residents
from imagen_scale.sampling.runtimes.contract import Say
from imagen_scale.sampling.runtimes.options import EXPORTED, RuntimeOptions
from imagen_scale.sampling.stage import Listener, Stage, default_device
from imagen_scale.sampling.tile_size import check_tile, smaller_tile
from imagen_scale.sampling.wanted import Wanted

MOST_REMEMBERED = 256


# Features of prompts, by the prompts of a group and the negative one.
Remembered = dict[tuple[tuple[str, ...], str | None], Encoded]


class TrainedStages:
    """Some stages of a run, in order; all of a cascade up to a U-Net, or one alone.

    Args:
        files: Their inference files.
        device: Where to compute; None takes the first GPU, else the CPU.
        runtime: What computes the U-Nets, and how.
        say: Told what "auto" chose and what was changed for want of memory.
        warn: Told what of a prompt is not read; None tells `say`.
        remembered: Prompts that were encoded already, by all that was encoded together; several
            may share it, if they are of one run. None encodes each time.
        residents: Holds stages and text encoder between calls; several may share it, one at a
            time. None frees them with the last picture of a call.
    """

    def __init__(
        self,
        files: list[InferenceFile],
        device: torch.device | None = None,
        runtime: RuntimeOptions = RuntimeOptions(runtime="torch"),  # noqa: B008  # immutable
        *,
        say: Say = lambda sentence: None,
        warn: Say | None = None,
        remembered: Remembered | None = None,
        residents: Residents | None = None,
    ) -> None:
        self.files, self.residents = files, residents
        self.device = device or default_device()
        self.runtime, self.say = runtime, once(say)
        self.warn = self.say if warn is None else once(warn)
        self.remembered = remembered
        self._checked: set[Key] = set()

    @classmethod
    def load(
        cls,
        run: str | Path,
        device: torch.device | None = None,
        runtime: RuntimeOptions = RuntimeOptions(runtime="torch"),  # noqa: B008  # immutable
        *,
        unet_limit: int | None = None,
        allow_unfinished: bool = False,
        say: Say = lambda sentence: None,
        warn: Say | None = None,
    ) -> "TrainedStages":
        """Opens the stages of a run; the weights are read when a stage is used.

        Args:
            run: The run's folder.
            device: As for `TrainedStages`, and so are `runtime`, `say` and `warn`.
            runtime: See there.
            unet_limit: Use only the first so many U-Nets.
            allow_unfinished: Accept stages whose training has not ended.
            say: See there.
            warn: See there.

        Raises:
            CheckpointError: Naming the stage that is missing, damaged or not trained to its end.
            UsageError: If `unet_limit` is out of range.
        """
        files = read_stages(Path(run), allow_unfinished, unet_limit)
        check_one_encoder(files)
        return cls(files, device, runtime, say=say, warn=warn)

    @property
    def configs(self) -> list[StageConfig]:
        """What each stage is."""
        return [file.stage for file in self.files]

    def stage(self, unet_number: int, *, tile: int | None = None, caches: bool = False) -> Stage:
        """Loads one stage; close it before the next.

        Args:
            unet_number: As the run counts, from 1.
            tile: Side of its tiles in pixels; None computes whole images.
            caches: Whether it is sampled with a `cache_interval` above 1.
        """
        (file,) = [file for file in self.files if file.unet_number == unet_number]
        return Stage(file, self.device, self.runtime, tile=tile, caches=caches, say=self.say)

    def settings(self, options: SamplingOptions) -> list[StageSettings]:
        """The settings of each stage.

        Raises:
            UsageError: Naming the option that is wrong.
        """
        settings = options.for_stages(self.configs)
        for stage in self.configs:
            if (tile := smaller_tile(stage, options.tile)) is not None:
                check_tile(stage, tile)
        if options.negative_prompt:
            check_negative(self.configs, settings)
        return settings

    def check_exports(self, settings: Sequence[StageSettings], tile: int | None) -> None:
        """Opens the exports that were asked for by name, without their graphs, and frees them.

        Else what is wrong with a later stage's would be found when those before it have worked.

        Args:
            settings: Of each stage.
            tile: Side of the tiles in pixels; None computes whole images.

        Raises:
            ImagenScaleError: If one is missing or damaged, or cannot do what is wanted of it.
        """
        if self.runtime.runtime not in EXPORTED:
            return
        for file, of_stage in zip(self.files, settings, strict=True):
            side, caches = smaller_tile(file.stage, tile), of_stage.caches
            key = Key.of(file, self.runtime, side, caches=caches)
            if key not in self._checked:
                self.stage(file.unet_number, tile=side, caches=caches).close()
                self._checked.add(key)

    def sample(
        self,
        prompts: Sequence[str],
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  # immutable
        listener: Listener = Listener(),  # noqa: B008  # immutable
    ) -> list[Tensor]:
        """Makes pictures from prompts and holds them all; see `stream` for many.

        Returns:
            Each stage's pictures, (P * num, 3, size, size) in [-1, 1]; those of one prompt
            stand together.
        """
        pictures = list(self.stream(prompts, options, listener))
        stages = zip(*(picture.stages for picture in pictures), strict=True)
        return [torch.stack(images) for images in stages]

    def stream(
        self,
        prompts: Sequence[str],
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  # immutable
        listener: Listener = Listener(),  # noqa: B008  # immutable
    ) -> Iterator[Picture]:
        """Makes pictures from prompts and gives each as soon as it is finished.

        `GROUP` pictures at a time go through all stages, which stay loaded as far as memory allows.

        Args:
            prompts: P captions.
            options: How.
            listener: Told of each step.

        Raises:
            EnvironmentProblem: If the device's memory is too small.
            UsageError: If an option is wrong; before any work.
        """
        settings = self.settings(options)
        wanted = [
            Wanted(prompt, options.seed + j) for prompt in prompts for j in range(options.num)
        ]
        return stream_groups(self, wanted, settings, options, listener)

    def encode(self, prompts: Sequence[str], negative_prompt: str | None = None) -> Encoded:
        """Encodes prompts as all stages take them; what is not read of them is told.

        Args:
            prompts: B captions; an empty one is no text at all.
            negative_prompt: What guidance leads away from.
        """
        encoded = self._encoded(prompts, negative_prompt)
        for note in encoded.notes:
            self.warn(note)
        return encoded

    def _encoded(self, prompts: Sequence[str], negative_prompt: str | None) -> Encoded:
        if self.remembered is None:
            return self._read(prompts, negative_prompt)
        key = (tuple(prompts), negative_prompt)
        if key not in self.remembered:
            if len(self.remembered) >= MOST_REMEMBERED:
                self.remembered.pop(next(iter(self.remembered)))
            self.remembered[key] = self._read(prompts, negative_prompt)
        return self.remembered[key]

    def _read(self, prompts: Sequence[str], negative_prompt: str | None) -> Encoded:
        lend = None
        if self.residents is not None:
            lend = partial(self.residents.lend_encoder, others=self.files)
        return read_prompts(self.files, prompts, negative_prompt, self.device, lend)


def check_negative(configs: Sequence[StageConfig], settings: Sequence[StageSettings]) -> None:
    """Refuses a negative prompt where no stage is guided.

    Raises:
        UsageError: With what to do instead.
    """
    if any("null" in branches(of_stage.cond_scale) for of_stage in settings):
        return
    remedy = f"every {option('cond_scale')} is 1, which is none; give one above 1."
    for few in filter(None, (config.few_steps for config in configs)):
        remedy = f"that of few steps is built in; sample the teacher {few.teacher}."
    raise UsageError(f"{option('negative_prompt')}: acts through guidance, and {remedy}")


def once(say: Say) -> Say:
    """Says each sentence once: a stage is opened again for every group of pictures."""
    said: set[str] = set()

    def say_once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            say(sentence)

    return say_once
