"""An exported graph against the torch network it was made from.

Single evaluations at three noise levels and two batch sizes, each image with its own guidance
scale and the last with a negative prompt, and with free sides at another one; then a sampling loop
of 20 steps from the same noise, with the sampler and the times that sampling takes by default, for
as many images as the graph takes. What a graph may differ by depends on its precision: float16
keeps 11 bits, bfloat16 eight.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.diffusion.guidance import guide
from imagen_scale.diffusion.sampler import sample
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.diffusion.thresholding import into_range
from imagen_scale.errors import ParityError
from imagen_scale.models.unet import TextCond, UNet
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.exported import ExportedRuntime
from imagen_scale.sampling.runtimes.manifest import SamplerConstants, Verification
from imagen_scale.sampling.runtimes.onnx_runtime import onnx_session
from imagen_scale.sampling.runtimes.ports import DEEP, GUIDANCE, Precision, denoiser_inputs
from imagen_scale_export.to_onnx import example_inputs

LOOP_STEPS, LOOP_SCALE = 20, 3.0
MAX_PSNR_DB = 999.0  # stands for equal pictures: JSON knows no infinity


class Limits(NamedTuple):
    """How far a graph may be from the torch network."""

    relative_error: float  # largest difference over the output's largest value
    cosine: float
    levels: float  # of 255, at any pixel after the loop
    psnr_db: float  # after the loop


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(3e-5, 0.9999, 1.0, 40.0),
    "fp16": Limits(1e-2, 0.9999, 255.0, 40.0),
    "bf16": Limits(8e-2, 0.999, 255.0, 30.0),
}


def verify(
    unet: UNet,
    runtime: ExportedRuntime,
    *,
    precision: Precision,
    constants: SamplerConstants,
    settings: StageSettings = StageSettings(),  # noqa: B008  # immutable
    batches: tuple[int, int] = (1, 2),
    other_side: int | None = None,
    text: Text | None = None,
    note: str = "",
) -> Verification:
    """Compares an export with its network.

    Args:
        unet: The reference, float32 on the CPU, in evaluation mode.
        runtime: The export.
        precision: Of the graph: decides the limits.
        constants: Of the sampler.
        settings: How the loop samples, of its steps `LOOP_STEPS` at most.
        batches: Images at once in the single evaluations; the larger number in the loop.
        other_side: A side beside the stage's own, where sides are free.
        text: Encoded prompts to take in turn; None takes random features.
        note: Kept in the result.

    Raises:
        ParityError: Saying which limit was crossed, by how much.
    """
    texts = _Texts(unet, text)
    size = constants.image_size
    cases = [(batch, size) for batch in batches]
    if other_side is not None:
        cases.append((batches[0], other_side))
    error, cosine = _single_steps(unet, runtime, constants, cases, texts)
    levels, psnr_db = _loop(unet, runtime, constants, settings, max(batches), texts)
    limits, loop_steps = LIMITS[precision], _loop_steps(settings)
    problems = [
        text
        for failed, text in (
            (not error <= limits.relative_error,
             f"one evaluation differs by {error:.2e} of its largest value "
             f"(limit {limits.relative_error:.0e})"),
            (not cosine >= limits.cosine, f"its cosine is {cosine:.6f} (limit {limits.cosine})"),
            (not levels <= limits.levels,
             f"{loop_steps} steps differ by {levels:.2f}/255 (limit {limits.levels:.0f}/255)"),
            (not psnr_db >= limits.psnr_db,
             f"{loop_steps} steps agree to {psnr_db:.1f} dB (limit {limits.psnr_db:.0f} dB)"),
        )
        if failed
    ]  # fmt: skip
    if problems:
        raise ParityError(f"{runtime.name}, {precision}: {'; '.join(problems)}")
    return Verification(
        runtime=runtime.name,
        passed=True,
        max_relative_error=error,
        min_cosine=cosine,
        loop_max_levels=levels,
        loop_psnr_db=psnr_db,
        note=note,
        loop_steps=loop_steps,
    )


@torch.no_grad()
def _single_steps(
    unet: UNet,
    runtime: ExportedRuntime,
    constants: SamplerConstants,
    cases: list[tuple[int, int]],
    texts: "_Texts",
) -> tuple[float, float]:
    """Largest relative error and smallest cosine over (batch, side), with guidance and without."""
    error, cosine = 0.0, 1.0
    last = constants.timesteps - 1
    for batch, side in cases:
        ports = denoiser_inputs(unet.config, side, dynamic_size=False)
        for time in (last // 10, last // 2, last):
            inputs = example_inputs(ports, batch=batch, size=side, seed=time)
            text = texts(batch, seed=time)
            cond = unet.condition_text(*text, text.is_kept)
            null = _away(unet, texts(1, seed=time + 1), batch)
            inputs |= {"text_tokens": cond.tokens, "text_hidden": cond.hidden}
            inputs |= {"null_tokens": null.tokens, "null_hidden": null.hidden}
            inputs["t"] = torch.full((batch,), float(time))
            inputs["cond_scale"] = torch.linspace(5, 0, batch)
            for guided, expected in zip((False, True), _both(unet, inputs), strict=True):
                if guided not in constants.graphs:
                    continue
                given = {
                    name: value.to(runtime.device)
                    for name, value in inputs.items()
                    if guided or name not in GUIDANCE
                }
                for found in _all_found(runtime, given, guided=guided):
                    error = max(error, _relative_error(found.cpu().float(), expected))
                    cosine = min(cosine, _cosine(found.cpu().float(), expected))
    return error, cosine


def _all_found(runtime: ExportedRuntime, given: dict[str, Tensor], *, guided: bool) -> list[Tensor]:
    """The whole graph's prediction, and the shallow one's from what that gave it."""
    prediction, *deep = runtime.executor(guided=guided).outputs(given)
    if not runtime.has_shallow:
        return [prediction]
    shallow = runtime.executor(guided=guided, shallow=True)
    return [prediction, shallow({**given, DEEP: deep[0]})]


def _away(unet: UNet, negative: Text, batch: int) -> TextCond:
    """What guidance leads away from: of the last image a negative prompt, of others no text."""
    null, last = unet.null_text(batch - 1), unet.condition_text(*negative, negative.is_kept)
    return TextCond(*(torch.cat(pair) for pair in zip(null, last, strict=True)))


def _both(unet: UNet, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The reference without guidance and with it: two passes, and guidance by hand."""
    rest = (inputs.get("lowres_img"), inputs.get("lowres_t"))
    with_text, without = (
        unet.denoise(
            inputs["x_t"],
            inputs["t"],
            TextCond(inputs[f"{branch}_tokens"], inputs[f"{branch}_hidden"]),
            *rest,
        )
        for branch in ("text", "null")
    )
    scales = inputs["cond_scale"][:, None, None, None]
    return with_text, guide(with_text, without, scales)


