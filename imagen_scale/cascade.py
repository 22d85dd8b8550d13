"""Sampling: a trained cascade from text to pictures, one stage in memory at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from imagen_scale.checkpoint import InferenceFile, inference_path, load_weights, read_inference
from imagen_scale.data.dataset import seeded
from imagen_scale.data.text import (
    MAX_TOKENS,
    Embedding,
    TextEncoder,
    encoder_fingerprint,
    encoder_folder,
    pad_embeddings,
)
from imagen_scale.diffusion.guidance import dynamic_threshold, guide
from imagen_scale.diffusion.lowres import resize
from imagen_scale.diffusion.sampler import sample, spaced_times
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.models.unet import TextCond, UNet

Sampler = Literal["ddim", "ddpm"]
OnStep = Callable[[int, int, int], None]  # U-Net number, steps done, steps in all

# Pixels computed at once unless the caller says otherwise: 64 pictures of 64 px, one of 1024.
PIXELS_AT_ONCE = 2**18


class Text(NamedTuple):
    """Encoded prompts."""

    embeds: Tensor  # (B, L, D) float32
    mask: Tensor  # (B, L) bool


class UNetDenoiser:
    """A torch U-Net as a `Denoiser`: text, low-resolution image and guidance are bound to it.

    Args:
        unet: The network, in evaluation mode.
        text: What depends on the text, computed once, for B images.
        schedule: Noise schedule on the same device.
        cond_scale: Guidance scale; 1 computes one branch only.
        lowres_img: Enlarged and noised low-resolution images, (B, C, H, W), or None.
        lowres_t: Their noise times, (B,), or None.
    """

    def __init__(
        self,
        unet: UNet,
        text: TextCond,
        schedule: NoiseSchedule,
        cond_scale: float,
        lowres_img: Tensor | None = None,
        lowres_t: Tensor | None = None,
    ) -> None:
        self.unet, self.text, self.schedule, self.cond_scale = unet, text, schedule, cond_scale
        self.lowres_img, self.lowres_t = lowres_img, lowres_t
        if cond_scale != 1:
            # Both branches in one batch: one launch of each kernel instead of two.
            null = unet.null_text(len(text.tokens))
            self.text = TextCond(*(torch.cat(pair) for pair in zip(text, null, strict=True)))
            self.lowres_img, self.lowres_t = _twice(lowres_img), _twice(lowres_t)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise, (B, C, H, W) float32."""
        if self.cond_scale == 1:
            prediction = self.unet.denoise(x_t, t, self.text, self.lowres_img, self.lowres_t)
            prediction = prediction.float()
        else:
            x_twice, t_twice = torch.cat((x_t, x_t)), torch.cat((t, t))
            pair = self.unet.denoise(x_twice, t_twice, self.text, self.lowres_img, self.lowres_t)
            cond, null = pair.float().chunk(2)
            prediction = guide(cond, null, self.cond_scale)
        # Guidance is linear, so guiding v and guiding the noise are the same.
        if self.unet.config.pred_type == "v":
            return self.schedule.v_to_eps(x_t, t, prediction)
        return prediction


