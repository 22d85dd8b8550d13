"""One stage of a bundle, sampled."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .bundle import Conditioned, StageFacts
from .diffusion.guidance import branches, guided_times
from .diffusion.reverse import reverse
from .diffusion.solvers import Level
from .diffusion.spacing import visited_times
from .diffusion.tiles import Tile, TiledDenoiser
from .errors import EnvironmentProblem, UsageError, option
from .graphs import Engine, Graph
from .noise import NormalNoise
from .pictures import dynamic_threshold, enlarge
from .seeds import seeded
from .settings import Settings

# Pixels computed at once unless the caller says otherwise: 64 pictures of 64 px, one of 1024.
PIXELS_AT_ONCE = 2**18

OnStep = Callable[[int, int, int], None]  # told the U-Net's number, steps done, steps in all


class Inputs(NamedTuple):
    """What a stage makes B pictures from."""

    text: Conditioned
    null: Conditioned  # of one picture: what guidance leads away from
    seeds: Sequence[int]
    cond_scales: Sequence[float]  # guidance of each
    lowres: np.ndarray | None  # of the stage before, (B, C, h, w) in [-1, 1]

    def part(self, start: int, end: int) -> "Inputs":
        """Some of the pictures."""
        part = slice(start, end)
        text = Conditioned(self.text.tokens[part], self.text.hidden[part])
        lowres = None if self.lowres is None else self.lowres[part]
        return Inputs(text, self.null, self.seeds[part], self.cond_scales[part], lowres)


class Stage:
    """One U-Net's graphs, loaded when they are used.

    Args:
        facts: What it is.
        engine: Computes it.
    """

    def __init__(self, facts: StageFacts, engine: Engine) -> None:
        self.facts, self.engine = facts, engine
        self._graphs: dict[str, Graph] = {}

    def close(self) -> None:
        """Frees the graphs."""
        self._graphs.clear()

    def sample(
        self,
        inputs: Inputs,
        settings: Settings,
        *,
        tile: int | None,
        at_once: int | None,
        on_step: OnStep | None,
    ) -> np.ndarray:
        """Makes pictures, each from noise of its own: it depends on its prompt and seed alone.

        Args:
            inputs: What from.
            settings: How; guidance is the inputs'.
            tile: From `tile_for`.
            at_once: Pictures computed together; None takes `PIXELS_AT_ONCE`.
            on_step: Told of each step.

        Returns:
            (B, C, size, size) float32 in [-1, 1].

        Raises:
            EnvironmentProblem: If what was computed is not finite.
        """
        count = at_once or max(1, PIXELS_AT_ONCE // self.facts.size**2)
        parts = [
            self._sample_part(inputs.part(start, start + count), settings, tile, on_step)
            for start in range(0, len(inputs.seeds), count)
        ]
        return np.concatenate(parts)

    def _sample_part(
        self, inputs: Inputs, settings: Settings, tile: int | None, on_step: OnStep | None
    ) -> np.ndarray:
        facts, schedule = self.facts, self.facts.schedule
        shape = (facts["channels"], facts.size, facts.size)
        sources = [NormalNoise(seeded("sample", facts.number, seed)) for seed in inputs.seeds]

        def draw_noise() -> np.ndarray:
            return np.stack([source.draw(shape) for source in sources])

        lowres = noised = None
        if inputs.lowres is not None:
            level = schedule.level(facts["lowres_time"])
            lowres = enlarge(inputs.lowres, facts.size, facts.size)
            noised = np.float32(level.alpha) * lowres + np.float32(level.sigma) * draw_noise()

        def denoiser(cond_scales: Sequence[float]) -> Callable[[np.ndarray, Level], np.ndarray]:
            if tile is None or lowres is None or noised is None:
                return self._denoiser(inputs, cond_scales, lowres, noised)

            def bind(window: Tile) -> Callable[[np.ndarray, Level], np.ndarray]:
                parts = (np.ascontiguousarray(window.of(images)) for images in (lowres, noised))
                return self._denoiser(inputs, cond_scales, *parts)

            return TiledDenoiser(
                bind, tile=tile, divisor=facts["size_divisor"],
                of_numpy=lambda weights: weights.astype(np.float32),
            )  # fmt: skip

        times = visited_times(schedule, settings.steps, settings.spacing)
        guided = guided_times(times, settings.guidance_interval or "0:1")
        scales = {
            True: inputs.cond_scales,
            False: [min(scale, 1.0) for scale in inputs.cond_scales],
        }
        # The plain one is loaded only where there are steps for it.
        denoisers = {acts: denoiser(scales[acts]) for acts in {time in guided for time in times}}
        with np.errstate(all="ignore"):  # what is not finite is refused below, in a sentence
            made: np.ndarray = reverse(
                lambda x_t, level: self._thresholded(
                    denoisers[level.time in guided](x_t, level), settings.threshold
                ),
                draw_noise(),
                [schedule.level(time) for time in times],
                sampler=settings.sampler,
                eta=settings.eta,
                draw_noise=draw_noise,
                on_step=lambda step, _: on_step and on_step(facts.number, step, len(times)),
            )
        if not np.isfinite(made).all():
            raise EnvironmentProblem(
                f"{facts.name}: {self.engine.runtime} computed numbers that are not finite. Export "
                f"the bundle in fp32; where that is no help, the weights are to blame."
            )
        return np.clip(made, -1, 1)

    def _denoiser(
        self,
        inputs: Inputs,
        cond_scales: Sequence[float],
        lowres: np.ndarray | None,
        noised: np.ndarray | None,
    ) -> Callable[[np.ndarray, Level], np.ndarray]:
        """Predicts the clean pictures at a level."""
        count, text = len(inputs.seeds), inputs.text
        null = Conditioned(*(np.repeat(part, count, axis=0) for part in inputs.null))
        # Where no picture needs both branches, one is computed: each picture's own.
        is_guided = any(len(branches(scale)) > 1 for scale in cond_scales)
        if not is_guided:
            has_text = ["text" in branches(scale) for scale in cond_scales]
            text = text.where(has_text, null)
        feed = {"text_tokens": text.tokens, "text_hidden": text.hidden}
        if is_guided:
            scales = np.array(cond_scales, np.float32)
            feed |= {"null_tokens": null.tokens, "null_hidden": null.hidden, "cond_scale": scales}
        if noised is not None:
            lowres_t = np.full(count, self.facts["lowres_time"], np.float32)
            feed |= {"lowres_img": noised, "lowres_t": lowres_t}
        graph = self._graph("denoiser.onnx" if is_guided else "denoiser_unguided.onnx")

        def denoise(x_t: np.ndarray, level: Level) -> np.ndarray:
            t = np.full(count, level.time, np.float32)
            (prediction,) = graph({"x_t": np.ascontiguousarray(x_t), "t": t, **feed})
            x_0 = _clean(self.facts["pred_type"], x_t, level, prediction)
            return x_0 + lowres if self.facts["lowres_residual"] else x_0

        return denoise

    def _thresholded(self, x_0: np.ndarray, percentile: float | None) -> np.ndarray:
        """See the main package's `sampling.stage.thresholding` for why."""
        way = self.facts["thresholding"] if percentile is None else "dynamic"
        if way == "none":
            return x_0
        if way == "clamp":
            return np.clip(x_0, -1, 1)
        return dynamic_threshold(x_0, percentile or self.facts["percentile"])

    def tile_for(self, tile: int | None) -> int | None:
        """The side of the tiles that are taken, in pixels; None where whole pictures are computed.

        Args:
            tile: As it is asked for.

        Raises:
            UsageError: If it does not fit the network or its export.
        """
        if tile is None or tile >= self.facts.size or not self.facts.is_super_resolution:
            return None
        divisor = self.facts["size_divisor"]
        if tile % divisor:
            raise UsageError(
                f"{option('tile')} {tile}: {self.facts.name} takes tiles in multiples of "
                f"{divisor} px."
            )
        if not self.facts["dynamic_size"]:
            raise UsageError(
                f"{option('tile')} {tile}: {self.facts.name} was exported for {self.facts.size} px "
                f"alone. Export the bundle with --dynamic-size."
            )
        return tile

    def _graph(self, name: str) -> Graph:
        if name not in self._graphs:
            self._graphs[name] = self.engine.open(self.facts.folder / name)
        return self._graphs[name]


def _clean(pred_type: str, x_t: np.ndarray, level: Level, prediction: np.ndarray) -> np.ndarray:
    """The clean pictures that a prediction implies."""
    if pred_type == "x0":
        return prediction
    alpha, sigma = np.float32(level.alpha), np.float32(level.sigma)
    if pred_type == "v":
        return alpha * x_t - sigma * prediction
    return (x_t - sigma * prediction) / alpha
