"""Every way to train, for a few steps: losses beside plain torch in fp32 on the CPU."""

from functools import cache
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from card_parts.measurement import Differs, LeftOut
from card_parts.scenes import scene, written
from card_parts.steps import (
    feed,
    losses_of,
    micro_batches,
    missed,
    session_of,
    take_noise_from_cpu,
    weights_of,
)
from card_parts.timing import without_tf32
from imagen_scale.config import StageConfig
from imagen_scale.config.section import OptimizerName, TrainingPrecision
from imagen_scale.errors import ConfigError
from imagen_scale.planning.setup import WHOLE_MATRICES, Setup, written_setup
from imagen_scale.training.building import build_unet
from imagen_scale.training.objective import Objective
from imagen_scale.training.optimizers import make_optimizer

STEPS, BATCH = 6, 8
TO_HOST = {"device": "cpu"}
ZEROS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-1, optimizer offloaded": {"stage": 1, "offload_optimizer": TO_HOST},
    "ZeRO-2, optimizer offloaded": {"stage": 2, "offload_optimizer": TO_HOST},
    "ZeRO-3, optimizer offloaded": {"stage": 3, "offload_optimizer": TO_HOST},
    "ZeRO-3, optimizer and weights offloaded":
        {"stage": 3, "offload_optimizer": TO_HOST, "offload_param": TO_HOST},
}  # fmt: skip
IN_BACKWARD = "inside backward"
# Largest relative difference of a loss from the reference that is not told to be wrong.
BOUNDS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
COARSE = {"adamw_8bit": 0.05, "adamw_bf16": 0.1}
# How far weights may be from the reference's, over how far those have moved. AdamW's first steps
# are as large for the smallest gradient, whose sign 16 bits may change.
MOST_MISSED = {"fp32": 0.1, "bf16": 0.5}


class Reference(NamedTuple):
    """What plain torch computes in fp32 on the CPU."""

    losses: list[float]
    start: dict[str, Tensor]  # the weights before the first step
    end: dict[str, Tensor]


class Way(NamedTuple):
    """One way to train."""

    precision: str
    optimizer: str
    where: str  # of `ZEROS`, or `IN_BACKWARD`

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.precision}, {self.optimizer}, {self.where}"

    def stage(self, *, rehearse: bool, deterministic: bool = False) -> StageConfig:
        """The base stage of the small cascade, trained this way.

        Args:
            rehearse: A smaller one.
            deterministic: The same bits each time.

        Raises:
            ConfigError: If the configuration refuses it.
        """
        in_backward = self.where == IN_BACKWARD
        config = written(
            scene(rehearse=rehearse).small,
            zero=None if in_backward else ZEROS[self.where],
            memory={"optimizer_in_backward": in_backward, "checkpointing": "norms"},
            precision=self.precision,
            optimizer=self.optimizer,
            grad_clip=None if in_backward else 1.0,
            tf32=False,
            deterministic=deterministic,
            global_batch=BATCH,
            micro_batch=BATCH if in_backward else BATCH // 2,
            lr=1e-3 if self.optimizer != "adafactor" else 1e-2,  # relative to the weights there
        )
        return config.stage(1)


def precisions() -> tuple[str, ...]:
    """What the configuration takes by name, fp32 first."""
    return tuple(
        sorted(set(get_args(TrainingPrecision)) - {"auto"}, key=lambda name: (name != "fp32", name))
    )


def ways() -> tuple[list[Way], list[Way]]:
    """Those that the configuration takes, and those that it refuses."""
    taken: list[Way] = []
    refused: list[Way] = []
    for precision in precisions():
        for optimizer in get_args(OptimizerName):
            for where in (*ZEROS, IN_BACKWARD):
                way = Way(precision, optimizer, where)
                try:
                    way.stage(rehearse=True)
                    taken.append(way)
                except ConfigError:
                    refused.append(way)
    return taken, refused


def setup_of(stage: StageConfig) -> Setup:
    """The setup that is written."""
    return written_setup(stage, 1, on_card=torch.cuda.is_available())


def refusal(taken: list[Way], refused: list[Way]) -> str:
    """Why some are not measured."""
    return (
        f"the configuration refuses {len(refused)} of {len(taken) + len(refused)} combinations, "
        f"e.g. {refused[0].name}"
    )


def measure(way: list[str], *, rehearse: bool) -> dict[str, Any]:
    """Losses of some steps, and their distance from the reference.

    Raises:
        Differs: If they are further from it than the numbers explain.
    """
    without_tf32()
    chosen = Way(*way)
    _check_card(chosen)
    stage = chosen.stage(rehearse=rehearse)
    optimizer = chosen.optimizer if chosen.optimizer in WHOLE_MATRICES else "adamw"
    reference = reference_of(optimizer, chosen.where == IN_BACKWARD, rehearse)
    with session_of(stage, setup_of(stage)) as session:
        take_noise_from_cpu(session.objective)
        found = losses_of(session, feed(session), STEPS)
        away = missed(weights_of(session), reference.end, reference.start)
    error = max(abs(a / b - 1) for a, b in zip(found, reference.losses, strict=True))
    bound = max(BOUNDS.get(chosen.precision, 0.05), COARSE.get(chosen.optimizer, 0))
    figures = {"first": found[0], "last": found[-1], "expected": reference.losses[-1],
               "error": error, "bound": bound, "missed": away}  # fmt: skip
    if not error <= bound:
        raise Differs(f"losses differ by {error:.1e}, more than {bound:g}", **figures)
    # With fp16 the first steps are left out until the scale of the loss is found.
    if not away <= MOST_MISSED.get(chosen.precision, float("inf")):
        raise Differs(f"weights moved elsewhere: {away:.2f} of the way", **figures)
    return figures


def _check_card(way: Way) -> None:
    """Leaves out what DeepSpeed takes and the card only emulates."""
    if way.precision == "bf16" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            raise LeftOut(f"compute capability {capability[0]}.{capability[1]} has no bf16")


@cache
def reference_of(optimizer_name: str, in_backward: bool, rehearse: bool) -> Reference:
    """The same steps in fp32 on the CPU: torch's optimizer, no engine, no micro-batches."""
    where = IN_BACKWARD if in_backward else "ZeRO-0"  # the one is not clipped, the other is
    stage = Way("fp32", optimizer_name, where).stage(rehearse=rehearse)
    setup = setup_of(stage)
    unet = build_unet(stage, setup._replace(checkpointing=("none",) * stage.unet.num_levels))
    start = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    optimizer = make_optimizer(unet.named_parameters(), stage, setup)
    objective, batches = Objective(stage, torch.device("cpu")), micro_batches(stage, BATCH)
    losses = []
    for _ in range(STEPS):
        loss = objective.losses(unet, next(batches)).mean()
        optimizer.zero_grad()
        loss.backward()
        if stage.training.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), stage.training.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return Reference(losses, start, {name: p.detach() for name, p in unet.named_parameters()})
