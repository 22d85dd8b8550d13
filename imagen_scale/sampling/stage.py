"""One trained U-Net, sampled."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_scale.data.seeds import seeded
from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.guidance import dynamic_threshold
from imagen_scale.diffusion.lowres import enlarge, resize
from imagen_scale.diffusion.sampler import sample
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.diffusion.tiles import Tile, TiledDenoiser
from imagen_scale.errors import EnvironmentProblem, UsageError
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.contract import Options, RuntimeName, Say, Text
from imagen_scale.sampling.runtimes.opening import open_runtime
from imagen_scale.sampling.settings import Settings

OnStep = Callable[[int, int, int], None]  # U-Net number, steps done, steps in all
# The same, and the clean pictures that the step predicts: (B, 3, H, W) in [-1, 1] on the CPU, the
# listener's own. The last step's are the result.
OnEstimate = Callable[[int, int, int, Tensor], None]

# Pixels computed at once unless the caller says otherwise: 64 pictures of 64 px, one of 1024.
PIXELS_AT_ONCE = 2**18


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
        self.file, self.config, self.device = file, file.stage, device
        self.image_size, self.divisor = self.config.size, self.config.unet.size_divisor
        if tile is not None and (tile < 1 or tile % self.divisor):
            raise UsageError(
                f"--tile {tile}: U-Net {file.unet_number} takes tiles in multiples of "
                f"{self.divisor} px."
            )
        self.tile = tile if file.unet_number > 1 else None
        self.schedule = NoiseSchedule.linear(self.config.timesteps)
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
        smaller = self.config.small_size
        assert smaller is not None
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


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def out_of_memory(device: torch.device) -> EnvironmentProblem:
    """What to do when not even one pass fits."""
    return EnvironmentProblem(
        f"{device}: its memory is too small. Make fewer pictures at once (--at-once 1), compute "
        f"large ones in tiles (--tile 256), or take --precision bf16."
    )
