"""Being told to stop: SIGTERM, SIGUSR1 (as SLURM is asked to send), SIGHUP and SIGINT (Ctrl-C).

A signal that is ignored when training starts stays so: `nohup` asks for that.

It is a flag that the ranks compare after each step: one that saved alone would wait for the others
for ever. Loader workers ignore the signals from before their first instruction, since a launcher
and SLURM send them to every process.
"""

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from imagen_scale.errors import ImagenScaleError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# A terminal's Ctrl-C reaches the ranks and the launcher, which passes it on at once: one request.
SAME_REQUEST = 1.0  # seconds


class Preempted(ImagenScaleError):
    """Training stopped where it was asked to, with everything saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # as a shell names a process that a signal ended

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.exit_code - 128)


class StopRequest:
    """While it is entered, the first signal is noted and a second one ends the process at once.

    Outside, before the ranks have joined, signals do what they always do: nothing is lost.
    """

    def __init__(self) -> None:
        self.signum, self._since = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        heard = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._note) for signum in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signum:
            self.signum, self._since = signum, now
            name = signal.Signals(signum).name
            print(f"{name}: saving at the end of this step; again to stop at once", file=sys.stderr)
        elif now - self._since > SAME_REQUEST:
            os._exit(128 + signum)

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank was sent, 0 if none; every rank gets the same answer."""
        if torch.distributed.get_world_size() == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        return int(signum)
