"""Steps that were left out: whose samples did it, and when there are too many in a row."""

import torch

from imagen_scale.training.job import Job
from imagen_scale.training.ranks import world_size
from imagen_scale.training.stepping import Stepped
from imagen_scale.training.telemetry import Telemetry

NAMED = 8  # samples in a message


class SkippedSteps:
    """Counts the steps left out in a row.

    Args:
        job: The training.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.in_a_row = job, 0

    def end_of_row(self) -> None:
        """Notes a step that was applied."""
        self.in_a_row = 0

    def tell(self, step: int, stepped: Stepped, telemetry: Telemetry | None) -> str | None:
        """Says which samples spoiled a step; all ranks together.

        In fp16 a gradient that overflows while every loss is finite is no fault: the scale was too
        large, and is lowered. Such steps are said and counted apart, and end no row.

        Args:
            step: The one left out, from 1.
            stepped: What this rank did in it.
            telemetry: On rank 0.

        Returns:
            Why training cannot go on like this, once `training.max_skipped` is reached; else None.
        """
        spoilers, name = self._spoilers(stepped), self.job.stage.name
        if not spoilers and stepped.loss_scale is not None:
            self.job.say(
                f"{name}: step {step} left out: a gradient overflowed fp16 at loss scale "
                f"{stepped.loss_scale:g}, which is lowered"
            )
            if telemetry is not None:
                telemetry.write(step, overflow=1)
            return None
        self.in_a_row += 1
        reason = _reason(spoilers)
        self.job.say(f"WARNING: {name}: step {step} left out: {reason}")
        if telemetry is not None:
            telemetry.write(step, skipped=1)
        if self.in_a_row < self.job.stage.training.max_skipped:
            return None
        return f"{name}: {self.in_a_row} steps in a row left out; of the last {reason}"

    def _spoilers(self, stepped: Stepped) -> list[str]:
        """Keys of the samples of all ranks whose loss was not finite."""
        is_bad = (~stepped.losses.isfinite()).tolist()
        samples, keys = self.job.samples.train, self.job.prepared.source.keys
        own = [
            keys[samples.picture(position)]
            for position, bad in zip(stepped.positions, is_bad, strict=True)
            if bad
        ]
        by_rank: list[list[str]] = [[] for _ in range(world_size())]
        torch.distributed.all_gather_object(by_rank, own)
        return [key for keys_of_rank in by_rank for key in keys_of_rank]


def _reason(spoilers: list[str]) -> str:
    if not spoilers:
        return "a gradient was not finite, though every loss was"
    more = " ..." if len(spoilers) > NAMED else ""
    return f"the loss of {', '.join(spoilers[:NAMED])}{more} was not finite"
