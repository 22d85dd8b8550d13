"""A bundle in Python: prompts in, PIL pictures out."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .blank import is_blank
from .bundle import Bundle, Conditioned, StageFacts
from .errors import UsageError, option, spelled
from .graphs import CPU, Engine, Runtime
from .pictures import to_uint8
from .sampling.unread import NotRead
from .sampling.wanted import Wanted, check_seeds
from .settings import PER_STAGE, Settings, check_negative, is_whole, settings_of
from .stage import Inputs, OnStep, Stage
from .text import TextReader

GROUP = 64  # pictures that go through all stages together
OPTIONS = (*PER_STAGE, "seed", "num", "negative_prompt", "tile", "at_once")


class Sample(NamedTuple):
    """One finished picture, and what it was made from."""

    prompt: str
    seed: int
    stages: list[Image.Image]  # of each stage, from the smallest on, RGB
    not_read: list[NotRead]  # of its prompt and of the negative one

    @property
    def image(self) -> Image.Image:
        """The last stage's picture."""
        return self.stages[-1]


class Cascade:
    """A bundle, ready to be sampled; graphs are loaded when they are used for the first time.

    Not to be used by several threads at once.

    Args:
        folder: Written by `imagen-scale export --bundle`.
        runtime: "onnx" or "openvino".
        provider: What ONNX Runtime computes with, e.g. "CUDAExecutionProvider".
        provider_options: For it.
        threads: On the CPU; 0 leaves their number to the runtime.
        keep: Whether graphs stay loaded for the next call; else each is freed after its use, and
            memory for one at a time is enough.
        check: Whether all files are compared with their hashes first.
        say: Told, in sentences, what of a prompt is not read; None warns.

    Raises:
        UsageError: If the runtime or the provider is not there.
        ExportError: If the bundle is not whole.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        runtime: Runtime = "onnx",
        provider: str = CPU,
        provider_options: Mapping[str, str] | None = None,
        threads: int = 0,
        keep: bool = True,
        check: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> None:
        engine = Engine(runtime, provider, provider_options or {}, threads)
        engine.check()
        self._bundle = Bundle(Path(folder), check=check)
        self._reader = TextReader(self._bundle, engine)
        self._stages = [Stage(facts, engine) for facts in self._bundle.stages]
        self._keep, self._say = keep, say or _warn

    def close(self) -> None:
        """Frees what is loaded; the next call loads it again."""
        self._reader.close()
        for stage in self._stages:
            stage.close()

    def __enter__(self) -> "Cascade":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def image_sizes(self) -> list[int]:
        """Side of each stage's square pictures in pixels, from the smallest on."""
        return [facts.size for facts in self._bundle.stages]

    def settings(self, *, stages: int | None = None, **options: Any) -> list[Settings]:
        """How each stage would be sampled.

        Args:
            stages: How many of them, from the first; None takes all.
            options: As for `sample`.

        Raises:
            UsageError: Naming the option that is wrong.
        """
        facts = self._bundle.stages[:stages]
        settings = settings_of(facts, options)
        if not is_blank(options.get("negative_prompt") or ""):
            check_negative(facts, settings)
        return settings

    def sample(
        self, prompts: str | Sequence[str], *, on_step: OnStep | None = None, **options: Any
    ) -> list[Image.Image]:
        """Makes pictures from prompts; the same as the run's, to 1/255.

        Args:
            prompts: One caption, or P of them.
            on_step: Told of each step: U-Net number from 1, steps done, steps in all.
            options: `seed` (0; the j-th picture of a prompt uses seed + j), `num` (1),
                `negative_prompt`, `tile`, `at_once`; and of stages, one value or a list, by default
                the bundle's: `steps`, `cond_scale`, `sampler`, `spacing`, `eta`, `threshold`,
                `guidance_interval`, `cache_interval`.

        Returns:
            P * num RGB pictures of the last stage; those of one prompt stand together.

        Raises:
            UsageError: Naming the option that is wrong, before any work.
            ExportError: If a graph cannot be loaded or computed.
        """
        return [made.image for made in self.stream(prompts, on_step=on_step, **options)]

    def stream(
        self, prompts: str | Sequence[str], *, on_step: OnStep | None = None, **options: Any
    ) -> Iterator[Sample]:
        """`sample`, each picture with all its stages, 64 pictures at a time."""
        captions = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_call(captions, options)
        settings = self.settings(**options)
        seed, num = options.get("seed") or 0, options.get("num") or 1
        wanted = [Wanted(caption, seed + j) for caption in captions for j in range(num)]
        negative = options.get("negative_prompt")
        made = self.draw(
            wanted, settings, negative_prompt=negative, tile=options.get("tile"),
            at_once=options.get("at_once"), on_step=on_step,
        )  # fmt: skip
        return self._told(made, captions, negative or "")

    def draw(
        self,
        wanted: Sequence[Wanted],
        settings: Sequence[Settings],
        *,
        negative_prompt: str | None = None,
        tile: int | None = None,
        at_once: int | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Sample]:
        """Makes pictures that have a seed and a guidance of their own, 64 at a time.

        Args:
            wanted: What to make.
            settings: From `settings`, of the stages that pictures go through.
            negative_prompt: As for `sample`, and so are `tile`, `at_once` and `on_step`.
            tile: See there.
            at_once: See there.
            on_step: See there.

        Raises:
            UsageError: If the tile does not fit a stage, before any work.
            ExportError: If a graph cannot be loaded or computed.
        """
        stages = self._stages[: len(settings)]
        tiles = [stage.tile_for(tile) for stage in stages]
        ways = list(zip(stages, settings, tiles, strict=True))
        groups = (wanted[start : start + GROUP] for start in range(0, len(wanted), GROUP))
        return (
            sample
            for group in groups
            for sample in self._group(group, ways, negative_prompt or "", at_once, on_step)
        )

    def _group(
        self,
        group: Sequence[Wanted],
        ways: Sequence[tuple[Stage, Settings, int | None]],
        negative: str,
        at_once: int | None,
        on_step: OnStep | None,
    ) -> Iterator[Sample]:
        prompts, seeds = [one.prompt for one in group], [one.seed for one in group]
        texts = [
            (self._conditioned(stage.facts, prompts), self._conditioned(stage.facts, [negative]))
            for stage, _, _ in ways
        ]
        lost = self._reader.not_read("negative_prompt", negative, len(ways))
        not_read = [
            [*self._reader.not_read("prompt", prompt, len(ways)), *lost] for prompt in prompts
        ]
        if not self._keep:
            self._reader.close()
        made: list[np.ndarray] = []
        for number, ((text, null), (stage, settings, tile)) in enumerate(
            zip(texts, ways, strict=True)
        ):
            scales = [
                one.cond_scales[number] if one.cond_scales else settings.cond_scale
                for one in group
            ]  # fmt: skip
            inputs = Inputs(text, null, seeds, scales, made[-1] if made else None)
            made.append(stage.sample(inputs, settings, tile=tile, at_once=at_once, on_step=on_step))
            if not self._keep:
                stage.close()
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            images = [Image.fromarray(to_uint8(stage[i : i + 1])[0]) for stage in made]
            yield Sample(prompt, seed, images, not_read[i])

    def _told(self, made: Iterator[Sample], prompts: list[str], negative: str) -> Iterator[Sample]:
        """The same pictures, once it was said what is not read of their prompts."""
        told = {("negative_prompt", negative), *(("prompt", prompt) for prompt in prompts)}
        for what, prompt in sorted(told):
            for sentence in self._reader.sentences(what, prompt):
                self._say(sentence)
        yield from made

    def _conditioned(self, stage: StageFacts, prompts: list[str]) -> Conditioned:
        found = {prompt: self._reader.conditioned(stage, prompt) for prompt in set(prompts)}
        parts = zip(*(found[prompt] for prompt in prompts), strict=True)
        return Conditioned(*(np.concatenate(part) for part in parts))


def _check_call(captions: list[str], options: dict[str, Any]) -> None:
    if not captions:
        raise UsageError("prompts: there is none; give one caption or more.")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise UsageError(f"prompts[{i}]: {caption!r} is not a string.")
    for name in options:
        if name not in OPTIONS:
            raise UsageError(f"{name}: there is no such option; there are {', '.join(OPTIONS)}.")
    for name, least in (("seed", 0), ("num", 1), ("tile", 1), ("at_once", 1)):
        value = options.get(name)
        if value is not None and (not is_whole(value) or not least <= value < 2**63):
            raise UsageError(
                f"{option(name)} {str(value)[:40]}: must be a whole number from {least} on, below "
                f"2^63."
            )
    check_seeds(options.get("seed") or 0, options.get("num") or 1)
    negative = options.get("negative_prompt")
    if not isinstance(negative, str | None):
        raise UsageError(f"{option('negative_prompt')} {negative!r}: is not a string.")


def _warn(sentence: str) -> None:
    warnings.warn(spelled(sentence), stacklevel=2)
