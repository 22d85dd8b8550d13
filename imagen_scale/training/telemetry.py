"""What a run reports: metrics.jsonl, a progress line, and to those trackers that are asked for."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from imagen_scale.config import Config
from imagen_scale.files.atomic import write_atomically
from imagen_scale.runs.folders import metrics_path, tensorboard_dir
from imagen_scale.training.tensorboard_sink import TensorBoardSink
from imagen_scale.training.wandb_sink import WandbSink

console = Console(highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One plain line for the person watching."""
    console.print(message, markup=False)


class Telemetry:
    """Reports of one U-Net's training; made on rank 0 only.

    Args:
        run_dir: The run's folder.
        config: The run's configuration.
        unet_number: 1-based.
        start_step: Steps already done; later lines of an interrupted run are dropped, since
            those steps are about to be repeated.
        steps: Steps in all.
    """

    def __init__(
        self, run_dir: Path, config: Config, unet_number: int, start_step: int, steps: int
    ) -> None:
        # One file per U-Net: several may be trained at the same time.
        self.path = metrics_path(run_dir, unet_number)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unet_number = unet_number
        self._wandb = None
        if config.logging.wandb is not None:
            self._wandb = WandbSink(run_dir, config, unet_number, say)
        self._tensorboard = None
        if config.logging.tensorboard:
            folder = tensorboard_dir(run_dir, unet_number)
            self._tensorboard = TensorBoardSink(folder, start_step, say)
        drop_metrics_after(self.path, start_step)
        self._file = LineFile(self.path)
        self._progress = Progress(
            TextColumn(f"U-Net {unet_number}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps  {task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=start_step, status="")
        self._steps = steps
        self._last_time, self._last_step = time.monotonic(), start_step

    def __enter__(self) -> "Telemetry":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._progress.update(self._task, completed=step)

    def train(
        self, step: int, *, loss: float | None, lr: float, grad_norm: float | None,
        loss_scale: float | None, images: int, quarters: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Reports the mean loss since the last report, and the speed.

        Args:
            step: Optimizer steps done.
            loss: Mean over all ranks and steps since the last report; None if all were left out.
            lr: Learning rate of the step.
            grad_norm: Norm before clipping, where DeepSpeed tells it.
            loss_scale: Of fp16; None where nothing is scaled.
            images: Pictures per step over all ranks.
            quarters: Mean loss in each quarter of the log-SNR, by name.
        """
        now = time.monotonic()
        elapsed, self._last_time = now - self._last_time, now
        images_per_s = images * (step - self._last_step) / max(elapsed, 1e-9)
        seconds_left = (self._steps - step) * elapsed / max(step - self._last_step, 1)
        self._last_step = step
        memory = peak_memory_gib()
        shown = "-" if loss is None else f"{loss:.4f}"
        status = f"loss {shown}  {images_per_s:.1f} images/s  {memory:.2f} GiB"
        self._progress.update(self._task, completed=step, status=status)
        if self._progress.disable:
            minutes, seconds = divmod(round(seconds_left), 60)
            say(
                f"U-Net {self.unet_number}  step {step}/{self._steps}  {status}  "
                f"left {minutes}:{seconds:02d}"
            )
        scale = {} if loss_scale is None else {"loss_scale": loss_scale}
        self.write(
            step, loss=loss, lr=lr, grad_norm=grad_norm, images_per_s=images_per_s,
            peak_memory_gib=memory, **scale, **quarters,
        )  # fmt: skip

    def write(self, step: int, **values: float | None) -> None:
        """Appends one line to metrics.jsonl."""
        row = {"unet": self.unet_number, "step": step, **values}
        self._file.append(json.dumps(row) + "\n")
        if self._wandb is not None:
            prefix = f"unet{self.unet_number}/"
            self._wandb.log({prefix + name: value for name, value in row.items() if name != "unet"})
        if self._tensorboard is not None:
            self._tensorboard.log(step, values)

    def picture(self, step: int, path: Path) -> None:
        """Reports a sample grid."""
        if self._progress.disable:
            say(f"U-Net {self.unet_number}  step {step}/{self._steps}  pictures: {path}")
        if self._wandb is not None:
            name = f"unet{self.unet_number}/"
            self._wandb.picture({name + "step": step}, name + "samples", path)
        if self._tensorboard is not None:
            self._tensorboard.picture(step, "samples", path)


class LineFile:
    """A file that lines are added to; those that a full disk refuses are kept and added later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""

    def append(self, line: str) -> None:
        """Adds a line, and those that could not be added before."""
        data = self._pending + line.encode()
        try:
            written = self._file.write(data)
        except OSError as error:
            if not self._pending:
                say(f"WARNING: {self.path}: {error.strerror}; its lines are kept and added later")
            written = 0
        self._pending = data[written:]

    def close(self) -> None:
        """Ends it."""
        self._file.close()


def drop_metrics_after(path: Path, step: int) -> None:
    """Removes lines of steps that a resumed run repeats, and damaged ones, as a kill leaves one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if is_kept:
            kept.append(line + "\n")
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def peak_memory_gib() -> float:
    """Peak memory in GiB: allocated on the card, or resident in this process without one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
