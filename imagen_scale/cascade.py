"""Sampling: a trained cascade from text to pictures, one stage in memory at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_scale.checkpoint import InferenceFile, inference_path, read_inference
from imagen_scale.data.dataset import seeded
from imagen_scale.data.text import (
    MAX_TOKENS,
    Embedding,
    TextEncoder,
    encoder_fingerprint,
    encoder_folder,
    pad_embeddings,
)
from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.guidance import dynamic_threshold
from imagen_scale.diffusion.lowres import enlarge, resize
from imagen_scale.diffusion.sampler import Sampler, sample
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.spacing import Spacing, visited_times
from imagen_scale.diffusion.tiles import Tile, TiledDenoiser
from imagen_scale.errors import CheckpointError, EnvironmentProblem, UsageError
from imagen_scale.runtimes import (
    EXPORTED,
    Options,
    RuntimeName,
    Say,
    no_negative_prompt,
    open_runtime,
)
from imagen_scale.runtimes import Text as Text

OnStep = Callable[[int, int, int], None]  # U-Net number, steps done, steps in all
# The same, and the clean pictures that the step predicts: (B, 3, H, W) in [-1, 1] on the CPU, the
# listener's own. The last step's are the result.
OnEstimate = Callable[[int, int, int, Tensor], None]

# Pixels computed at once unless the caller says otherwise: 64 pictures of 64 px, one of 1024.
PIXELS_AT_ONCE = 2**18
# Pictures that go through the cascade together: what is held of them is bounded, and a stage's
# weights are read once for so many.
GROUP = 64


class Settings(NamedTuple):
    """How one stage is sampled."""

    steps: int = 25
    cond_scale: float = 1.0
    sampler: Sampler = "dpmpp_2m"
    spacing: Spacing = "trailing"
    eta: float = 0.0  # "ddim" only
    threshold: float | None = None  # percentile in (0, 1]; None takes the configuration's


DEFAULTS = Settings()


def is_guided(how: Settings) -> bool:
    """Whether a stage computes more than the branch with the text."""
    return how.cond_scale != 1


class Stage:
    """One trained U-Net, loaded from its inference file.

    Args:
        file: The inference file.
        device: Where to compute.
        runtime: What computes the U-Net.
        options: How.
        tile: Side of the tiles of a super-resolution stage in pixels; None computes whole images.
        negative: Whether it must take a negative prompt.
        say: Told what "auto" chose and what was changed for want of memory.

    Raises:
        UsageError: If the tile does not fit the network.
        ImagenScaleError: If the runtime cannot be used.
    """

    def __init__(
        self,
        file: InferenceFile,
        device: torch.device,
        *,
        runtime: RuntimeName = "torch",
        options: Options = Options(),  # noqa: B008  # immutable
        tile: int | None = None,
        negative: bool = False,
        say: Say = lambda sentence: None,
    ) -> None:
        config, index = file.config, file.unet_number - 1
        self.file, self.device = file, device
        self.image_size = config.imagen.image_sizes[index]
        self.divisor = config.unets[index].size_divisor
        if tile is not None and (tile < 1 or tile % self.divisor):
            raise UsageError(
                f"--tile {tile}: U-Net {file.unet_number} takes tiles in multiples of "
                f"{self.divisor} px."
            )
        self.tile = tile if file.unet_number > 1 else None
        self.schedule = NoiseSchedule.linear(config.per_unet("imagen", "timesteps", index))
        self.schedule = self.schedule.to(device)
        self.runtime = open_runtime(
            runtime, file, device=device, options=options, side=self.tile, negative=negative,
            say=say,
        )  # fmt: skip

    def close(self) -> None:
        """Frees the network, before the next one is loaded."""
        self.runtime.close()

    def sample(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        lowres: Tensor | None = None,
        lowres_noise_level: float | None = None,
        at_once: int | None = None,
        on_step: OnStep | None = None,
        on_estimate: OnEstimate | None = None,
        negative: Text | None = None,
        **settings: Any,
    ) -> Tensor:
        """Samples this stage.

        Each image draws its noise from a generator of its own, on the CPU, so a picture depends
        on its prompt and seed alone: not on the other prompts of the call, nor on the device.

        Args:
            text: Encoded prompts of B images.
            seeds: One per image.
            lowres: Pictures of the stage before, (B, 3, h, w) in [-1, 1]; needed from U-Net 2 on.
            lowres_noise_level: Noise put on `lowres`, in [0, 1); None takes the configuration's.
            at_once: Images computed together; None takes `PIXELS_AT_ONCE`.
            on_step: Told of each step.
            on_estimate: Told of each step and of the pictures as they are expected there.
            negative: One encoded prompt that guidance leads away from, or None.
            settings: Fields of `Settings`.

        Returns:
            (B, 3, size, size) in [-1, 1] on the CPU.
        """
        parts = self.parts(
            text, seeds, Settings(**settings), lowres=lowres,
            lowres_noise_level=lowres_noise_level, at_once=at_once, on_step=on_step,
            on_estimate=on_estimate, negative=negative,
        )  # fmt: skip
        return torch.cat(list(parts))

    @torch.no_grad()
    def parts(
        self,
        text: Text,
        seeds: Sequence[int],
        settings: Settings,
        *,
        lowres: Tensor | None = None,
        lowres_noise_level: float | None = None,
        at_once: int | None = None,
        on_step: OnStep | None = None,
        on_estimate: OnEstimate | None = None,
        negative: Text | None = None,
    ) -> Iterator[Tensor]:
        """`sample`, a few images at a time, in order."""
        at_once = at_once or max(1, PIXELS_AT_ONCE // self.image_size**2)
        if self.runtime.max_batch is not None:
            at_once = min(at_once, self.runtime.max_batch)
        side = (self.image_size, self.image_size)
        for start in range(0, len(seeds), at_once):
            part = slice(start, start + at_once)
            enlarged = None
            if lowres is not None:
                enlarged = resize(lowres[part].to(self.device), self.image_size)
            yield self._draw(
                Text(text.embeds[part], text.mask[part]), seeds[part], settings, side,
                enlarged, lowres_noise_level, on_step, on_estimate, negative,
            )  # fmt: skip

    @torch.no_grad()
    def upscale(
        self,
        text: Text,
        seed: int,
        picture: Tensor,
        settings: Settings,
        *,
        lowres_noise_level: float | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Enlarges one picture of any size and shape by this stage's factor.

        It is computed in tiles of the size that the network was trained at, unless the stage was
        given another.

        Args:
            text: One encoded prompt.
            seed: Same seed, same picture.
            picture: (3, h, w) in [-1, 1].
            settings: How to sample.
            lowres_noise_level: As for `sample`.
            on_step: Told of each step.

        Returns:
            (3, h * factor, w * factor) in [-1, 1] on the CPU.

        Raises:
            UsageError: If this is not a super-resolution stage.
        """
        number = self.file.unet_number
        if number == 1:
            raise UsageError("U-Net 1 makes pictures from text; super-resolution begins at 2.")
        self.tile = self.tile or self.image_size
        smaller = self.file.config.imagen.image_sizes[number - 2]
        height, width = (round(s * self.image_size / smaller) for s in picture.shape[-2:])
        enlarged = enlarge(picture[None].to(self.device), height, width)
        # The network's strides want whole multiples, and a tile wants to be full.
        below, right = (
            max(self.tile, math.ceil(side / self.divisor) * self.divisor) - side
            for side in (height, width)
        )
        padded = F.pad(enlarged, (0, right, 0, below), mode="replicate")
        image = self._draw(
            text, [seed], settings, (height + below, width + right),
            padded, lowres_noise_level, on_step,
        )  # fmt: skip
        return image[0, :, :height, :width]

    def _draw(
        self,
        text: Text,
        seeds: Sequence[int],
        settings: Settings,
        side: tuple[int, int],
        enlarged: Tensor | None,
        lowres_noise_level: float | None,
        on_step: OnStep | None,
        on_estimate: OnEstimate | None = None,
        negative: Text | None = None,
    ) -> Tensor:
        """Samples images (B, 3, *side), given the low-resolution pictures at that size."""
        imagen, number = self.file.config.imagen, self.file.unet_number
        generators = [
            torch.Generator().manual_seed(seeded("sample", number, seed)) for seed in seeds
        ]

        def draw_noise() -> Tensor:
            shape = (imagen.channels, *side)
            noise = [torch.randn(shape, generator=generator) for generator in generators]
            return torch.stack(noise).to(self.device)

        lowres_img = lowres_t = None
        if number > 1:
            if enlarged is None:
                raise UsageError(f"U-Net {number} needs the pictures of the stage before it.")
            if lowres_noise_level is None:
                lowres_noise_level = imagen.lowres_sample_noise_level
            time = self.schedule.level_to_time(lowres_noise_level)
            lowres_t = torch.full((len(seeds),), time, device=self.device)
            lowres_img = self.schedule.q_sample(enlarged, lowres_t, draw_noise())

        percentile = settings.threshold or imagen.dynamic_thresholding_percentile
        times = visited_times(self.schedule, settings.steps, settings.spacing)

        def tell(step: int, x_0: Tensor) -> None:
            if on_step is not None:
                on_step(number, step, len(times))
            if on_estimate is not None:  # a copy: the sampler still needs its own
                on_estimate(number, step, len(times), x_0.clamp(-1, 1).cpu())

        images = sample(
            self._denoiser(text, settings.cond_scale, lowres_img, lowres_t, side, negative),
            draw_noise(),
            self.schedule,
            times=times,
            sampler=settings.sampler,
            eta=settings.eta,
            threshold=lambda x_0: dynamic_threshold(x_0, percentile),
            draw_noise=draw_noise,
            on_step=tell,
        )
        return images.cpu()

    def _denoiser(
        self,
        text: Text,
        cond_scale: float,
        lowres_img: Tensor | None,
        lowres_t: Tensor | None,
        side: tuple[int, int],
        negative: Text | None,
    ) -> Denoiser:
        if self.tile is None or lowres_img is None or max(side) <= self.tile:
            return self.runtime.bind(
                text, cond_scale=cond_scale, lowres_img=lowres_img, lowres_t=lowres_t,
                negative=negative,
            )  # fmt: skip

        def bind(tile: Tile) -> Denoiser:
            return self.runtime.bind(
                text,
                cond_scale=cond_scale,
                lowres_img=tile.of(lowres_img).contiguous(),
                lowres_t=lowres_t,
                negative=negative,
            )

        return TiledDenoiser(bind, tile=self.tile, divisor=self.divisor)


