"""What the server needs of a cascade, be it a run's or a bundle's; no torch."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.unread import NotRead
from imagen_scale.sampling.wanted import Wanted

OnStep = Callable[[int, int, int], None]  # told the U-Net's number, steps done, steps in all


class Drawn(NamedTuple):
    """One finished picture."""

    seed: int
    image: Image.Image  # of the last stage that was asked for, RGB
    not_read: list[NotRead]  # of its prompt and of the negative one


class ServedCascade(Protocol):
    """Stages that stay loaded; `draw` is called by one thread."""

    @property
    def sizes(self) -> Sequence[int]:
        """Side of each stage's square pictures in pixels, from the smallest on."""
        ...

    def settings(self, options: SamplingOptions, stages: int) -> list[StageSettings]:
        """How stages would be sampled, the first so many of them.

        Raises:
            UsageError: Naming the option that is wrong, or that the cascade was not made for.
        """
        ...

    def draw(
        self,
        wanted: Sequence[Wanted],
        settings: Sequence[StageSettings],
        negative_prompt: str | None,
        on_step: OnStep,
    ) -> Iterator[Drawn]:
        """Makes pictures, in order, through as many stages as there are settings.

        Args:
            wanted: What to make.
            settings: From `settings`.
            negative_prompt: What guidance leads away from.
            on_step: Told of each step; what it raises ends the work.

        Raises:
            CardProblem: If nothing can be drawn any more.
            ImagenScaleError: If they cannot be made.
        """
        ...
