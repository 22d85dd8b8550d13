"""Part 3: what a switch gains or costs, on and off in turn: A B B A."""

import os
import statistics
import typing
from typing import Any, NamedTuple

import torch

from card_parts.measurement import LeftOut
from card_parts.scenes import Speed, scene, written
from card_parts.steps import Timed, session_of, timed_steps
from card_parts.ways import TO_HOST, setup_of
from imagen_scale.config import Config, TrainingConfig
from imagen_scale.training.memory_use import release_memory

ZERO_1 = {"stage": 1}
OFFLOADED = {"stage": 2, "offload_optimizer": TO_HOST}
ORDER = (0, 1, 1, 0)


class Switch(NamedTuple):
    """Two ways that differ in one thing."""

    name: str
    before: dict[str, Any]  # arguments of `scenes.written`
    after: dict[str, Any]
    micro_batches: int = 1  # of a step
    needs: str | None = None  # a key of `training` that must exist


def _key(key: str, precision: str | None = None, **common: Any) -> Switch:
    """A key of `training`, off and on."""
    fixed = common | ({} if precision is None else {"precision": precision})
    return Switch(f"`training.{key}`", fixed | {key: False}, fixed | {key: True}, needs=key)


def _levels(before: str, after: str) -> Switch:
    return Switch(
        f"checkpointing {before}, {after}",
        {"memory": {"checkpointing": before}}, {"memory": {"checkpointing": after}},
    )  # fmt: skip


SWITCHES = (
    _key("tf32", "fp32"),
    _key("cudnn_benchmark"),
    _key("channels_last"),
    _key("compile"),
    _key("deterministic"),
    Switch("`training.compile` and `channels_last`",
           {"compile": False, "channels_last": False}, {"compile": True, "channels_last": True},
           needs="compile"),
    _levels("none", "norms"),
    _levels("norms", "blocks"),
    Switch("ZeRO-1, optimizer offloaded", {"zero": ZERO_1}, {"zero": OFFLOADED}),
    Switch("offloaded, gradients accumulated in bf16, in fp32",
           {"zero": OFFLOADED}, {"zero": OFFLOADED, "data_types": {"grad_accum_dtype": "fp32"}}, 4),
    Switch("ZeRO-2, gradients accumulated in bf16, in fp32",
           {"zero": {"stage": 2}},
           {"zero": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}, 4),
    Switch("fp32, bf16", {"precision": "fp32"}, {"precision": "bf16"}),
)  # fmt: skip


def switch_named(name: str) -> Switch:
    """One of `SWITCHES`."""
    return next(switch for switch in SWITCHES if switch.name == name)


def measure(name: str, network: int, half: str, *, rehearse: bool) -> dict[str, Any]:
    """Times both ways in the order A B B A, each from its own start.

    Args:
        name: Of the switch.
        network: Place in the scene's list.
        half: The numbers of 16 bits that the card computes in, "fp32" for none.
        rehearse: Small networks.

    Raises:
        LeftOut: If the card lacks the numbers.
    """
    switch, what = switch_named(name), scene(rehearse=rehearse)
    if switch.needs == "deterministic":  # read when cuBLAS starts, and not again
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    speed = what.trained[network]
    ways = [_config(speed, switch, way, half) for way in (switch.before, switch.after)]
    found: list[list[Timed]] = [[], []]
    for which in ORDER:
        stage = ways[which].stage(speed.number)
        with session_of(stage, setup_of(stage)) as session:
            found[which].append(timed_steps(session, warm_up=what.warm_up, steps=what.steps))
        release_memory()
        torch.compiler.reset()
    before, after = (statistics.median(timed.step_s for timed in timeds) for timeds in found)
    images = speed.micro_batch * switch.micro_batches
    return {
        "before_s": before,
        "after_s": after,
        "faster": before / after,
        "each_s": [[timed.step_s for timed in timeds] for timeds in found],
        "before_images_per_s": images / before,
        "after_images_per_s": images / after,
        "before_bytes": max(timed.allocated for timed in found[0]),
        "after_bytes": max(timed.allocated for timed in found[1]),
        "losses": [timeds[0].losses[-1] for timeds in found],
    }


def _config(speed: Speed, switch: Switch, way: dict[str, Any], half: str) -> Config:
    """A configuration of one side of a switch."""
    if half == "fp32" and (way.get("precision") == "bf16" or "data_types" in way):
        raise LeftOut("this card has no bf16")
    common = {
        "zero": ZERO_1, "precision": half, "micro_batch": speed.micro_batch,
        "global_batch": speed.micro_batch * switch.micro_batches,
    }  # fmt: skip
    options = common | way
    if options["precision"] == "fp16" and "data_types" in way:
        raise LeftOut("bf16 only")
    return written(speed.config, **options)


def reason_to_leave_out(switch: Switch, *, rehearse: bool) -> str:
    """Why a switch cannot be measured with this version; empty where it can."""
    for key in (key for key in (switch.needs, *switch.after) if key is not None):
        if key not in ("zero", "memory", "data_types", "precision"):
            field = TrainingConfig.model_fields.get(key)
            if field is None:
                return f"this version has no training.{key}"
            if field.annotation is not bool and bool not in typing.get_args(field.annotation):
                return f"training.{key} is not true or false"
    if rehearse and switch.needs == "compile":
        return "a rehearsal compiles nothing: it would take minutes"
    return ""
