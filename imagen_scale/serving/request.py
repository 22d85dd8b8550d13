"""A request for images: OpenAI's keys, and the options of sampling beside them."""

import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from imagen_scale.config.strict_json import parse_json
from imagen_scale.errors import UsageError, option
from imagen_scale.sampling.option_model import OptionModel
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.wanted import Wanted, check_seeds
from imagen_scale.serving.contract import ServedCascade
from imagen_scale.serving.limits import Limits
from imagen_scale.serving.refusal import Refusal
from imagen_scale.serving.waiting import Kind

SEEDS = 2**31  # one is drawn below it where none was given
# `n` stands for the first; how much memory a picture takes is the server's business.
NOT_ASKED = ("num", "tile", "at_once")
OWN = tuple(name for name in SamplingOptions.model_fields if name not in NOT_ASKED)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class OpenAIKeys(OptionModel):
    """What OpenAI's client sends and this server takes."""

    prompt: str
    n: Annotated[int, Field(ge=1)] = 1
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    model: str | None = None
    user: str | None = None  # read by nobody


KNOWN = (*OpenAIKeys.model_fields, *OWN)


class Asked(NamedTuple):
    """A request that can be answered."""

    wanted: list[Wanted]  # a picture each
    kind: Kind
    size: int  # of the pictures, in pixels
    streams: bool  # step by step


def read_request(body: bytes, cascade: ServedCascade, model: str, limits: Limits) -> Asked:
    """What a request asks for, checked before any work.

    Args:
        body: JSON.
        cascade: Is to draw it.
        model: What this server calls it.
        limits: How much may be asked for.

    Raises:
        Refusal: Of what is no JSON object, unknown or more than the limits.
        UsageError: Naming the key that is wrong.
    """
    given = _object(body)
    if unknown := [key for key in given if key not in KNOWN]:
        raise Refusal(
            400, f"{unknown[0][:60]!r}: unknown key; known are {', '.join(KNOWN)}.",
            param=unknown[0][:60], code="unknown_parameter",
        )  # fmt: skip
    if "prompt" not in given:
        raise UsageError(f"{option('prompt')}: there is none; say what to draw.")
    theirs = OpenAIKeys.make(**{k: v for k, v in given.items() if k in OpenAIKeys.model_fields})
    options = SamplingOptions.make(**{k: v for k, v in given.items() if k in OWN})
    if "seed" not in given:
        options = options.changed(seed=secrets.randbelow(SEEDS))
    if theirs.model not in (None, model):
        raise unknown_model(theirs.model or "", model)
    for name, text in (("prompt", theirs.prompt), ("negative_prompt", options.negative_prompt)):
        _check_text(name, text or "", limits.prompt)
    _check_most("n", theirs.n, limits.pictures)
    check_seeds(options.seed, theirs.n)
    stages = _stages_of(theirs.size, cascade.sizes)
    settings = cascade.settings(options, stages)
    _check_most("steps", max(one.steps for one in settings), limits.steps)
    scales = tuple(one.cond_scale for one in settings)
    return Asked(
        [Wanted(theirs.prompt, options.seed + j, scales) for j in range(theirs.n)],
        Kind.of(settings, options.negative_prompt),
        cascade.sizes[stages - 1],
        theirs.stream,
    )


def unknown_model(name: str, model: str) -> Refusal:
    """There is one model, and it has another name."""
    message = f"{option('model')} {name[:60]!r}: this server has {model!r} alone; leave it out."
    return Refusal(404, message.replace("\x1f", ""), param="model", code="model_not_found")


def _object(body: bytes) -> dict[str, Any]:
    """A JSON object without its nulls: to some clients they are what was not given.

    Raises:
        Refusal: If it is none.
    """
    try:
        given = parse_json(body.decode("utf-8"))
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(given, dict):
        raise Refusal(400, "the body is not a JSON object, like {\"prompt\": \"sun\"}.",
                      code="invalid_json")  # fmt: skip
    return {key: value for key, value in given.items() if value is not None}


def _stages_of(size: str, sides: Sequence[int]) -> int:
    """How many stages lead to a size.

    Raises:
        UsageError: With the sizes there are.
    """
    sizes = [f"{side}x{side}" for side in sides]
    if size == "auto":
        return len(sizes)
    if size not in sizes:
        raise UsageError(f"{option('size')} {size!r}: it should be auto, {', '.join(sizes)}.")
    return sizes.index(size) + 1


def _check_text(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise UsageError(f"{option(name)}: {len(text)} characters; at most {most} are read here.")
    if found := _CONTROL.search(text):
        raise UsageError(f"{option(name)}: holds the control character {found[0]!r}; leave it out.")


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise UsageError(f"{option(name)} {str(value)[:20]}: at most {most} here.")
