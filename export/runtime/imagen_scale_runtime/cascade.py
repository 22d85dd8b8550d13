"""A bundle in Python: prompts in, PIL pictures out."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .bundle import Bundle, Conditioned, StageFacts
from .errors import UsageError, option, spelled
from .graphs import CPU, Engine, Runtime
from .pictures import to_uint8
from .settings import PER_STAGE, Settings, check_negative, settings_of
from .stage import Inputs, OnStep, Stage
from .text import TextReader

GROUP = 64  # pictures that go through all stages together
OPTIONS = (*PER_STAGE, "seed", "num", "negative_prompt", "tile", "at_once")


class Sample(NamedTuple):
    """One finished picture, and what it was made from."""

    prompt: str
    seed: int
    stages: list[Image.Image]  # of each stage, from the smallest on, RGB

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

    def settings(self, **options: Any) -> list[Settings]:
        """How each stage would be sampled.

        Raises:
            UsageError: Naming the option that is wrong.
        """
        settings = settings_of(self._bundle.stages, options)
        if options.get("negative_prompt"):
            check_negative(settings)
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
                `guidance_interval`.

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
        tiles = [stage.tile_for(options.get("tile")) for stage in self._stages]
        seed, num = options.get("seed") or 0, options.get("num") or 1
        wanted = [(caption, seed + j) for caption in captions for j in range(num)]
        return self._groups(wanted, settings, tiles, options, on_step)

    def _groups(
        self,
        wanted: list[tuple[str, int]],
        settings: list[Settings],
        tiles: list[int | None],
        options: dict[str, Any],
        on_step: OnStep | None,
    ) -> Iterator[Sample]:
        negative = options.get("negative_prompt") or ""
        told = {("negative_prompt", negative), *(("prompt", prompt) for prompt, _ in wanted)}
        for what, prompt in sorted(told):
            self._reader.tell_of_the_unread(what, prompt, self._say)
        for start in range(0, len(wanted), GROUP):
            group = wanted[start : start + GROUP]
            texts = [
                (self._conditioned(stage.facts, [prompt for prompt, _ in group]),
                 self._conditioned(stage.facts, [negative]))
                for stage in self._stages
            ]  # fmt: skip
            if not self._keep:
                self._reader.close()
            made: list[np.ndarray] = []
            for stage, (text, null), of_stage, tile in zip(
                self._stages, texts, settings, tiles, strict=True
            ):
                lowres = made[-1] if made else None
                inputs = Inputs(text, null, [seed for _, seed in group], lowres)
                made.append(
                    stage.sample(
                        inputs, of_stage, tile=tile, at_once=options.get("at_once"),
                        on_step=on_step,
                    )
                )  # fmt: skip
                if not self._keep:
                    stage.close()
            for i, (prompt, seed) in enumerate(group):
                images = [Image.fromarray(to_uint8(stage[i : i + 1])[0]) for stage in made]
                yield Sample(prompt, seed, images)

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
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{option(name)} {value!r}: must be a whole number from {least} on.")


def _warn(sentence: str) -> None:
    warnings.warn(spelled(sentence), stacklevel=2)
