"""What one training step computes for a batch: noise in, loss out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.data.seeds import seeded
from imagen_scale.data.sequence import Batch
from imagen_scale.diffusion.loss import image_loss, loss_factors
from imagen_scale.diffusion.lowres import resize, shrink_and_enlarge
from imagen_scale.diffusion.prediction_error import x_0_errors
from imagen_scale.files.pictures import from_uint8
from imagen_scale.sampling.stage_schedule import stage_schedule
from imagen_scale.training.times import stratified_time


class Draws(NamedTuple):
    """Every random number that a batch needs, (B, ...) each."""

    t: Tensor  # times, int64
    eps: Tensor  # noise, (B, C, H, W)
    keep_mask: Tensor  # False where the caption is dropped
    lowres_t: Tensor  # times of the noise on the low-resolution image, int64
    lowres_eps: Tensor | None  # that noise, (B, C, H, W); super-resolution only
    corners: Tensor | None  # top and left of the crops, (B, 2) int64; `unets[i].crop` only


TRAINING = "train"  # keeps the random numbers of a step apart from those of validation


class Losses(NamedTuple):
    """What a batch of B samples cost."""

    values: Tensor  # (B,) float32
    t: Tensor  # times of the samples, (B,) int64


class Objective:
    """The loss of one U-Net.

    Each sample's random numbers are a function of the seed and of its position in the run alone.
    So two ranks together compute what one computes, a resumed run repeats nothing and misses
    nothing, and no generator state needs saving.

    Args:
        stage: The U-Net.
        device: Where the batches are computed.
    """

    def __init__(self, stage: StageConfig, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.pred_type, self.crop = stage.unet.pred_type, stage.unet.crop
        self.schedule = stage_schedule(stage).to(device)
        self.factors = None  # of the loss at each time
        if stage.loss_weight is not None:
            self.factors = loss_factors(self.schedule, self.pred_type, stage.loss_weight)
        self.lowres_times = max(1, round(stage.timesteps * stage.training.lowres_aug_max))

    def loss(self, unet: Callable[..., Tensor], batch: Batch, purpose: str = TRAINING) -> Tensor:
        """Mean loss over a batch, a float32 scalar; see `losses`."""
        return self.losses(unet, batch, purpose).mean()

    def losses(self, unet: Callable[..., Tensor], batch: Batch, purpose: str = TRAINING) -> Tensor:
        """Loss of each sample of a batch, (B,) float32; see `timed_losses`."""
        return self.timed_losses(unet, batch, purpose).values

    def timed_losses(
        self, unet: Callable[..., Tensor], batch: Batch, purpose: str = "train"
    ) -> Losses:
        """Loss of each sample of a batch, with the time at which it was taken.

        Args:
            unet: The network, or the engine around it.
            batch: On any device.
            purpose: Keeps the random numbers of validation apart from those of training.
        """
        draws = self.draw(batch.positions, batch.images.shape[1:], purpose)
        x_0, lowres_img = self._pictures(batch, draws)
        x_t = self.schedule.q_sample(x_0, draws.t, draws.eps)
        x_0, eps = self.learned(batch, draws, x_0, lowres_img, x_t)
        prediction = self._bound(unet, batch, draws, lowres_img)(x_t, draws.t)
        target = self.schedule.target(self.pred_type, x_0, draws.t, eps)
        if self.stage.unet.lowres_residual and lowres_img is not None:
            target = target - lowres_img  # enlarged, without the noise; sampling adds it again
        losses = image_loss(prediction, target, self.stage.imagen.loss_type)
        if self.factors is not None:
            losses = losses * self.factors[draws.t]
        return Losses(losses, draws.t)

    def x_0_errors(self, unet: Callable[..., Tensor], batch: Batch, purpose: str) -> Tensor:
        """Squared error of the predicted clean pictures at each of `LOG_SNRS`, (B, 12) float32.

        With their captions, and low-resolution pictures as noisy as sampling makes them: what
        `imagen-scale evaluate` measures of a finished stage. For the arguments see `timed_losses`.
        """
        draws = self.draw(batch.positions, batch.images.shape[1:], purpose)
        level = self.schedule.level_to_time(self.stage.imagen.lowres_sample_noise_level)
        draws = draws._replace(
            keep_mask=torch.ones_like(draws.keep_mask),
            lowres_t=torch.full_like(draws.lowres_t, level),
        )
        x_0, lowres_img = self._pictures(batch, draws)
        predict = self._bound(unet, batch, draws, lowres_img)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            prediction = predict(x_t, t).float()
            found = self.schedule.predicted_x_0(self.pred_type, x_t, t, prediction)
            if self.stage.unet.lowres_residual and lowres_img is not None:
                return found + lowres_img
            return found

        return x_0_errors(denoise, self.schedule, x_0, lambda: draws.eps)

    def learned(
        self, batch: Batch, draws: Draws, x_0: Tensor, lowres_img: Tensor | None, x_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What x_t is to be taken apart into: a clean picture and noise, (B, C, H, W) each.

        Here what it was made from. Called before the network runs.

        Args:
            batch: The samples.
            draws: Their random numbers.
            x_0: Their pictures.
            lowres_img: These shrunk and enlarged, for super-resolution.
            x_t: The noisy pictures.
        """
        return x_0, draws.eps

    def _pictures(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Clean pictures (B, C, H, W) and, for super-resolution, them shrunk and enlarged.

        Or what stands for them made small, enlarged: `training.lowres_degrade`, `lowres_samples`.
        """
        x_0 = _as_floats(_at(self.device, batch.images))
        if self.stage.small_size is None:
            return x_0, None
        lowres_img = shrink_and_enlarge(x_0, self.stage.small_size)
        if batch.lowres is not None and batch.has_lowres is not None:
            others = resize(_as_floats(_at(self.device, batch.lowres)), self.stage.size)
            has = _at(self.device, batch.has_lowres)
            lowres_img = torch.where(has[:, None, None, None], others, lowres_img)
        if self.crop is not None and draws.corners is not None:
            # The same window of both, cut after shrinking: its borders are the whole picture's.
            x_0 = crop_at(x_0, draws.corners, self.crop)
            lowres_img = crop_at(lowres_img, draws.corners, self.crop)
        return x_0, lowres_img

    def _bound(
        self, unet: Callable[..., Tensor], batch: Batch, draws: Draws, lowres_img: Tensor | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The network with all but the noisy pictures (B, C, H, W) and their times (B,) given."""
        lowres: tuple[Tensor, ...] = ()
        if lowres_img is not None:
            noised, lowres_t = self._lowres(draws, lowres_img)
            lowres = (self._laid_out(noised), lowres_t)
        text = self._text(batch)
        return lambda x_t, t: unet(self._laid_out(x_t), t, *text, draws.keep_mask, *lowres)

    def _lowres(self, draws: Draws, lowres_img: Tensor) -> tuple[Tensor, Tensor]:
        """The low-resolution picture, normalised and then noised as in sampling; and the time."""
        assert draws.lowres_eps is not None
        noised = self.schedule.q_sample(lowres_img, draws.lowres_t, draws.lowres_eps)
        return noised, draws.lowres_t

    def _laid_out(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in the layout in which the network computes."""
        is_last = self.stage.training.channels_last
        return images.contiguous(memory_format=torch.channels_last) if is_last else images

    def _text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, L, D) float32 and mask (B, L) on the device."""
        embeds, mask = (
            _at(self.device, batch.text_embeds).float(),
            _at(self.device, batch.text_mask),
        )
        if self.stage.training.compile:  # one shape for all batches, or each is compiled for
            missing = self.stage.unet.max_text_len - mask.shape[1]
            embeds, mask = F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        return embeds, mask

    def draw(self, positions: Tensor, shape: torch.Size, purpose: str) -> Draws:
        """Random numbers of the samples at `positions`, (B,) on the host, for such a `shape`."""
        if self.crop is not None:
            shape = torch.Size((shape[0], self.crop, self.crop))
        samples = [self._draw_one(position, shape, purpose) for position in positions.tolist()]
        t, eps, keep_mask, lowres_t, lowres_eps, corners = zip(*samples, strict=True)
        times = torch.stack(t)
        # A validation takes another number of samples: of a step's strata it would see some.
        if self.stage.training.stratified_times and purpose == TRAINING:
            times = _at(self.device, self._stratified(positions))
        return Draws(
            times,
            torch.stack(eps),
            torch.stack(keep_mask),
            torch.stack(lowres_t),
            None if self.stage.small_size is None else torch.stack(lowres_eps),
            None if self.crop is None else torch.stack(corners),
        )

    def _stratified(self, positions: Tensor) -> Tensor:
        """Times of the samples at `positions`, (B,) int64 on the host."""
        training, global_batch = self.stage.training, self.stage.global_batch
        times = []
        for position in positions.tolist():
            step, slot = divmod(position, global_batch)
            seed = seeded("times", TRAINING, training.seed, self.stage.seed_index, step)
            times.append(stratified_time(seed, slot, global_batch, self.schedule.timesteps))
        return torch.tensor(times)

    def _draw_one(self, position: int, shape: torch.Size, purpose: str) -> tuple[Tensor, ...]:
        seed = seeded(purpose, self.stage.training.seed, self.stage.seed_index, position)
        generator = torch.Generator(self.device).manual_seed(seed)
        where: dict[str, Any] = {"generator": generator, "device": self.device}
        t = torch.randint(self.schedule.timesteps, (), **where)
        lowres_t = torch.randint(self.lowres_times, (), **where)
        keep = torch.rand((), **where) >= self.stage.imagen.cond_drop_prob
        eps = torch.randn(shape, **where)
        lowres_eps = eps if self.stage.small_size is None else torch.randn(shape, **where)
        corner = t
        if self.crop is not None and self.stage.small_size is not None:
            # On the grid of the low-resolution pixels, so that every crop sees them alike.
            grid = max(1, self.stage.size // self.stage.small_size)
            places = (self.stage.size - self.crop) // grid + 1
            corner = torch.randint(places, (2,), **where) * grid
        return t, eps, keep, lowres_t, lowres_eps, corner


def crop_at(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cuts a square out of each image.

    Args:
        images: (B, C, H, W).
        corners: Top and left, (B, 2) int64.
        side: In pixels.

    Returns:
        (B, C, side, side).
    """
    # By indices that stay on the device: slices would make the host wait for the corners.
    steps = torch.arange(side, device=images.device)
    rows, columns = (corners[:, i, None] + steps for i in range(2))  # (B, side)
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    # Indices that are not side by side put the channels, left whole, last.
    return images[picture, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def _at(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _as_floats(pictures: Tensor) -> Tensor:
    return from_uint8(pictures) if pictures.dtype == torch.uint8 else pictures