@torch.no_grad()
def _loop(
    unet: UNet,
    runtime: ExportedRuntime,
    constants: SamplerConstants,
    settings: StageSettings,
    batch: int,
    texts: "_Texts",
) -> tuple[float, float]:
    """Largest pixel difference in 1/255 and PSNR in dB after `LOOP_STEPS` steps of sampling.

    Guided where there is a graph for it; a stage of few steps takes these.
    """
    schedule, scale = constants.noise_schedule, LOOP_SCALE if True in constants.graphs else 1.0
    size = constants.image_size
    generator = torch.Generator().manual_seed(0)
    shape = (batch, unet.config.channels, size, size)
    start = torch.randn(shape, generator=generator)
    lowres_img = lowres_t = base = None
    if unet.config.lowres_cond:
        lowres_img = torch.rand(shape, generator=generator) * 2 - 1
        time = schedule.level_to_time(constants.lowres_sample_noise_level)
        lowres_t = torch.full((batch,), time)
        base = lowres_img if constants.lowres_residual else None
    text = texts(batch, seed=1)
    cond = Conditioning(text, scale, lowres_img, lowres_t, base=base)
    text_cond = unet.condition_text(*text, text.is_kept)

    def reference(x_t: Tensor, t: Tensor) -> Tensor:
        with_text = unet.denoise(x_t, t, text_cond, lowres_img, lowres_t)
        without = unet.denoise(x_t, t, unet.null_text(batch), lowres_img, lowres_t)
        guided = guide(with_text, without, scale)
        return cond.completed(schedule.predicted_x_0(constants.pred_type, x_t, t, guided))

    bound = runtime.bind(cond)

    def threshold(x_0: Tensor) -> Tensor:
        if constants.steps is not None:
            return x_0
        corrects = constants.lowres_residual
        return into_range(x_0, None if corrects else constants.dynamic_thresholding_percentile)

    def exported(x_t: Tensor, t: Tensor) -> Tensor:
        return bound(x_t.to(runtime.device), t.to(runtime.device)).cpu()

    ours, theirs = (
        sample(
            denoiser,
            start,
            schedule,
            times=visited_times(schedule, _loop_steps(settings), settings.spacing),
            sampler=settings.sampler,
            eta=settings.eta,
            threshold=threshold,
            draw_noise=lambda: start,
        )
        for denoiser in (exported, reference)
    )
    difference = (ours - theirs) * 127.5  # pictures span [-1, 1]
    error = difference.square().mean().item()
    psnr_db = 20 * math.log10(255) - 10 * math.log10(error) if error else MAX_PSNR_DB
    return difference.abs().max().item(), min(psnr_db, MAX_PSNR_DB)


