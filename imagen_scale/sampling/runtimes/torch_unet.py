"""A U-Net in torch."""

import torch
from torch import Tensor

from imagen_scale.diffusion.guidance import guide
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.models.unet import TextCond, UNet
from imagen_scale.runs.inference import InferenceFile, load_weights
from imagen_scale.sampling.runtimes.contract import Options, Say, Text

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """A U-Net in torch.

    Args:
        file: Its inference file.
        device: Where to compute.
        options: How to compute.
        compiled: Compile it at first use: a minute or more, worth it from some hundred
            evaluations on.
        say: Told when guidance falls back to two passes because memory is short.
    """

    max_batch: int | None = None

    def __init__(
        self,
        file: InferenceFile,
        device: torch.device,
        options: Options = Options(),  # noqa: B008  # immutable
        *,
        compiled: bool = False,
        say: Say = lambda sentence: None,
    ) -> None:
        precision = options.precision
        if precision is None:
            is_bf16 = file.stage.training.precision == "bf16" and device.type == "cuda"
            precision = "bf16" if is_bf16 else "fp32"
        self.device, self.sequential, self.compiled = device, options.sequential, compiled
        self.name = f"{'torch.compile' if compiled else 'torch'} {precision} on {device.type}"
        self.say = say
        self.schedule = NoiseSchedule.linear(file.stage.timesteps).to(device)
        # Built without memory and then given the tensors of the file.
        with torch.device("meta"):
            unet = UNet(file.stage.network)
        unet.load_state_dict(load_weights(file.path), assign=True)
        self.unet: UNet = unet.to(device, _DTYPES[precision]).eval().requires_grad_(False)
        if options.channels_last:
            self.unet = self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.denoise = self.unet.denoise
        if compiled:
            # On a card this mode records CUDA graphs; on the CPU it is the ordinary one.
            self.denoise = torch.compile(self.unet.denoise, mode="reduce-overhead")

    def bind(
        self,
        text: Text,
        *,
        cond_scale: float,
        lowres_img: Tensor | None,
        lowres_t: Tensor | None,
        negative: Text | None = None,
    ) -> "UNetDenoiser":
        """See `Runtime`."""
        with torch.no_grad():
            cond = self._condition(text)
            null = None
            if negative is not None:
                null = TextCond(*(part.expand_as(one) for part, one in
                                  zip(self._condition(negative), cond, strict=True)))  # fmt: skip
        return UNetDenoiser(self, cond, cond_scale, lowres_img, lowres_t, null=null)

    def _condition(self, text: Text) -> TextCond:
        return self.unet.condition_text(text.embeds.to(self.device), text.mask.to(self.device))

    def close(self) -> None:
        """Frees the network."""
        del self.unet, self.denoise
        if self.compiled:
            torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class UNetDenoiser:
    """A torch U-Net with everything but x_t and t bound to it.

    Args:
        runtime: Holds the network.
        text: What depends on the text, computed once, for B images.
        cond_scale: Guidance scale; 1 (text alone) and 0 (no text) compute one branch only.
        lowres_img: Enlarged and noised low-resolution images, (B, C, H, W), or None.
        lowres_t: Their noise times, (B,), or None.
        null: What guidance leads away from; None takes the branch without text.
    """

    def __init__(
        self,
        runtime: TorchRuntime,
        text: TextCond,
        cond_scale: float,
        lowres_img: Tensor | None = None,
        lowres_t: Tensor | None = None,
        *,
        null: TextCond | None = None,
    ) -> None:
        self.runtime, self.cond_scale = runtime, cond_scale
        self.text, self.lowres_img, self.lowres_t = text, lowres_img, lowres_t
        self.guided = cond_scale not in (0, 1)
        if cond_scale == 0:
            self.text = null or runtime.unet.null_text(len(text.tokens))
        if self.guided:
            self.null = null or runtime.unet.null_text(len(text.tokens))
            self.both = TextCond(*(torch.cat(pair) for pair in zip(text, self.null, strict=True)))
            self.lowres_both = _twice(lowres_img), _twice(lowres_t)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise, (B, C, H, W) float32."""
        prediction = self._predict(x_t, t)
        # Guidance is linear, so guiding v and guiding the noise are the same.
        if self.runtime.unet.config.pred_type == "v":
            return self.runtime.schedule.v_to_eps(x_t, t, prediction)
        return prediction

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
