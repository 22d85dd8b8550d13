"""A loss, or a norm of the gradient, that jumps."""

import math
from collections import deque
from statistics import median

from imagen_scale.errors import ImagenScaleError
from imagen_scale.training.job import Job

RECENT, FEWEST = 20, 5  # reports that say what is usual, and how many of them must be there
LOSS, NORM = 5.0, 10.0  # times the usual that is a spike: a norm is of one step, a loss of many


class Spikes:
    """Compares each report with those before it, the same on every rank.

    Args:
        job: The training; `training.on_spike` says whether it ends there.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._stops = job, job.stage.training.on_spike == "stop"
        self._usual: dict[str, deque[float]] = {
            "loss": deque(maxlen=RECENT), "norm of the gradient": deque(maxlen=RECENT),
        }  # fmt: skip

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
            self._jump(name, value, times)
            for name, value, times in (("loss", loss, LOSS), ("norm of the gradient", norm, NORM))
            if value is not None and math.isfinite(value)
        ]
        if not (jumps := [jump for jump in found if jump]):
            return
        what = f"{self._job.stage.name}: at step {step} the {' and the '.join(jumps)}"
        if self._stops:
            raise ImagenScaleError(
                f"{what}. Training stops there (training.on_spike); the newest checkpoint is of "
                f"step {saved_step}. Lower it with --set training.lr=... and run the command "
                f"again: it continues from that step."
            )
        self._job.say(
            f"WARNING: {what}. Training goes on; if it does not come down again, stop, remove the "
            f"checkpoints after step {saved_step} and run the command again with a lower "
            f"training.lr. With training.on_spike stop it ends by itself."
        )

    def _jump(self, name: str, value: float, times: float) -> str | None:
        usual = self._usual[name]
        middle = median(usual) if len(usual) >= FEWEST else math.inf
        if value > times * middle > 0:
            return f"{name} is {value:.4g}, {value / middle:.1f} times the usual {middle:.4g}"
        usual.append(value)
        return None
