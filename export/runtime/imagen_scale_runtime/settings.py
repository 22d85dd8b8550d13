"""How each stage is sampled: what the bundle says, changed by what the caller asks for."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

from .bundle import StageFacts
from .diffusion.guidance import branches, shares
from .diffusion.names import Sampler, Spacing, SpacingChoice
from .errors import UsageError, option
from .sampling.per_stage import columns_of

PER_STAGE = (
    "steps", "cond_scale", "sampler", "spacing", "eta", "threshold", "guidance_interval",
    "cache_interval",
)  # fmt: skip

MAY_BE_NONE = ("threshold", "guidance_interval")  # of one stage among several
MOST_SCALE = 3e38  # of guidance: float32 holds it


class Settings(NamedTuple):
    """How one stage is sampled; see the main package's `SamplingOptions` for their meaning."""

    steps: int
    cond_scale: float
    sampler: Sampler
    spacing: Spacing
    eta: float
    threshold: float | None  # percentile of dynamic thresholding; None: the stage's own way
    guidance_interval: str | None  # "FROM:UNTIL", shares of the steps; None: guidance in all
    cache_interval: int  # one evaluation of so many is whole


def settings_of(stages: Sequence[StageFacts], asked: dict[str, Any]) -> list[Settings]:
    """The settings of each stage.

    Args:
        stages: In order.
        asked: By name; None, a value for all stages, or a list with one for each. A single
            `cond_scale` is the base stage's, and the others take 1.

    Raises:
        UsageError: Naming the option that is wrong.
    """
    for name in PER_STAGE:
        if name not in MAY_BE_NONE and isinstance(asked.get(name), list) and None in asked[name]:
            raise UsageError(f"{option(name)} {asked[name]}: give a value for each stage.")
    columns = columns_of({name: asked.get(name) for name in PER_STAGE}, len(stages))
    return [
        _of_stage(stage, {name: columns[name][i] for name in PER_STAGE})
        for i, stage in enumerate(stages)
    ]


def check_negative(stages: Sequence[StageFacts], settings: Sequence[Settings]) -> None:
    """Refuses a negative prompt where no stage is guided, or one would take it for its text.

    Raises:
        UsageError: With what to do instead.
    """
    are_led = ["null" in branches(of_stage.cond_scale) for of_stage in settings]
    if not any(are_led):
        raise UsageError(
            f"{option('negative_prompt')}: acts through guidance, and every "
            f"{option('cond_scale')} is 1, which is none; give one above 1."
        )
    for stage, is_led in zip(stages, are_led, strict=True):
        if stage["few_steps"] and is_led:
            raise UsageError(
                f"{option('negative_prompt')}: {stage.name} learned to take few steps without "
                f"one; leave it out."
            )


def _of_stage(stage: StageFacts, asked: dict[str, Any]) -> Settings:
    own = {
        **stage["settings"], "threshold": None, "guidance_interval": None, "cache_interval": 1
    }  # fmt: skip
    chosen = {name: own[name] if asked[name] is None else asked[name] for name in PER_STAGE}
    if chosen["spacing"] == "auto":
        chosen["spacing"] = own["spacing"]
    _check(chosen)
    if stage["few_steps"]:
        for name in PER_STAGE:
            # Without text it may be sampled too.
            allowed: tuple[Any, ...] = (own[name], 0) if name == "cond_scale" else (own[name],)
            if chosen[name] not in allowed:
                raise UsageError(
                    f"{option(name)} {chosen[name]}: {stage.name} learned to take few steps in "
                    f"its own way; leave {option(name)} out."
                )
    if asked["steps"] is None:  # of a bundle from before steps were held to the times
        chosen["steps"] = min(chosen["steps"], stage.schedule.timesteps)
    elif chosen["steps"] > stage.schedule.timesteps:
        raise UsageError(
            f"{option('steps')} {chosen['steps']}: {stage.name} has {stage.schedule.timesteps} "
            f"times; take at most so many."
        )
    if chosen["cache_interval"] > 1 and not stage.has_shallow:
        raise UsageError(
            f"{option('cache_interval')} {chosen['cache_interval']}: the graphs of {stage.name} "
            f"compute every evaluation whole; export the bundle with --cache, or give 1 for it."
        )
    return Settings(**chosen)


def _check(chosen: dict[str, Any]) -> None:
    eta, threshold = chosen["eta"], chosen["threshold"]
    for name in ("steps", "cache_interval"):
        if not is_whole(chosen[name]) or chosen[name] < 1:
            raise UsageError(f"{option(name)} {chosen[name]!r}: must be a whole number from 1 on.")
    for name, names in (("sampler", Sampler), ("spacing", SpacingChoice)):
        if chosen[name] not in get_args(names):
            raise UsageError(
                f"{option(name)} {chosen[name]!r}: take one of {', '.join(get_args(names))}."
            )
    if not _is_number(chosen["cond_scale"]) or abs(chosen["cond_scale"]) > MOST_SCALE:
        raise UsageError(
            f"{option('cond_scale')} {str(chosen['cond_scale'])[:40]}: must be a finite number."
        )
    if not _is_number(eta) or not 0 <= eta <= 1:
        raise UsageError(f"{option('eta')} {eta!r}: must be from 0 to 1.")
    if eta and chosen["sampler"] != "ddim":
        raise UsageError(
            f"{option('eta')} {eta}: goes with {option('sampler')} ddim, not {chosen['sampler']}."
        )
    if chosen["guidance_interval"]:
        shares(chosen["guidance_interval"])
    if threshold is not None and (not _is_number(threshold) or not 0 < threshold <= 1):
        raise UsageError(f"{option('threshold')} {threshold!r}: must be above 0 and at most 1.")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; Python's True is one, and none that anybody means."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
