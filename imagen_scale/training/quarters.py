"""The loss at little noise and at much."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.training.ranks import sum_over_ranks
from imagen_scale.training.stepping import Stepped

QUARTERS = 4


def quarter_of_times(schedule: NoiseSchedule) -> Tensor:
    """The quarter of the schedule's log-SNR in which each time lies, (T,) int64.

    0 has the least noise. A last time of noise alone belongs to the last quarter and bounds none.
    """
    log_snr = schedule.snr.log()
    most, least = log_snr[0], log_snr[log_snr.isfinite()][-1]
    place = (most - log_snr) / (most - least) * QUARTERS
    return place.clamp(0, QUARTERS - 1).long()


def losses_by_quarter(schedule: NoiseSchedule, steps: Sequence[Stepped]) -> dict[str, float]:
    """Mean loss of the samples in each quarter of the log-SNR; all ranks together.

    Args:
        schedule: That the samples were noised with.
        steps: Since the last report; as many on every rank.

    Returns:
        By name, "loss_quarter_1" with the least noise; a quarter without a sample is left out.
    """
    if not steps:
        return {}
    sums = sum_over_ranks(quarter_sums(schedule, steps))
    return {
        f"loss_quarter_{number}": total / count
        for number, (total, count) in enumerate(zip(*sums, strict=True), start=1)
        if count
    }


def quarter_sums(schedule: NoiseSchedule, steps: Sequence[Stepped]) -> Tensor:
    """Sum of this rank's losses and number of its samples in each quarter, (2, 4) float64."""
    losses = torch.cat([step.losses for step in steps]).double()
    quarter = quarter_of_times(schedule)[torch.cat([step.times for step in steps])]
    own = F.one_hot(quarter, QUARTERS).to(losses)
    return torch.stack(((own * losses[:, None]).sum(0), own.sum(0)))
