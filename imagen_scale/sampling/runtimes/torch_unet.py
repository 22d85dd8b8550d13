"""A U-Net in torch."""

from contextlib import nullcontext

import torch
from torch import Tensor

from imagen_scale.diffusion.caching import DeepCache
from imagen_scale.diffusion.guidance import guide
from imagen_scale.models.card import has_bf16, tf32
from imagen_scale.models.unet import TextCond, UNet
from imagen_scale.runs.inference import InferenceFile, load_weights
from imagen_scale.sampling.runtimes.contract import Conditioning, Say, Text
from imagen_scale.sampling.runtimes.options import Precision, RuntimeOptions
from imagen_scale.sampling.stage_schedule import stage_schedule

# A prediction and, where they are to be kept, the features of the levels below the finest.
Evaluation = tuple[Tensor, Tensor | None]

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
        self.denoise, self.denoise_cached = self.unet.denoise, self.unet.denoise_cached
        if self.compiled:
            # On a card this mode records CUDA graphs; on the CPU it is the ordinary one.
            self.denoise = torch.compile(self.denoise, mode="reduce-overhead")
            self.denoise_cached = torch.compile(self.denoise_cached, mode="reduce-overhead")

    @torch.no_grad()
    def bind(self, cond: Conditioning, cache: DeepCache | None = None) -> "UNetDenoiser":
        """See `Runtime`."""
        cond.check(self.stage)
        text, null = self._condition(cond.text), None
        if cond.negative is not None:
            pairs = zip(self._condition(cond.negative), text, strict=True)
            null = TextCond(*(part.expand_as(of_text) for part, of_text in pairs))
        return UNetDenoiser(self, text, null, cond, cache)

    def _condition(self, text: Text) -> TextCond:
        given = Text(text.embeds.to(self.device), text.mask.to(self.device))
        return self.unet.condition_text(*given, given.is_kept)

    def close(self) -> None:
        """Frees the network; again, nothing."""
        for name in ("unet", "denoise", "denoise_cached"):
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
        cache: Says which evaluations are whole; None: all.
    """

    def __init__(
        self,
        runtime: TorchRuntime,
        text: TextCond,
        null: TextCond | None,
        cond: Conditioning,
        cache: DeepCache | None,
    ) -> None:
        self.cache = cache
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
        deep = None if self.cache is None else self.cache.take(guided=self.guided)
        with tf32(False) if self.runtime.precision == "fp32" else nullcontext():
            prediction, features = self._predict(x_t, t, deep)
        if self.cache is not None and deep is None:
            self.cache.keep(features, guided=self.guided)
        x_0 = self.runtime.schedule.predicted_x_0(pred_type, x_t, t, prediction)
        return self.cond.completed(x_0)

    def _predict(self, x_t: Tensor, t: Tensor, deep: Tensor | None) -> Evaluation:
        runtime = self.runtime
        try:
            if not self.guided:
                return self._pass(x_t, t, self.text, deep)
            if runtime.sequential:
                return self._two_passes(x_t, t, deep)
            return self._one_pass(x_t, t, deep)
        except torch.OutOfMemoryError:
            if not self.guided or runtime.sequential:
                raise
        runtime.sequential = True
        runtime.say(
            f"{runtime.name}: memory is short; the two branches of guidance are computed one "
            f"after the other from here on."
        )
        return self._predict(x_t, t, deep)

    def _one_pass(self, x_t: Tensor, t: Tensor, deep: Tensor | None) -> Evaluation:
        """Both branches in one batch: one launch of each kernel instead of two."""
        x_twice, t_twice = torch.cat((x_t, x_t)), torch.cat((t, t))
        pair, features = self._denoise(x_twice, t_twice, self.both, *self.lowres_both, deep)
        cond, null = pair.chunk(2)
        return guide(cond, null, self.cond_scale), features

    def _two_passes(self, x_t: Tensor, t: Tensor, deep: Tensor | None) -> Evaluation:
        of_each = (None, None) if deep is None else deep.chunk(2)
        (cond, first), (null, second) = (
            self._pass(x_t, t, text, features)
            for text, features in zip((self.text, self.null), of_each, strict=True)
        )
        features = None if first is None or second is None else torch.cat((first, second))
        return guide(cond, null, self.cond_scale), features

    def _pass(self, x_t: Tensor, t: Tensor, text: TextCond, deep: Tensor | None) -> Evaluation:
        return self._denoise(x_t, t, text, self.lowres_img, self.lowres_t, deep)

    def _denoise(
        self,
        x_t: Tensor,
        t: Tensor,
        text: TextCond,
        lowres_img: Tensor | None,
        lowres_t: Tensor | None,
        deep: Tensor | None,
    ) -> Evaluation:
        runtime, features = self.runtime, None
        if runtime.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        if self.cache is None:
            prediction = runtime.denoise(x_t, t, text, lowres_img, lowres_t)
        else:
            prediction, features = runtime.denoise_cached(x_t, t, text, lowres_img, lowres_t, deep)
        if not runtime.compiled:
            return prediction.float(), features
        # Copied: the next replay of a CUDA graph writes into the same memory.
        kept = None if features is None or deep is not None else features.clone()
        return prediction.to(torch.float32, copy=True), kept


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