class Picture(NamedTuple):
    """One finished picture of a cascade."""

    prompt: str
    seed: int
    stages: list[Tensor]  # of each stage, (3, size, size) in [-1, 1]
    runtimes: list[str]  # what computed each stage


class Cascade:
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
    ) -> "Cascade":
        """Opens the stages of a run; the weights are read when a stage is used.

        Args:
            run: The run's folder.
            unet_limit: Use only the first so many U-Nets.
            allow_unfinished: Accept stages whose training has not ended.
            device: As for `Cascade`.
            how: `runtime`, `options` and `say` of `Cascade`.

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
        size = self.files[unet_number - 1].config.imagen.image_sizes[unet_number - 1]
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


def encode(file: InferenceFile, prompts: Sequence[str]) -> Text:
    """See `encode_groups`, of one group."""
    return encode_groups(file, [prompts])[0]


def encode_groups(file: InferenceFile, groups: Sequence[Sequence[str]]) -> list[Text]:
    """Encodes prompts with the encoder of training; it is freed before a stage is loaded.

    What stands beside a prompt in its batch may move the last bits of its features, so the groups
    are encoded one after the other: the later ones leave those before them as they are.

    Raises:
        CheckpointError: If the encoder at hand is not the one of training.
    """
    name = file.config.text_encoder
    folder = encoder_folder(name)
    if encoder_fingerprint(folder) != file.text_fingerprint:
        raise CheckpointError(
            f"{file.path}: trained with another version of the text encoder {name!r} than the "
            f"one in {folder}. Put the original files back, or train again."
        )
    encoder, together = TextEncoder(folder), file.config.text.batch_size
    found: dict[str, Embedding] = {}
    for prompts in groups:
        unique = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        for start in range(0, len(unique), together):
            some = unique[start : start + together]
            found |= dict(zip(some, encoder.encode(some), strict=True))
    return [
        Text(*pad_embeddings([found[prompt] for prompt in prompts], MAX_TOKENS))
        for prompts in groups
    ]


def read_stage(run: Path, unet_number: int, allow_unfinished: bool) -> InferenceFile:
    """The header of one stage's inference file, checked."""
    path = inference_path(run, unet_number)
    if not path.is_file():
        raise CheckpointError(
            f"{run}: U-Net {unet_number} is not trained yet ({path} does not exist). Train it "
            f"with `deepspeed launch/train.py --unet {unet_number} --config ...`"
            + (f", or sample the earlier stages with --unet-limit {unet_number - 1}."
               if unet_number > 1 else ".")
        )  # fmt: skip
    file = read_inference(path)
    if not (file.is_finished or allow_unfinished):
        raise CheckpointError(
            f"{run}: U-Net {unet_number} is half-trained ({file.step} of {file.steps} steps). "
            f"Run the training command again to finish it, or sample it as it is with "
            f"--allow-unfinished."
        )
    return file


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_uint8(images: Tensor) -> Any:
    """Images in [-1, 1], (B, 3, H, W), as a NumPy array (B, H, W, 3) uint8."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def out_of_memory(device: torch.device) -> EnvironmentProblem:
    """What to do when not even one pass fits."""
    return EnvironmentProblem(
        f"{device}: its memory is too small. Make fewer pictures at once (--at-once 1), compute "
        f"large ones in tiles (--tile 256), or take --precision bf16."
    )


def _each(option: str, value: Any, stages: int) -> list[Any]:
    """One value per stage."""
    values = [value] * stages if value is None or isinstance(value, str | int | float) else value
    if len(values) != stages:
        raise UsageError(
            f"{option}: {len(values)} values for {stages} stage(s). Give one per stage, separated "
            f"by commas, or a single one."
        )
    return list(values)


def _once(say: Say) -> Say:
    """Says each sentence once: a stage is opened again for every group of pictures."""
    said: set[str] = set()

    def say_once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            say(sentence)

    return say_once
