"""A loss, or a norm of the gradient, that jumps."""

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from imagen_scale.errors import ImagenScaleError
from imagen_scale.runs.folders import metrics_path
from imagen_scale.runs.records import read_metrics
from imagen_scale.training.job import Job

RECENT, FEWEST = 20, 5  # reports that say what is usual, and how many of them must be there
LOSS, NORM = 5.0, 10.0  # times the usual that is a spike: a norm is of one step, a loss of many
NAMES = {"loss": ("loss", LOSS), "grad_norm": ("norm of the gradient", NORM)}  # in metrics.jsonl

Reports = dict[str, list[float]]


class Usual:
    """What one value was in the last reports, those that jumped left out.

    Args:
        times: Of the median that is a jump.
        before: Earlier reports, in the order of steps.
    """

    def __init__(self, times: float, before: Iterable[float] = ()) -> None:
        self._times = times
        self._recent: deque[float] = deque(maxlen=RECENT)
        for value in before:
            self.jump(value)

    def jump(self, value: float) -> float | None:
        """The median that a value is far above; None where it is not, and counts as usual."""
        middle = median(self._recent) if len(self._recent) >= FEWEST else math.inf
        if value > self._times * middle > 0:
            return middle
        self._recent.append(value)
        return None

    def recent(self) -> list[float]:
        """What it compares with."""
        return list(self._recent)


def reports_before(run_dir: Path, unet_number: int, step: int) -> Reports:
    """What reports up to a step leave to compare with, as if training had never stopped."""
    values = read_metrics(metrics_path(run_dir, unet_number), []).values
    return {
        name: Usual(times, (v for at, v in values.get(name, ()) if at <= step)).recent()
        for name, (_, times) in NAMES.items()
    }


class Spikes:
    """Compares each report with those before it, the same on every rank.

    Args:
        job: The training; `training.on_spike` says whether it ends there.
        before: Of `reports_before`, the same on every rank.
    """

    def __init__(self, job: Job, before: Reports) -> None:
        self._job, self._stops = job, job.stage.training.on_spike == "stop"
        self._usual = {
            name: Usual(times, before.get(name, ())) for name, (_, times) in NAMES.items()
        }

    def look(self, step: int, loss: float, norm: float | None, saved_step: int) -> None:
        """Tells of a spike, or ends training there.

        Args:
            step: Of the report.
            loss: Mean since the last report.
            norm: Of the last step's gradient, where it is known.
            saved_step: Of the newest checkpoint.

        Raises:
            ImagenScaleError: If there is a spike and training is to stop at it.
        """
        found = [
            self._jump(name, value)
            for name, value in (("loss", loss), ("grad_norm", norm))
            if value is not None and math.isfinite(value)
        ]
        if not (jumps := [jump for jump in found if jump]):
            return
        what = f"{self._job.stage.name}: at step {step} the {' and the '.join(jumps)}"
        if self._stops:
            raise ImagenScaleError(
                f"{what}. Training stops there (training.on_spike); the newest checkpoint is of "
                f"step {saved_step}. Lower it with --set training.lr=... and run the command "
                f"again: it continues from that step; with --set training.on_spike=tell it goes "
                f"through."
            )
        self._job.say(
            f"WARNING: {what}. Training goes on; if it does not come down again, stop, remove the "
            f"checkpoints after step {saved_step} and run the command again with a lower "
            f"training.lr. With training.on_spike stop it ends by itself."
        )

    def _jump(self, name: str, value: float) -> str | None:
        middle = self._usual[name].jump(value)
        if middle is None:
            return None
        what, _ = NAMES[name]
        return f"{what} is {value:.4g}, {value / middle:.1f} times the usual {middle:.4g}"
