"""One trained U-Net, sampled."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.data.seeds import seeded
from imagen_scale.diffusion.caching import DeepCache
from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.guidance import guided_times
from imagen_scale.diffusion.lowres import enlarge
from imagen_scale.diffusion.sampler import sample
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.diffusion.thresholding import into_range
from imagen_scale.diffusion.tiles import Tile, TiledDenoiser
from imagen_scale.errors import EnvironmentProblem, UsageError, option
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.runtimes.contract import Conditioning, Say, Text
from imagen_scale.sampling.runtimes.opening import open_runtime
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage_schedule import stage_schedule
from imagen_scale.sampling.tile_size import check_tile

# Told the U-Net's number, steps done, steps in all.
OnStep = Callable[[int, int, int], None]
# Told the U-Net's number, steps done, steps in all, and the clean pictures that the step predicts:
# (B, 3, H, W) in [-1, 1] on the CPU, the listener's own. The last step's are the result.
OnEstimate = Callable[[int, int, int, Tensor], None]

# Of one set of pictures, by the first row and column of each tile.
Caches = defaultdict[tuple[int, int], DeepCache]

# Pixels computed at once unless the caller says otherwise: 64 pictures of 64 px, one of 1024.
PIXELS_AT_ONCE = 2**18


class Listener(NamedTuple):
    """Who is told of each step; what is made does not depend on it."""

    on_step: OnStep | None = None
    on_estimate: OnEstimate | None = None

    def tell(self, unet_number: int, step: int, steps: int, x_0: Tensor) -> None:
        """A step is done."""
        if self.on_step is not None:
            self.on_step(unet_number, step, steps)
        if self.on_estimate is not None:  # a copy: the sampler still needs its own
            self.on_estimate(unet_number, step, steps, x_0.clamp(-1, 1).cpu())


class Inputs(NamedTuple):
    """What a stage makes B pictures from."""

    text: Text
    seeds: Sequence[int]
    lowres: Tensor | None = None  # of the stage before, (B, 3, h, w) in [-1, 1]; from U-Net 2 on
    negative: Text | None = None  # one prompt that guidance leads away from
    cond_scales: Sequence[float] | None = None  # of each picture; None: as the settings say

    def part(self, start: int, end: int) -> "Inputs":
        """Some of the pictures."""
        part = slice(start, end)
        return self._replace(
            text=Text(self.text.embeds[part], self.text.mask[part]),
            seeds=self.seeds[part],
            lowres=None if self.lowres is None else self.lowres[part],
            cond_scales=None if self.cond_scales is None else self.cond_scales[part],
        )


class Stage:
    """One trained U-Net, loaded from its inference file.

    Args:
        file: The inference file.
        device: Where to compute.
        runtime: What computes the U-Net, and how.
        tile: Side of the tiles of a super-resolution stage in pixels; None computes whole images.
        caches: Whether some evaluations are to reuse what others found (`cache_interval`).
        say: Told what "auto" chose and what was changed for want of memory.

    Raises:
        UsageError: If the tile does not fit the network.
        ImagenScaleError: If the runtime cannot be used.
    """

    def __init__(
        self,
        file: InferenceFile,
        device: torch.device,
        runtime: RuntimeOptions = RuntimeOptions(runtime="torch"),  # noqa: B008  # immutable
        *,
        tile: int | None = None,
        caches: bool = False,
        say: Say = lambda sentence: None,
    ) -> None:
        self.file, self.config, self.device = file, file.stage, device
        self.divisor = self.config.unet.size_divisor
        if tile is not None:
            check_tile(self.config, tile)
        self.tile = tile if self.config.is_super_resolution else None
        self.schedule = stage_schedule(self.config).to(device)
        self.runtime = open_runtime(file, device, runtime, side=self.tile, caches=caches, say=say)

    def close(self) -> None:
        """Frees the network, before the next one is loaded."""
        self.runtime.close()

    def sample(
        self,
        inputs: Inputs,
        settings: StageSettings = StageSettings(),  # noqa: B008  # immutable
        *,
        at_once: int | None = None,
        listener: Listener = Listener(),  # noqa: B008  # immutable
    ) -> Tensor:
        """Samples this stage.

        Each image draws its noise from a generator of its own, on the CPU, so a picture depends
        on its prompt and seed alone: not on the other prompts of the call, nor on the device.

        Args:
            inputs: What to make.
            settings: How.
            at_once: Images computed together; None takes `PIXELS_AT_ONCE`.
            listener: Told of each step.

        Returns:
            (B, 3, size, size) in [-1, 1] on the CPU.
        """
        return torch.cat(list(self.parts(inputs, settings, at_once=at_once, listener=listener)))

    def batch_size(self, asked: int | None = None) -> int:
        """Images computed together: as many as asked for, as `PIXELS_AT_ONCE`, as the runtime."""
        at_once = asked or max(1, PIXELS_AT_ONCE // self.config.size**2)
        most = self.runtime.max_batch
        return at_once if most is None else min(at_once, most)

    @torch.no_grad()
    def parts(
        self,
        inputs: Inputs,
        settings: StageSettings,
        *,
        at_once: int | None = None,
        listener: Listener = Listener(),  # noqa: B008  # immutable
    ) -> Iterator[Tensor]:
        """`sample`, a few images at a time, in order."""
        size, at_once = self.config.size, self.batch_size(at_once)
        for start in range(0, len(inputs.seeds), at_once):
            part = inputs.part(start, start + at_once)
            yield self._sample_part(part, settings, (size, size), self.tile, listener)

    @torch.no_grad()
    def upscale(
        self,
        picture: Tensor,
        text: Text,
        seed: int,
        settings: StageSettings,
        listener: Listener = Listener(),  # noqa: B008  # immutable
    ) -> Tensor:
        """Enlarges one picture of any size and shape by this stage's factor.

        It is computed in tiles as large as the stage's own pictures, unless the stage was
        given another.

        Args:
            picture: (3, h, w) in [-1, 1].
            text: One encoded prompt.
            seed: Same seed, same picture.
            settings: How to sample.
            listener: Told of each step.

        Returns:
            (3, h * factor, w * factor) in [-1, 1] on the CPU.

        Raises:
            UsageError: If this is not a super-resolution stage.
        """
        smaller, size = self.config.small_size, self.config.size
        if smaller is None:
            raise UsageError("U-Net 1 makes pictures from text; super-resolution begins at 2.")
        tile = self.tile or size
        height, width = (round(side * size / smaller) for side in picture.shape[-2:])
        enlarged = enlarge(picture[None].to(self.device), height, width)
        # The network's strides want whole multiples, and a tile wants to be full.
        below, right = (
            max(tile, math.ceil(side / self.divisor) * self.divisor) - side
            for side in (height, width)
        )
        padded = F.pad(enlarged, (0, right, 0, below), mode="replicate")
        inputs = Inputs(text, [seed], padded)
        sides = (height + below, width + right)
        image = self._sample_part(inputs, settings, sides, tile, listener)
        return image[0, :, :height, :width]

    def conditioning(
        self, inputs: Inputs, cond_scale: float, draw_noise: Callable[[], Tensor]
    ) -> Conditioning:
        """What the network is told beside x_t; low-resolution pictures get their noise here.

        Args:
            inputs: Of this stage; `lowres` has its size or is enlarged to it.
            cond_scale: Guidance, where the pictures have none of their own.
            draw_noise: Gives standard normal noise of the pictures' shape.

        Raises:
            UsageError: If it needs low-resolution pictures and there are none.
        """
        scales = inputs.cond_scales or [cond_scale]
        are_equal = len(set(scales)) == 1
        guidance = scales[0] if are_equal else torch.tensor(scales, dtype=torch.float32)
        cond = Conditioning(inputs.text, guidance, negative=inputs.negative)
        if not self.config.is_super_resolution:
            return cond
        if inputs.lowres is None:
            raise UsageError(f"{self.config.name} needs the pictures of the stage before it.")
        noise = draw_noise()
        lowres = enlarge(inputs.lowres.to(self.device), *noise.shape[-2:])
        time = self.schedule.level_to_time(self.config.imagen.lowres_sample_noise_level)
        lowres_t = torch.full((len(inputs.seeds),), time, device=self.device)
        return cond._replace(
            lowres_img=self.schedule.q_sample(lowres, lowres_t, noise),
            lowres_t=lowres_t,
            base=lowres if self.config.unet.lowres_residual else None,
        )

    def _sample_part(
        self,
        inputs: Inputs,
        settings: StageSettings,
        sides: tuple[int, int],
        tile: int | None,
        listener: Listener,
    ) -> Tensor:
        """Samples images (B, 3, *sides)."""
        imagen, number = self.config.imagen, self.config.number
        shape = (imagen.channels, *sides)
        draw_noise = noise_source("sample", self.config, inputs.seeds, shape, self.device)
        cond = self.conditioning(inputs, settings.cond_scale, draw_noise)
        times = visited_times(self.schedule, settings.steps, settings.spacing)
        caches = None
        if settings.caches:
            caches = Caches(partial(DeepCache, settings.cache_interval))
        denoiser, denoiser_at = denoiser_of(self, cond, sides, tile, caches), None
        if settings.guidance_interval and len(cond.branches) == 2:
            plain = denoiser_of(self, cond.unguided, sides, tile, caches)
            guided = guided_times(times, settings.guidance_interval)
            denoiser_at = lambda time: denoiser if time in guided else plain  # noqa: E731
        return solved(
            self, denoiser, draw_noise(), times, settings, draw_noise,
            on_step=lambda step, x_0: listener.tell(number, step, len(times), x_0),
            denoiser_at=denoiser_at,
        )  # fmt: skip


def solved(
    stage: Stage,
    denoiser: Denoiser,
    x_t: Tensor,
    times: Sequence[int],
    settings: StageSettings,
    draw_noise: Callable[[], Tensor],
    on_step: Callable[[int, Tensor], None] | None = None,
    denoiser_at: Callable[[int], Denoiser] | None = None,
) -> Tensor:
    """Runs a stage's reverse process; see `sample`.

    Returns:
        Images of x_t's shape in [-1, 1] on the CPU.

    Raises:
        EnvironmentProblem: If what was computed is not finite.
    """
    made = sample(
        denoiser,
        x_t,
        stage.schedule,
        times=times,
        sampler=settings.sampler,
        eta=settings.eta,
        threshold=thresholding(stage.config, settings.threshold),
        draw_noise=draw_noise,
        on_step=on_step,
        denoiser_at=denoiser_at,
    ).cpu()
    if not made.isfinite().all():  # it would be drawn black, without a word
        raise EnvironmentProblem(
            f"{stage.config.name}: {stage.runtime.name} computed numbers that are not finite. "
            f"Take {option('precision')} fp32, or another {option('runtime')}; where that is "
            f"no help, the weights are to blame."
        )
    return made


def noise_source(
    purpose: str, stage: StageConfig, seeds: Sequence[int], shape: Sequence[int],
    device: torch.device,
) -> Callable[[], Tensor]:  # fmt: skip
    """Gives standard normal noise of some images at each call, (B, *shape) on a device.

    Each image has a generator of its own, on the CPU.

    Args:
        purpose: Keeps the noise of one use apart from that of another.
        stage: Of the images.
        seeds: One for each image.
        shape: Of one.
        device: Where it is wanted.
    """
    generators = [
        torch.Generator().manual_seed(seeded(purpose, stage.number, seed)) for seed in seeds
    ]

    def draw_noise() -> Tensor:
        noise = [torch.randn(tuple(shape), generator=generator) for generator in generators]
        return torch.stack(noise).to(device)

    return draw_noise


def denoiser_of(
    stage: Stage,
    cond: Conditioning,
    sides: tuple[int, int],
    tile: int | None = None,
    caches: Caches | None = None,
) -> Denoiser:
    """The stage's network with its conditioning, in tiles where pictures are larger than one."""
    if tile is None or cond.lowres_img is None or max(sides) <= tile:
        return stage.runtime.bind(cond, None if caches is None else caches[0, 0])

    def bind(window: Tile) -> Denoiser:
        lowres, base = (
            None if images is None else window.of(images).contiguous()
            for images in (cond.lowres_img, cond.base)
        )
        cache = None if caches is None else caches[window.rows.start, window.columns.start]
        denoiser = stage.runtime.bind(cond._replace(lowres_img=lowres, base=base), cache)
        return lambda x_t, t: denoiser(x_t.contiguous(), t)

    return TiledDenoiser(
        bind, tile=tile, divisor=stage.divisor,
        of_numpy=lambda weights: torch.from_numpy(weights).to(stage.device, torch.float32),
    )  # fmt: skip


def thresholding(stage: StageConfig, percentile: float | None) -> Callable[[Tensor], Tensor]:
    """What is done to a predicted clean picture.

    What a stage of few steps predicts before its last one is no picture, but leads to where the
    next step begins.

    Args:
        stage: That predicts it.
        percentile: Of dynamic thresholding, where it is asked for; None takes the stage's own way.
    """
    if percentile is None and stage.few_steps is not None:
        return lambda x_0: x_0
    chosen = percentile or stage.threshold
    return lambda x_0: into_range(x_0, chosen)


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def out_of_memory(device: torch.device) -> EnvironmentProblem:
    """What to do when not even one pass fits."""
    return EnvironmentProblem(
        f"{device}: its memory is too small. Make fewer pictures at once ({option('at_once')} 1), "
        f"compute large ones in tiles ({option('tile')} 256), or take {option('precision')} bf16."
    )
