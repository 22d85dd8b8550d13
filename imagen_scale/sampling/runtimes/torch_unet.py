"""A U-Net in torch."""

from contextlib import nullcontext

import torch
from torch import Tensor

from imagen_scale.diffusion.guidance import guide
from imagen_scale.models.card import has_bf16, tf32
from imagen_scale.models.unet import TextCond, UNet
from imagen_scale.runs.inference import InferenceFile, load_weights
from imagen_scale.sampling.runtimes.contract import Conditioning, Say, Text
from imagen_scale.sampling.runtimes.options import Precision, RuntimeOptions
from imagen_scale.sampling.stage_schedule import stage_schedule

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """A U-Net in torch.

    Args:
        file: Its inference file.
        device: Where to compute.
        options: How to compute. The runtime "compile" compiles it at first use: a minute or more,
            worth it from some hundred evaluations on.
        say: Told when guidance falls back to two passes because memory is short.
    """

    max_batch: int | None = None

    def __init__(
        self,
        file: InferenceFile,
        device: torch.device,
        options: RuntimeOptions = RuntimeOptions(),  # noqa: B008  # immutable
        *,
        say: Say = lambda sentence: None,
    ) -> None:
        self.stage = stage = file.stage
        precision = options.precision or _default_precision(stage.training.precision, device)
        self.precision = precision
        self.device, self.sequential, self.say = device, options.sequential, say
        self.compiled = options.runtime == "compile"
        kind = "torch.compile" if self.compiled else "torch"
        self.name = f"{kind} {precision} on {device.type}"
        self.schedule = stage_schedule(stage).to(device)
        # Built without memory and then given the tensors of the file.
        unet = empty_unet(file)
        unet.load_state_dict(load_weights(file.path), assign=True)
        self.unet: UNet = unet.to(device, _DTYPES[precision]).requires_grad_(False)
        if options.channels_last:
            self.unet = self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.denoise = self.unet.denoise
        if self.compiled:
            # On a card this mode records CUDA graphs; on the CPU it is the ordinary one.
            self.denoise = torch.compile(self.unet.denoise, mode="reduce-overhead")

    @torch.no_grad()
    def bind(self, cond: Conditioning) -> "UNetDenoiser":
        """See `Runtime`."""
        cond.check(self.stage)
        text, null = self._condition(cond.text), None
        if cond.negative is not None:
            pairs = zip(self._condition(cond.negative), text, strict=True)
            null = TextCond(*(part.expand_as(of_text) for part, of_text in pairs))
        return UNetDenoiser(self, text, null, cond)

    def _condition(self, text: Text) -> TextCond:
        given = Text(text.embeds.to(self.device), text.mask.to(self.device))
        return self.unet.condition_text(*given, given.is_kept)

    def close(self) -> None:
        """Frees the network; again, nothing."""
        for name in ("unet", "denoise"):
            vars(self).pop(name, None)
        if self.compiled:
            torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class UNetDenoiser:
    """A torch U-Net with everything but x_t and t bound to it.

    Args:
        runtime: Holds the network.
        text: What depends on the text, computed once, for B images.
        null: What guidance leads away from; None takes the branch without text.
        cond: The rest.
    """

    def __init__(
        self, runtime: TorchRuntime, text: TextCond, null: TextCond | None, cond: Conditioning
    ) -> None:
        self.runtime, self.cond, self.cond_scale = runtime, cond, cond.cond_scale
        if isinstance(self.cond_scale, Tensor):
            self.cond_scale = self.cond_scale.to(runtime.device)[:, None, None, None]
        self.text, self.lowres_img, self.lowres_t = text, cond.lowres_img, cond.lowres_t
        needed = cond.branches
        self.guided = len(needed) == 2
        if "null" in needed:
            self.null = null or runtime.unet.null_text(len(text.tokens))
        if "text" not in needed:
            self.text = self.null
        if self.guided:
            self.both = TextCond(*(torch.cat(pair) for pair in zip(text, self.null, strict=True)))
            self.lowres_both = _twice(self.lowres_img), _twice(self.lowres_t)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicts the clean picture, (B, C, H, W) float32."""
        pred_type = self.runtime.unet.config.pred_type
        with tf32(False) if self.runtime.precision == "fp32" else nullcontext():
            prediction = self._predict(x_t, t)
        x_0 = self.runtime.schedule.predicted_x_0(pred_type, x_t, t, prediction)
        return self.cond.completed(x_0)

    def _predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        runtime = self.runtime
        try:
            if not self.guided:
                return self._pass(x_t, t, self.text)
            if runtime.sequential:
                return self._two_passes(x_t, t)
            return self._one_pass(x_t, t)
        except torch.OutOfMemoryError:
            if not self.guided or runtime.sequential:
                raise
        runtime.sequential = True
        runtime.say(
            f"{runtime.name}: memory is short; the two branches of guidance are computed one "
            f"after the other from here on."
        )
        return self._predict(x_t, t)

    def _one_pass(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Both branches in one batch: one launch of each kernel instead of two."""
        x_twice, t_twice = torch.cat((x_t, x_t)), torch.cat((t, t))
        cond, null = self._denoise(x_twice, t_twice, self.both, *self.lowres_both).chunk(2)
        return guide(cond, null, self.cond_scale)

    def _two_passes(self, x_t: Tensor, t: Tensor) -> Tensor:
        cond, null = (self._pass(x_t, t, text) for text in (self.text, self.null))
        return guide(cond, null, self.cond_scale)

    def _pass(self, x_t: Tensor, t: Tensor, text: TextCond) -> Tensor:
        return self._denoise(x_t, t, text, self.lowres_img, self.lowres_t)

    def _denoise(
        self,
        x_t: Tensor,
        t: Tensor,
        text: TextCond,
        lowres_img: Tensor | None,
        lowres_t: Tensor | None,
    ) -> Tensor:
        if not self.runtime.compiled:
            return self.runtime.denoise(x_t, t, text, lowres_img, lowres_t).float()
        torch.compiler.cudagraph_mark_step_begin()
        # Copied: the next replay of a CUDA graph writes into the same memory.
        prediction = self.runtime.denoise(x_t, t, text, lowres_img, lowres_t)
        return prediction.to(torch.float32, copy=True)


def _default_precision(trained_in: str, device: torch.device) -> Precision:
    """16 bits on a card where the network has learned to live with them, else fp32."""
    if device.type != "cuda" or trained_in == "fp32":
        return "fp32"
    if has_bf16(device):
        return "bf16"
    # What was trained in bf16 may leave fp16's range, which ends at 65504.
    return "fp16" if trained_in == "fp16" else "fp32"


def _twice(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.cat((x, x))


def load_unet(file: InferenceFile) -> UNet:
    """The trained U-Net of an inference file: float32, evaluation mode, CPU."""
    unet = empty_unet(file)
    unet.load_state_dict(load_weights(file.path), assign=True)
    return unet.float().requires_grad_(False)


def empty_unet(file: InferenceFile) -> UNet:
    """The U-Net of an inference file without memory for its weights, in evaluation mode."""
    with torch.device("meta"):
        return UNet(file.stage.network).eval()
