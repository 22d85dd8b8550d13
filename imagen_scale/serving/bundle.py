"""A bundle's stages, held for the server; no torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagen_scale_runtime import Cascade
from imagen_scale_runtime import Wanted as TheirWanted
from imagen_scale_runtime.errors import ImagenScaleError as TheirError
from imagen_scale_runtime.settings import PER_STAGE, Settings

from imagen_scale import errors
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.unread import NotRead
from imagen_scale.sampling.wanted import Wanted
from imagen_scale.serving.contract import Drawn, OnStep


class ServedBundle:
    """A `ServedCascade` of a bundle's graphs.

    Args:
        folder: The bundle's.
        unet_limit: Use only the first so many U-Nets.
        tile: Side of the tiles of large stages in pixels.
        how: `runtime`, `provider`, ... of `imagen_scale_runtime.Cascade`; None is its default.

    Raises:
        UsageError: If the runtime or the provider is not there, or an option does not fit.
        ExportError: If the bundle is not whole.
    """

    def __init__(
        self, folder: Path, *, unet_limit: int | None = None, tile: int | None = None, **how: Any
    ) -> None:
        given = {name: value for name, value in how.items() if value is not None}
        with _our_errors():
            self._cascade = Cascade(folder, **given)
        self._tile, sizes = tile, self._cascade.image_sizes
        if unet_limit is not None and not 1 <= unet_limit <= len(sizes):
            raise errors.UsageError(
                f"{errors.option('unet_limit')} {unet_limit}: this cascade has U-Nets 1 to "
                f"{len(sizes)}."
            )
        self.sizes = sizes[:unet_limit]

    def settings(self, options: SamplingOptions, stages: int) -> list[StageSettings]:
        """See `ServedCascade`; what is not given is the bundle's."""
        asked = {
            name: getattr(options, name)
            for name in (*PER_STAGE, "negative_prompt")
            if name in options.model_fields_set
        }
        with _our_errors():
            settings = self._cascade.settings(stages=stages, **asked)
        return [StageSettings(**of_stage._asdict()) for of_stage in settings]

    def draw(
        self,
        wanted: Sequence[Wanted],
        settings: Sequence[StageSettings],
        negative_prompt: str | None,
        on_step: OnStep,
    ) -> Iterator[Drawn]:
        """See `ServedCascade`."""
        with _our_errors():
            for made in self._cascade.draw(
                [TheirWanted(*one) for one in wanted],
                [Settings(**of_stage.model_dump()) for of_stage in settings],
                negative_prompt=negative_prompt, tile=self._tile, on_step=on_step,
            ):  # fmt: skip
                yield Drawn(made.seed, made.image, [NotRead(*lost) for lost in made.not_read])


@contextmanager
def _our_errors() -> Iterator[None]:
    """Makes the runtime's errors ours: its file of them is this package's own, imported twice."""
    try:
        yield
    except TheirError as error:
        raise getattr(errors, type(error).__name__)(error.marked) from None