def _loop_steps(settings: StageSettings) -> int:
    return min(LOOP_STEPS, settings.steps)


class _Texts:
    """Text for any number of images: given prompts in turn, or random features."""

    def __init__(self, unet: UNet, given: Text | None) -> None:
        self.unet, self.given = unet, given

    def __call__(self, batch: int, seed: int) -> Text:
        if self.given is None:
            return _text(self.unet, batch, seed)
        turns = torch.arange(batch) % len(self.given.embeds)
        return Text(self.given.embeds[turns], self.given.mask[turns])


def _text(unet: UNet, batch: int, seed: int) -> Text:
    """Random features of captions of several lengths; the last is full."""
    length, width = unet.config.max_text_len, unet.config.text_embed_dim
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(1, batch + 1)[:, None] * length / batch
    return Text(
        torch.randn(batch, length, width, generator=generator), torch.arange(length) < lengths
    )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    # Not-a-number must not pass for no difference.
    return ((found - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf).item()


def _cosine(found: Tensor, expected: Tensor) -> float:
    pair = (found.flatten().double(), expected.flatten().double())
    return torch.nn.functional.cosine_similarity(*pair, dim=0).nan_to_num(-1).item()


def verify_conditioner(unet: UNet, path: Path) -> float:
    """Largest relative error of the exported text conditioner.

    Raises:
        ParityError: If it is above float32's limit.
    """
    session = onnx_session(path, "CPUExecutionProvider")
    worst = 0.0
    for batch in (1, 3):
        text = _text(unet, batch, seed=batch)
        with torch.no_grad():
            expected = unet.condition_text(text.embeds, text.mask)
        found = session.run(
            None, {"text_embeds": text.embeds.numpy(), "text_mask": text.mask.numpy()}
        )
        for ours, theirs in zip(found, expected, strict=True):
            worst = max(worst, _relative_error(torch.from_numpy(ours), theirs))
    if worst > LIMITS["fp32"].relative_error:
        raise ParityError(f"the text conditioner differs by {worst:.2e} of its largest value")
    return worst
