"""TensorBoard beside a run: torch's writer, which never ends a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagen_scale.errors import MissingExtraError


class TensorBoardSink:
    """Hands rows and pictures to torch's `SummaryWriter`.

    Of a run that is continued, TensorBoard leaves out what the steps that are repeated had left.
    After an error, a full disk for one, it gets nothing more; `metrics.jsonl` has every row.

    Args:
        folder: Where it writes.
        start_step: Steps already done.
        say: Told, once, of what goes wrong.

    Raises:
        MissingExtraError: If TensorBoard is not installed.
    """

    def __init__(self, folder: Path, start_step: int, say: Callable[[str], None]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError(
                "logging.tensorboard is set, but TensorBoard is not installed. Install it with "
                "`pip install 'imagen-scale[tensorboard]'`, or set logging.tensorboard to false."
            ) from None
        self.folder, self.say, self._is_dead = folder, say, False
        self._writer: Any = None
        self._try(lambda: self._open(SummaryWriter, start_step))

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Writes a row's numbers."""
        numbers = {name: value for name, value in row.items() if value is not None}
        self._try(lambda: [self._writer.add_scalar(*one, step) for one in numbers.items()])

    def picture(self, step: int, name: str, path: Path) -> None:
        """Writes a picture under a name."""

        def add() -> None:
            with Image.open(path) as image:
                self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

        self._try(add)

    def close(self) -> None:
        """Writes what is left."""
        self._try(lambda: self._writer.close())

    def _open(self, writer: Any, start_step: int) -> None:
        self._writer = writer(str(self.folder), purge_step=start_step + 1)

    def _try(self, write: Callable[[], object]) -> None:
        if self._is_dead:
            return
        try:
            write()
        except Exception as error:  # whatever its thread met, told at a later call
            self._is_dead = True
            self.say(
                f"WARNING: TensorBoard cannot write {self.folder} ({type(error).__name__}: "
                f"{error}) and gets nothing more; metrics.jsonl has every row."
            )
