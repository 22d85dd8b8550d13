"""Segment distillation: what a student that takes few steps learns of a teacher that takes many.

The student's K steps divide the times into K segments. In each the teacher takes m steps of its own
solver, and the student learns the one picture with which a single DDIM step from the segment's
beginning lands where the teacher did. With m = 2 and a student for a teacher this is the
progressive distillation of Salimans & Ho 2022, arXiv:2202.00512, whose guidance may be part of the
teacher (Meng et al. 2023, arXiv:2210.03142).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.loss import LossWeight, x_0_weights
from imagen_scale.diffusion.names import Spacing
from imagen_scale.diffusion.sampler import levels_at
from imagen_scale.diffusion.schedule import NoiseSchedule, PredType
from imagen_scale.diffusion.solvers import Level, Past, ddim_step, dpmpp_2m_step
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.errors import ConfigError

# Of a teacher: DPM-Solver++(2M), begun anew in each segment; DDIM where it is a student itself.
TeacherSolver = Literal["dpmpp_2m", "ddim"]


@dataclass(frozen=True)
class Segments:
    """The K segments of a student's times, with the m steps that its teacher takes in each.

    Every step is linear in the pictures, so that samples of different segments are computed
    together: a segment has numbers where a solver has levels.

    Args:
        times: Of the teacher, (K, m) int64, falling; the first of each row is the student's own.
        steps: Coefficients of x_t, of the predicted x_0 and of that of the step before,
            (K, m, 3) float32.
        inverse: Coefficients of a segment's end and its beginning in the picture that leads from
            the one to the other, (K, 2) float32.
        of_time: The segment that a time lies in, (T,) int64; each holds an equal share of them.
    """

    times: Tensor
    steps: Tensor
    inverse: Tensor
    of_time: Tensor

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, steps: int, teacher_steps: int, solver: TeacherSolver,
        spacing: Spacing = "trailing",
    ) -> "Segments":  # fmt: skip
        """Divides a schedule.

        Args:
            schedule: Of teacher and student.
            steps: K.
            teacher_steps: K m, at most T.
            solver: Of the teacher.
            spacing: Of the student's steps.

        Raises:
            ConfigError: If so many steps of the teacher find no times of their own.
        """
        total = schedule.timesteps
        rows = [
            levels_at(schedule, times)
            for times in teacher_times(schedule, steps, teacher_steps, solver, spacing)
        ]
        ends = [row[0] for row in rows[1:]] + [None]  # the last one ends at the clean picture
        pairs = list(zip(rows, ends, strict=True))
        place = torch.arange(total - 1, -1, -1) * steps // total
        return cls(
            torch.tensor([[level.time for level in row] for row in rows]),
            torch.tensor([_steps(row, end, solver) for row, end in pairs]),
            torch.tensor([_inverse(row[0], end) for row, end in pairs]),
            place,
        )

    def to(self, device: torch.device | str) -> "Segments":
        """The same segments with their tensors on `device`."""
        return Segments(
            self.times.to(device), self.steps.to(device), self.inverse.to(device),
            self.of_time.to(device),
        )  # fmt: skip

    @property
    def beginnings(self) -> Tensor:
        """The times that the student visits, (K,) int64."""
        return self.times[:, 0]

    def answer(self, teacher: Denoiser, x_t: Tensor, segment: Tensor) -> Tensor:
        """The clean picture whose DDIM step goes where the teacher's steps go.

        An extrapolation rather than a picture, but for the last segment, whose end it is.

        Args:
            teacher: With its guidance and thresholding.
            x_t: Pictures at the beginning of their segments, (B, C, H, W) float32.
            segment: Of each, (B,) int64.

        Returns:
            (B, C, H, W) float32.

        Source: Salimans & Ho 2022, arXiv:2202.00512, algorithm 2 and appendix G.
        """
        steps, times = self.steps[segment], self.times[segment]
        x, past = x_t, torch.zeros_like(x_t)
        for j in range(times.shape[1]):
            x_0 = teacher(x, times[:, j])
            of_x, of_x_0, of_past = (_each(steps[:, j, i], x) for i in range(3))
            x, past = of_x * x + of_x_0 * x_0 + of_past * past, x_0
        of_end, of_beginning = (_each(self.inverse[segment, i], x) for i in range(2))
        return of_end * x + of_beginning * x_t


def teacher_times(
    schedule: NoiseSchedule, steps: int, teacher_steps: int, solver: TeacherSolver, spacing: Spacing
) -> list[list[int]]:
    """The times that a teacher visits in each of K segments, m each, falling.

    Those of an ordinary teacher are even in t between the student's. One that is a student itself
    visits those that it learned, if they hold this student's: rounding may have moved them where
    times are few.

    Raises:
        ConfigError: If a segment has no m times.
    """
    m = teacher_steps // steps
    begins = visited_times(schedule, steps, spacing)
    if solver == "ddim":
        own = visited_times(schedule, teacher_steps, spacing)
        if own[::m] == begins:
            return [own[start : start + m] for start in range(0, teacher_steps, m)]
    pairs = list(zip(begins, [*begins[1:], -1], strict=True))
    if any(begin - end < m for begin, end in pairs):
        raise ConfigError(
            f"distill.teacher_steps: {teacher_steps} find no times of their own among the "
            f"{schedule.timesteps} of the schedule; take fewer, or more imagen.timesteps."
        )
    return [[round(begin - (begin - end) * j / m) for j in range(m)] for begin, end in pairs]


def student_factors(
    schedule: NoiseSchedule, times: Sequence[int], pred_type: PredType, weight: LossWeight | None
) -> Tensor:
    """What the squared error of a student's prediction is multiplied by at each time, (T,) float32.

    As `loss_factors`, but of the times that the student visits alone: their mean is 1, and all
    others, which are never drawn, have 0.

    Args:
        schedule: Noise schedule of T times.
        times: Those of the student.
        pred_type: What it predicts.
        weight: Of the squared error of x_0. None is max(SNR, 1), the truncated SNR of Salimans &
            Ho 2022, arXiv:2202.00512, section 4. A weight that vanishes with the SNR would leave
            the first step untrained.
    """
    snr = schedule.snr[list(times)]
    wanted = snr.clamp(min=1) if weight is None else x_0_weights(snr, weight)
    own = wanted / x_0_weights(snr, pred_type)
    factors = torch.zeros(schedule.timesteps)
    factors[list(times)] = (own / own.mean()).float()
    return factors


def _steps(
    row: Sequence[Level], end: Level | None, solver: TeacherSolver
) -> list[tuple[float, ...]]:
    """Coefficients of a segment's steps: what the solver makes of a one and two zeros."""
    found, past = [], None
    for level, lower in zip(row, [*row[1:], end], strict=True):
        x_t, x_0, before = torch.eye(3, dtype=torch.float64).unbind()  # each in turn is one
        step = _step(x_t, x_0, before, level, lower, past, solver)
        found.append(tuple(step.tolist()))
        past = level
    return found


def _step(
    x_t: Tensor, x_0: Tensor, before: Tensor,
    level: Level, lower: Level | None, past: Level | None, solver: TeacherSolver,
) -> Tensor:  # fmt: skip
    if lower is None:
        return x_0
    if solver == "ddim":
        return ddim_step(x_t, x_0, level, lower, eta=0, noise=None)
    known = None if past is None else Past(past, before)
    return dpmpp_2m_step(x_t, x_0, level, lower, past=known, noise=None)


def _inverse(level: Level, end: Level | None) -> tuple[float, float]:
    """Of the DDIM step from a level to an end, the coefficients of its inverse."""
    if end is None:
        return 1.0, 0.0
    kept = end.sigma / level.sigma
    of_end = 1 / (end.alpha - level.alpha * kept)
    return of_end, -kept * of_end


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) with as many dimensions as `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
