"""A run's stages, held for the server."""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from imagen_scale.data.storage import first_line
from imagen_scale.errors import CardProblem
from imagen_scale.files.pictures import to_uint8
from imagen_scale.sampling.card_loss import card_lost
from imagen_scale.sampling.groups import stream_groups
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.residents import Residents
from imagen_scale.sampling.stage import Listener
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.sampling.wanted import Wanted
from imagen_scale.serving.contract import Drawn, OnStep


class ServedRun:
    """A `ServedCascade` of trained stages.

    Args:
        stages: What is sampled.
        tile: Side of the tiles of large stages in pixels, as `SamplingOptions.tile`.
    """

    def __init__(self, stages: TrainedStages, *, tile: int | None = None) -> None:
        self.sizes = [config.size for config in stages.configs]
        self._tile = tile
        residents = Residents(stages.device)
        # A request may end the cascade at any stage. Prompts are no business of the log.
        self._cascades = {
            last: TrainedStages(
                stages.files[:last], stages.device, stages.runtime, say=stages.say,
                warn=lambda sentence: None, residents=residents,
            )
            for last in range(1, len(stages.files) + 1)
        }  # fmt: skip

    def settings(self, options: SamplingOptions, stages: int) -> list[StageSettings]:
        """See `ServedCascade`."""
        return self._cascades[stages].settings(options)

    def draw(
        self,
        wanted: Sequence[Wanted],
        settings: Sequence[StageSettings],
        negative_prompt: str | None,
        on_step: OnStep,
    ) -> Iterator[Drawn]:
        """See `ServedCascade`."""
        options = SamplingOptions.make(negative_prompt=negative_prompt, tile=self._tile)
        try:
            for picture in stream_groups(
                self._cascades[len(settings)], wanted, settings, options, Listener(on_step)
            ):
                (pixels,) = to_uint8(picture.stages[-1][None])
                yield Drawn(picture.seed, Image.fromarray(pixels), picture.not_read)
        except torch.AcceleratorError as error:
            raise CardProblem(card_lost("torch", first_line(error))) from None
