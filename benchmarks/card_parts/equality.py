"""What has to come out equal on a card: MinImagen's numbers, recomputation, a continued run."""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from check_golden import TOLERANCE, check
from support import ROOT
from torch import Tensor

from card_parts.measurement import Differs
from card_parts.pictures import random_inputs, sampled_stage
from card_parts.scenes import scene, written
from card_parts.steps import feed, losses_of, micro_batches, missed, session_of, weights_of
from card_parts.timing import device, without_tf32
from card_parts.ways import BATCH, Way, setup_of
from imagen_scale.config import StageConfig
from imagen_scale.config.section import CheckpointingLevel
from imagen_scale.diffusion.names import Sampler
from imagen_scale.planning.setup import Setup
from imagen_scale.sampling.options import StageSettings
from imagen_scale.training.building import build_unet
from imagen_scale.training.feed import Feed
from imagen_scale.training.objective import Objective
from imagen_scale.training.session import Session
from imagen_scale.training.shards import file_name, load_shards, save_shard

RECORDS = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
# A card's convolutions add in another order, and some (Winograd) round more often.
CARD_TOLERANCE = 1e-4
SAMPLERS_TOLERANCE = 1e-2  # of pixel values in [-1, 1]: a level of 8 bits is 0.0078
RESUMED, GOING_ON = 3, 3  # steps before the checkpoint and after it


def golden(record: str) -> dict[str, Any]:
    """The network beside what MinImagen computed, fp32 without TF32.

    Raises:
        Differs: If an output is further away than rounding explains.
    """
    without_tf32()
    errors = check(ROOT / "tests" / "golden" / record, device())
    errors = {name: error for name, error in errors.items() if not name.startswith("schedule/")}
    worst = max(errors, key=lambda name: errors[name])
    # The mean of the posterior is ten times as far on the CPU, too.
    outputs = [error for name, error in errors.items() if not name.endswith("p_mean")]
    bound = TOLERANCE if device().type == "cpu" else CARD_TOLERANCE
    figures = {"error": max(outputs), "bound": bound, "worst": worst, "worst_error": errors[worst]}
    if not (max(outputs) <= bound and errors[worst] <= 10 * bound):
        raise Differs(f"{worst} is {errors[worst]:.1e} away", **figures)
    return figures


def checkpointing(level: CheckpointingLevel, precision: str, *, rehearse: bool) -> dict[str, Any]:
    """Gradients with recomputation beside those without; "none" beside itself is the noise.

    Raises:
        Differs: If they are further away than two passes without recomputation may be.
    """
    without_tf32()
    config = written(
        scene(rehearse=rehearse).small, precision=precision, tf32=False, global_batch=BATCH
    )
    worst, is_equal = 0.0, True
    for stage in config.stages():
        setup = setup_of(stage)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        reference = _gradients(stage, setup, "none", dtype)
        found = _gradients(stage, setup, level, dtype)
        is_equal &= all(torch.equal(found[name], reference[name]) for name in reference)
        worst = max(worst, *(_difference(found[name], reference[name]) for name in reference))
    bound = 1e-4 if precision == "fp32" else 0.05
    figures = {"error": worst, "bound": bound, "is_equal": is_equal}
    if not worst <= bound:
        raise Differs(f"gradients differ by {worst:.1e} of the largest", **figures)
    return figures


def _gradients(
    stage: StageConfig, setup: Setup, level: CheckpointingLevel, dtype: torch.dtype
) -> dict[str, Tensor]:
    levels = (level,) * stage.unet.num_levels
    unet = build_unet(stage, setup._replace(checkpointing=levels)).to(device(), dtype)
    objective = Objective(stage, device())
    batch = next(micro_batches(stage, BATCH))
    objective.losses(unet, batch).mean().backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


def _difference(found: Tensor, expected: Tensor) -> float:
    largest = expected.abs().max().clamp_min(1e-30)
    return ((found - expected).abs().max() / largest).item()


def resume(way: list[str], *, rehearse: bool) -> dict[str, Any]:
    """What comes after a checkpoint beside the end of a run that was not interrupted.

    Raises:
        Differs: If its weights are further away than those of two uninterrupted runs.
    """
    without_tf32()
    stage = Way(*way).stage(rehearse=rehearse, deterministic=True)
    setup = setup_of(stage)
    start, whole = _whole_run(stage, setup)
    _, again = _whole_run(stage, setup)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / file_name(0)
        with session_of(stage, setup) as session:
            batches = feed(session)
            losses_of(session, batches, RESUMED)
            save_shard(session.engine, session.averages, setup.optimizer, shard)
        with session_of(stage, setup) as session:
            load_shards(session.engine, session.averages, setup.optimizer, Path(folder))
            session.engine.publish()
            session.step = RESUMED
            later = islice(micro_batches(stage, setup.micro_batch),
                           RESUMED * setup.accumulation, None)  # fmt: skip
            resumed = _end_of_run(session, feed(session, later))
    noise, error = (missed(run.weights, whole.weights, start) for run in (again, resumed))
    is_equal = resumed.losses == whole.losses and error == 0
    figures = {"error": error, "noise": noise, "is_equal": is_equal,
               "bound": max(10 * noise, 1e-3), "first": resumed.losses[0],
               "last": resumed.losses[-1], "expected": whole.losses[-1]}  # fmt: skip
    if not error <= figures["bound"]:
        raise Differs(f"weights differ by {error:.1e} of what they moved", **figures)
    return figures


class End(NamedTuple):
    """How a run ends."""

    losses: list[float]  # after the checkpoint
    weights: dict[str, Tensor]


def _whole_run(stage: StageConfig, setup: Setup) -> tuple[dict[str, Tensor], End]:
    """The weights at its start, and its end."""
    with session_of(stage, setup) as session:
        start = weights_of(session)
        batches = feed(session)
        losses_of(session, batches, RESUMED)
        return start, _end_of_run(session, batches)


def _end_of_run(session: Session, batches: Feed) -> End:
    return End(losses_of(session, batches, GOING_ON), weights_of(session))


def samplers(sampler: Sampler, *, rehearse: bool) -> dict[str, Any]:
    """Pictures of a card beside those of the CPU, from the same noise, in fp32.

    Raises:
        Differs: If a pixel is further away than a level of 8 bits.
    """
    without_tf32()
    small = scene(rehearse=rehearse).small
    worst = 0.0
    for number in (1, 2):
        made = []
        for where in (torch.device("cpu"), device()):
            with sampled_stage(small, number, where, runtime="torch", precision="fp32") as stage:
                inputs = random_inputs(stage.config, 2)
                settings = StageSettings(steps=10, cond_scale=3.0, sampler=sampler)
                made.append(stage.sample(inputs, settings))
        worst = max(worst, (made[0] - made[1]).abs().max().item())
    figures = {"error": worst, "bound": SAMPLERS_TOLERANCE}
    if not worst <= SAMPLERS_TOLERANCE:
        raise Differs(f"a pixel differs by {worst:.1e}", **figures)
    return figures