def _twice(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.cat((x, x))


class Stage:
    """One trained U-Net, loaded from its inference file."""

    def __init__(self, file: InferenceFile, device: torch.device) -> None:
        self.file, self.device = file, device
        config, index = file.config, file.unet_number - 1
        self.image_size = config.imagen.image_sizes[index]
        self.schedule = NoiseSchedule.linear(config.per_unet("imagen", "timesteps", index))
        self.schedule = self.schedule.to(device)
        # Built without memory and then given the tensors of the file.
        with torch.device("meta"):
            unet = UNet(config.unet(index, file.text_embed_dim))
        unet.load_state_dict(load_weights(file.path), assign=True)
        is_bf16 = config.training.precision == "bf16" and device.type == "cuda"
        self.unet = unet.to(device, torch.bfloat16 if is_bf16 else torch.float32).eval()

    @torch.no_grad()
    def sample(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        lowres: Tensor | None = None,
        steps: int,
        cond_scale: float,
        sampler: Sampler = "ddim",
        lowres_noise_level: float | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Samples this stage.

        Each image draws its noise from a generator of its own, on the CPU, so a picture depends
        on its prompt and seed alone: not on the other prompts of the call, nor on the device.

        Args:
            text: Encoded prompts of B images.
            seeds: One per image.
            lowres: Pictures of the stage before, (B, 3, h, w) in [-1, 1]; needed from U-Net 2 on.
            steps: Denoiser evaluations.
            cond_scale: Guidance scale.
            sampler: "ddim" (deterministic) or "ddpm".
            lowres_noise_level: Noise put on `lowres`, in [0, 1); None takes the configuration's.
            on_step: Told of each step.

        Returns:
            (B, 3, size, size) in [-1, 1] on the CPU.
        """
        at_once = max(1, PIXELS_AT_ONCE // self.image_size**2)
        parts = []
        for start in range(0, len(seeds), at_once):
            part = slice(start, start + at_once)
            parts.append(
                self._sample_part(
                    Text(text.embeds[part], text.mask[part]),
                    seeds[part],
                    None if lowres is None else lowres[part],
                    steps,
                    cond_scale,
                    sampler,
                    lowres_noise_level,
                    on_step,
                )
            )
        return torch.cat(parts)

    def _sample_part(
        self,
        text: Text,
        seeds: Sequence[int],
        lowres: Tensor | None,
        steps: int,
        cond_scale: float,
        sampler: Sampler,
        lowres_noise_level: float | None,
        on_step: OnStep | None,
    ) -> Tensor:
        imagen, number = self.file.config.imagen, self.file.unet_number
        generators = [
            torch.Generator().manual_seed(seeded("sample", number, seed)) for seed in seeds
        ]
        shape = (imagen.channels, self.image_size, self.image_size)

        def draw_noise() -> Tensor:
            noise = [torch.randn(shape, generator=generator) for generator in generators]
            return torch.stack(noise).to(self.device)

        lowres_img = lowres_t = None
        if number > 1:
            if lowres is None:
                raise UsageError(f"U-Net {number} needs the pictures of the stage before it.")
            if lowres_noise_level is None:
                lowres_noise_level = imagen.lowres_sample_noise_level
            time = self.schedule.level_to_time(lowres_noise_level)
            lowres_t = torch.full((len(seeds),), time, device=self.device)
            enlarged = resize(lowres.to(self.device), self.image_size)
            lowres_img = self.schedule.q_sample(enlarged, lowres_t, draw_noise())

        cond = self.unet.condition_text(text.embeds.to(self.device), text.mask.to(self.device))
        times = spaced_times(self.schedule.timesteps, steps)
        images = sample(
            UNetDenoiser(self.unet, cond, self.schedule, cond_scale, lowres_img, lowres_t),
            draw_noise(),
            self.schedule,
            times=times,
            eta=1.0 if sampler == "ddpm" else 0.0,
            threshold=lambda x_0: dynamic_threshold(x_0, imagen.dynamic_thresholding_percentile),
            draw_noise=draw_noise,
            on_step=on_step and (lambda step, _: on_step(number, step, len(times))),
        )
        return images.cpu()


class Cascade:
    """A run's trained stages.

    Args:
        files: One inference file per stage, in order, from U-Net 1 on.
        device: Where to compute; None takes the first GPU, else the CPU.
    """

    def __init__(self, files: list[InferenceFile], device: torch.device | None = None) -> None:
        self.files = files
        self.device = device or default_device()

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        unet_limit: int | None = None,
        allow_unfinished: bool = False,
        device: torch.device | None = None,
    ) -> "Cascade":
        """Opens the stages of a run; the weights are read when a stage is used.

        Args:
            run: The run's folder.
            unet_limit: Use only the first so many U-Nets.
            allow_unfinished: Accept stages whose training has not ended.
            device: As for `Cascade`.

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
        return cls(files, device)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num: int = 1,
        steps: int = 50,
        cond_scale: float = 3.0,
        sr_cond_scale: float = 1.0,
        sampler: Sampler = "ddim",
        on_step: OnStep | None = None,
    ) -> list[Tensor]:
        """Makes pictures from prompts.

        Args:
            prompts: P captions.
            seed: The j-th picture of each prompt uses seed + j.
            num: Pictures per prompt.
            steps: Denoiser evaluations per stage.
            cond_scale: Guidance scale of the base stage.
            sr_cond_scale: Guidance scale of the super-resolution stages: their low-resolution
                picture already says what to draw.
            sampler: "ddim" or "ddpm".
            on_step: Told of each step.

        Returns:
            Each stage's pictures, (P * num, 3, size, size) in [-1, 1]; those of one prompt
            stand together.
        """
        text = self.encode([prompt for prompt in prompts for _ in range(num)])
        seeds = [seed + j for _ in prompts for j in range(num)]
        outputs: list[Tensor] = []
        for file in self.files:
            stage = Stage(file, self.device)
            images = stage.sample(
                text,
                seeds,
                lowres=outputs[-1] if outputs else None,
                steps=steps,
                cond_scale=sr_cond_scale if outputs else cond_scale,
                sampler=sampler,
                on_step=on_step,
            )
            outputs.append(images)
            del stage  # before the next one is built
        return outputs

    def encode(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts with the encoder of training; it is freed before a stage is loaded.

        Raises:
            CheckpointError: If the encoder at hand is not the one of training.
        """
        file = self.files[0]
        name = file.config.text_encoder
        folder = encoder_folder(name)
        if encoder_fingerprint(folder) != file.text_fingerprint:
            raise CheckpointError(
                f"{file.path}: trained with another version of the text encoder {name!r} than the "
                f"one in {folder}. Put the original files back, or train again."
            )
        unique = list(dict.fromkeys(prompts))
        encoder, together = TextEncoder(folder), file.config.text.batch_size
        found: dict[str, Embedding] = {}
        for start in range(0, len(unique), together):
            some = unique[start : start + together]
            found |= dict(zip(some, encoder.encode(some), strict=True))
        return Text(*pad_embeddings([found[prompt] for prompt in prompts], MAX_TOKENS))


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
