"""The side of tiles that a stage is computed in."""

from imagen_scale.config import StageConfig
from imagen_scale.errors import UsageError, option


def smaller_tile(stage: StageConfig, tile: int | None) -> int | None:
    """Side of a stage's tiles in pixels; None where it is no larger than one, or none is asked for.

    Args:
        stage: Makes pictures of `stage.size` pixels.
        tile: As `SamplingOptions.tile` has it.
    """
    return tile if tile is not None and tile < stage.size else None


def check_tile(stage: StageConfig, tile: int) -> None:
    """Refuses tiles that a network cannot halve as often as it does.

    Raises:
        UsageError: With what it takes.
    """
    divisor = stage.unet.size_divisor
    if tile < 1 or tile % divisor:
        raise UsageError(
            f"{option('tile')} {tile}: {stage.name} takes tiles in multiples of {divisor} px."
        )
