"""Low-resolution pictures of training samples other than the samples themselves made small."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from imagen_scale.data.degradation import degraded
from imagen_scale.data.seeds import seeded
from imagen_scale.data.sources.images import PixelArray


@dataclass(frozen=True)
class LowresInputs:
    """Which samples of a super-resolution stage get another low-resolution picture, and which.

    What a sample gets depends on the seed and its position alone.

    Attributes:
        side: Of the low-resolution pictures in pixels.
        seed: Of the choice.
        degrade: Share of the samples that are made worse; see `degraded`.
        samples: Share that gets the picture as the stage before draws it.
        drawn: These pictures by the number of the picture in the source, (3, side, side) each.
    """

    side: int
    seed: int
    degrade: float = 0.0
    samples: float = 0.0
    drawn: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def of(
        self, i: int, image: PixelArray, position: int, *, is_mirrored: bool
    ) -> PixelArray | None:
        """What stands for the picture made small; None where nothing does.

        Args:
            i: Number of the picture in the source.
            image: The picture, (3, H, H), mirrored if it is to be.
            position: In the sequence of samples.
            is_mirrored: Whether it is.
        """
        choice = seeded("lowres", self.seed, position) / 2**63
        if choice < self.degrade:
            return degraded(image, self.side, seeded("degraded", self.seed, position))
        if choice < self.degrade + self.samples and i in self.drawn:
            small = self.drawn[i]
            return small[:, :, ::-1] if is_mirrored else small
        return None
