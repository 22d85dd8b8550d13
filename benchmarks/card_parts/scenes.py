"""What is trained and sampled: on a card, and in a rehearsal with networks that take no time."""

import json
from typing import Any, NamedTuple

from gpu_memory import CONFIGS, left_to_planner
from support import ROOT
from support.tiny import TINY

from imagen_scale.config import Config, load_config, parse_config

# Both kinds of network, small and of every layer there is, for comparing numbers.
_SMALL = {
    "imagen": {"image_sizes": [32, 64], "text_encoder_name": "minilm", "timesteps": 1000},
    "unets": [
        {"dim": 32, "dim_mults": [1, 2, 4], "layer_attns": [False, True, True],
         "layer_cross_attns": [False, True, True], "max_text_len": 32},
        {"dim": 32, "dim_mults": [1, 2, 4], "layer_attns": [False, False, True],
         "layer_cross_attns": [False, False, True], "max_text_len": 32, "memory_efficient": True,
         "pred_type": "v"},
    ],
}  # fmt: skip


class Speed(NamedTuple):
    """A stage on which switches are compared, and pictures made."""

    name: str
    config: dict[str, Any]
    number: int  # of the stage, from 1
    micro_batch: int


class Scene(NamedTuple):
    """Everything that a rehearsal does smaller."""

    small: dict[str, Any]  # for equality
    cascades: dict[str, Config]  # planned and trained within a limit
    trained: list[Speed]  # for the switches
    sampled: list[Speed]
    batches: tuple[int, ...]  # of pictures that are sampled together
    steps: int  # timed, after the warm-up
    warm_up: int
    evaluations: int  # timed, of a sampler's network
    matrix: int  # side of those whose product is timed


def scene(*, rehearse: bool) -> Scene:
    """What is measured."""
    if rehearse:
        tiny = _without_training(TINY)
        stages = [Speed("tiny", tiny, number, 4) for number in (1, 2)]
        return Scene(
            small=tiny, cascades={"tiny": left_to_planner(parse_config(json.dumps(TINY)))},
            trained=stages[:1], sampled=stages[1:], batches=(1, 2), steps=1, warm_up=1,
            evaluations=2, matrix=128,
        )  # fmt: skip
    files = {name: ROOT / "configs" / f"{name}.json" for name in (*CONFIGS, "pokemon_64")}
    base = _without_training(json.loads(files["pokemon_64"].read_text()))
    cascade = _without_training(json.loads(files["cascade_64_256"].read_text()))
    half = json.loads(json.dumps(cascade))  # a quarter of the weights: any card trains it
    half["unets"][1]["dim"] = 64
    return Scene(
        small=_SMALL,
        cascades={name: left_to_planner(load_config(files[name])) for name in CONFIGS},
        trained=[
            Speed("44 M, 64 px, batch 16", base, 1, 16),
            Speed("113 M, 64 -> 256 px, batch 4", half, 2, 4),
        ],
        sampled=[
            Speed("44 M, 64 px", base, 1, 16),
            Speed("444 M, 64 -> 256 px", cascade, 2, 4),
        ],
        batches=(1, 8), steps=8, warm_up=3, evaluations=10, matrix=8192,
    )  # fmt: skip


def written(
    base: dict[str, Any],
    *,
    zero: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    data_types: dict[str, Any] | None = None,
    **training: Any,
) -> Config:
    """A configuration with nothing left to choose.

    Args:
        base: `imagen` and `unets`.
        zero: `deepspeed.zero_optimization`; None leaves it out.
        memory: The section.
        data_types: DeepSpeed's.
        training: Keys of the section.

    Raises:
        ConfigError: If these do not go together.
    """
    deepspeed: dict[str, Any] = {} if zero is None else {"zero_optimization": zero}
    if data_types is not None:
        deepspeed["data_types"] = data_types
    training = {"warmup_steps": 0, "lr_schedule": "constant", "steps": 1000} | training
    sections = {"training": training, "memory": memory or {}, "deepspeed": deepspeed}
    return parse_config(json.dumps(base | sections))


def _without_training(data: dict[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in ("imagen", "unets")}
