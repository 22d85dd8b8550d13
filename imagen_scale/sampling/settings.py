"""How a stage is sampled."""

from typing import Any, NamedTuple

from imagen_scale.diffusion.sampler import Sampler
from imagen_scale.diffusion.spacing import Spacing
from imagen_scale.errors import UsageError


class Settings(NamedTuple):
    """How one stage is sampled."""

    steps: int = 25
    cond_scale: float = 1.0
    sampler: Sampler = "dpmpp_2m"
    spacing: Spacing = "trailing"
    eta: float = 0.0  # "ddim" only
    threshold: float | None = None  # percentile in (0, 1]; None takes the configuration's


DEFAULTS = Settings()


def is_guided(how: Settings) -> bool:
    """Whether a stage computes more than the branch with the text."""
    return how.cond_scale != 1


def _each(option: str, value: Any, stages: int) -> list[Any]:
    """One value per stage."""
    values = [value] * stages if value is None or isinstance(value, str | int | float) else value
    if len(values) != stages:
        raise UsageError(
            f"{option}: {len(values)} values for {stages} stage(s). Give one per stage, separated "
            f"by commas, or a single one."
        )
    return list(values)
