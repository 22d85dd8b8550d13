"""A trained run in Python: prompts in, PIL pictures out.

The same sampling as `imagen-scale sample`: equal pixels for equal options. Messages of errors name
options as the command line does; `--cond-scale` is the argument `cond_scale` here.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor

from imagen_scale.diffusion.sampler import Sampler
from imagen_scale.diffusion.spacing import Spacing
from imagen_scale.errors import UsageError
from imagen_scale.files.pictures import to_uint8
from imagen_scale.runs.folders import find_run
from imagen_scale.sampling.runtimes.contract import Options, Precision, RuntimeName
from imagen_scale.sampling.stage import OnEstimate
from imagen_scale.sampling.stages import Picture, TrainedStages


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

    Weights are read when a stage is used, one stage in memory at a time.
    """

    def __init__(self, stages: TrainedStages) -> None:
        self._stages = stages

    @classmethod
    def load(
        cls,
        run: str | Path | None = None,
        *,
        unet_limit: int | None = None,
        allow_unfinished: bool = False,
        device: str | None = None,
        runtime: RuntimeName = "auto",
        precision: Precision | None = None,
        channels_last: bool = False,
        sequential: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> "Cascade":
        """Opens a trained run.

        Args:
            run: The run's folder; None takes the newest under `runs/`.
            unet_limit: Use only the first so many U-Nets.
            allow_unfinished: Accept stages whose training has not ended.
            device: Where to compute, as torch names it ("cpu", "cuda:1"); None takes the first
                GPU, else the CPU.
            runtime: What computes the U-Nets: "auto" (the best that can be used), "torch",
                "compile", or an export: "onnx", "tensorrt", "openvino".
            precision: "fp32", "bf16" or "fp16"; None goes by the device.
            channels_last: Memory layout for torch.
            sequential: Two passes for guidance: less memory, more time.
            say: Told in sentences what "auto" chose and what was changed for want of memory, e.g.
                `print`; None keeps quiet.

        Raises:
            UsageError: If there is no such run, or an option is wrong.
            CheckpointError: Naming the stage that is missing, damaged or not trained to its end.
        """
        _one_of("runtime", runtime, RuntimeName)
        if precision is not None:
            _one_of("precision", precision, Precision)
        stages = TrainedStages.load(
            find_run(run),
            unet_limit=unet_limit,
            allow_unfinished=allow_unfinished,
            device=None if device is None else _device(device),
            runtime=runtime,
            options=Options(precision, channels_last, sequential),
            say=say or (lambda sentence: None),
        )
        return cls(stages)

    @property
    def image_sizes(self) -> list[int]:
        """Side of each stage's square pictures in pixels, from the smallest on."""
        files = self._stages.files
        return list(files[0].config.imagen.image_sizes[: len(files)])

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        num: int = 1,
        steps: int | Sequence[int] = 25,
        cond_scale: float | Sequence[float] = 3.0,
        sampler: Sampler | Sequence[Sampler] = "dpmpp_2m",
        spacing: Spacing | Sequence[Spacing] = "trailing",
        eta: float | Sequence[float] = 0.0,
        threshold: float | Sequence[float | None] | None = None,
        tile: int | None = None,
        at_once: int | None = None,
        on_step: Callable[[int, int, int], None] | None = None,
        on_estimate: Callable[[int, int, int, list[Image.Image]], None] | None = None,
        negative_prompt: str | None = None,
    ) -> list[Image.Image]:
        """Makes pictures from prompts and holds them all.

        A picture depends on its prompt, its seed and the settings, not on the others of the call.
        Settings that take a list have one value per stage; a single value counts for all, but for
        `cond_scale`: a single scale is the base stage's, and the others take 1.

        Args:
            prompts: One caption, or P of them.
            seed: The j-th picture of each prompt uses seed + j; 0 or more.
            num: Pictures per prompt.
            steps: Sampling steps.
            cond_scale: Guidance scale; 1 is none, above 1 follows the text more closely.
            sampler: "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde" or "heun".
            spacing: Which times are visited: "linear", "trailing", "logsnr" or "karras".
            eta: Share of DDPM's noise in [0, 1]; for "ddim" only.
            threshold: Percentile of dynamic thresholding in (0, 1]; None takes the
                configuration's.
            tile: Side in pixels of the tiles in which larger stages are computed; None for none.
            at_once: Pictures computed together; None goes by their size.
            on_step: Told of each step: U-Net number from 1, steps done, steps in all.
            on_estimate: Told the same, and the clean pictures that the step expects: RGB, of
                those that are computed together. What is made does not depend on it.
            negative_prompt: What guidance leads away from, in place of no text at all; for the
                runtimes "torch" and "compile", and "auto" takes torch.

        Returns:
            P * num RGB pictures of the last stage, `image_sizes[-1]` pixels square; those of one
            prompt stand together.

        Raises:
            UsageError: Naming the option that is wrong, before any work.
            EnvironmentProblem: If the device's memory is too small.
            ImagenScaleError: If a runtime asked for by name cannot be used.
        """
        made = self.stream(
            prompts, seed=seed, num=num, steps=steps, cond_scale=cond_scale, sampler=sampler,
            spacing=spacing, eta=eta, threshold=threshold, tile=tile, at_once=at_once,
            on_step=on_step, on_estimate=on_estimate, negative_prompt=negative_prompt,
        )  # fmt: skip
        return [one.image for one in made]

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        num: int = 1,
        steps: int | Sequence[int] = 25,
        cond_scale: float | Sequence[float] = 3.0,
        sampler: Sampler | Sequence[Sampler] = "dpmpp_2m",
        spacing: Spacing | Sequence[Spacing] = "trailing",
        eta: float | Sequence[float] = 0.0,
        threshold: float | Sequence[float | None] | None = None,
        tile: int | None = None,
        at_once: int | None = None,
        on_step: Callable[[int, int, int], None] | None = None,
        on_estimate: Callable[[int, int, int, list[Image.Image]], None] | None = None,
        negative_prompt: str | None = None,
    ) -> Iterator[Sample]:
        """Makes pictures from prompts and gives each as soon as it is finished, all stages of it.

        Args:
            prompts: As for `sample`, and so is every option.
            seed: See `sample`.
            num: See `sample`.
            steps: See `sample`.
            cond_scale: See `sample`.
            sampler: See `sample`.
            spacing: See `sample`.
            eta: See `sample`.
            threshold: See `sample`.
            tile: See `sample`.
            at_once: See `sample`.
            on_step: See `sample`.
            on_estimate: See `sample`.
            negative_prompt: See `sample`.

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
        if not isinstance(negative_prompt, str | None):
            raise UsageError(f"negative_prompt: {negative_prompt!r} is not a string.")
        _at_least("seed", seed, 0)
        for name, value in (("num", num), ("tile", tile), ("at_once", at_once)):
            if value is not None:
                _at_least(name, value, 1)
        for one in [sampler] if isinstance(sampler, str) else sampler:
            _one_of("sampler", one, Sampler)
        for way in [spacing] if isinstance(spacing, str) else spacing:
            _one_of("spacing", way, Spacing)
        settings: dict[str, Any] = {
            "steps": steps, "cond_scale": cond_scale, "sampler": sampler, "spacing": spacing,
            "eta": eta, "threshold": threshold,
        }  # fmt: skip
        pictures = self._stages.stream(
            captions, seed=seed, num=num, tile=tile, at_once=at_once, on_step=on_step,
            on_estimate=None if on_estimate is None else _with_images(on_estimate),
            negative_prompt=negative_prompt, **settings,
        )  # fmt: skip
        return map(_sample, pictures)


def _sample(picture: Picture) -> Sample:
    images = [image for stage in picture.stages for image in _images(stage[None])]
    return Sample(picture.prompt, picture.seed, images, picture.runtimes)


def _images(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in to_uint8(pictures)]


def _with_images(
    on_estimate: Callable[[int, int, int, list[Image.Image]], None],
) -> OnEstimate:
    return lambda unet, step, steps, x_0: on_estimate(unet, step, steps, _images(x_0))


def _one_of(argument: str, value: Any, names: Any) -> None:
    if value not in get_args(names):
        allowed = ", ".join(get_args(names))
        raise UsageError(f"{argument}: {value!r} is not known; take one of {allowed}.")


def _at_least(argument: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UsageError(f"{argument}: {value!r}; a whole number from {least} on is needed.")


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
