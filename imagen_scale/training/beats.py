"""What ranks tell each other about themselves, and which of them are at fault.

A rank is judged hung only behind another: ranks that stand at the same place may all be in one slow
step. A thread's beats say nothing about the main thread, hence the count of micro-batches and
steps. A process is gone by its number and its start, read only where boot and process namespace are
the same: numbers are used again, and containers share host names.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

# Parts of training that every rank goes through at the same pace. All others may take as long as
# they take on one rank: building, drawing pictures, and the first step.
SAVING = "saving"
PACED = ("loading data", "step", SAVING)
# Outside training: what fails there has nothing to do with phases and steps.
STARTING, PREPARING, JOINING = "starting", "preparing", "joining"
EARLY = (STARTING, PREPARING, JOINING)

State: TypeAlias = Literal["running", "leaving", "done", "failed", "left"]
PRESENT: tuple[State, ...] = ("running", "leaving")  # it can still hear and speak
BEAT_S = 1.0
# Ranks that fail together need no explanation: each gets this long to leave by itself, and one
# whose exchange a lost rank broke to find out who that was.
GRACE_S = 5.0
LEAVING_S = 60.0  # more patience with one that an exception ends: it may be closing its logs


class Beat(NamedTuple):
    """A rank's word about itself, renewed about every second."""

    rank: int
    host: str = "?"
    machine: str = ""  # whose process numbers `pid` is one of
    pid: int = 0
    started: str = ""  # when the process was; numbers are used again
    state: State = "running"
    phase: str = STARTING
    step: int = 0
    progress: int = 0  # micro-batches, steps and exchanges; every rank counts the same ones
    activity: int = 0  # bytes this rank read and wrote while saving, which no other one counts
    reason: str = ""  # of "failed"; of "left" what another rank did
    exit_code: int = 1  # of "failed" and "left"
    number: int = 0  # of this beat
    has_left: bool = False  # it reads nothing any more

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: bytes) -> "Beat":
        """Reads what `to_json` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        process = f", process {self.pid}" if self.pid else ""
        return f"rank {self.rank} (host {self.host}{process})"

    @property
    def where(self) -> str:
        """What it did last."""
        return f"phase {self.phase!r} after step {self.step}"

    @property
    def failure(self) -> str:
        """What it failed of, in a sentence."""
        how = "" if self.phase in EARLY else f" failed in {self.where}"
        return f"{self}{how}: {self.reason.rstrip('.')}."


_MOVES = slice(Beat._fields.index("phase"), Beat._fields.index("reason"))


class Seen(NamedTuple):
    """Another rank's newest beat and, by this process's clock, when something in it changed."""

    beat: Beat
    beaten: float  # a new beat
    moved: float  # another phase, more progress or activity

    def renewed(self, beat: Beat, now: float) -> "Seen":
        """With what was read now."""
        stood = self.beat[_MOVES] == beat[_MOVES]
        beaten = self.beaten if beat.number == self.beat.number else now
        return Seen(beat, beaten, self.moved if stood else now)


def judged_after(timeout: float) -> float:
    """Seconds of standing still after which a rank is judged, so that all stop within `timeout`.

    What follows takes the rest: the beat that tells it, the look at it, and the grace. Below 14 s
    half of it is kept, since a beat may be late on a busy machine.
    """
    return max(timeout - GRACE_S - 2 * BEAT_S, timeout / 2)


def faults(
    own: Beat,
    others: Iterable[Seen],
    *,
    now: float,
    awake_since: float,
    answered: float,
    is_store_lost: bool,
    timeout: float | None,
    is_gone: Callable[[Beat], bool],
) -> dict[int, str]:
    """The ranks because of which training cannot go on, each with a sentence.

    A rank is at fault if it says that it failed; if its process is gone; if it has given no sign
    of life for too long, as a stopped process or a machine out of reach; or if it lives but has
    stood still in a paced phase for that long while another rank is ahead and so waits for it.
    While saving it does not stand still as long as it reads or writes, however slow the disk.
    One that an exception is ending will say so itself and gets LEAVING_S more for it.
    Ranks that all stand at the same place are not judged: none can be told from the others, and a
    step may be slow.

    Args:
        own: This rank's beat.
        others: What is known of the others.
        now: This process's clock, in seconds.
        awake_since: This process was itself stopped until then; earlier silence says nothing.
        answered: When rank 0, which keeps the beats, last answered. Since then only rank 0 itself
            can be found silent.
        is_store_lost: Whether rank 0 has closed the connection.
        timeout: training.hang_timeout, see `judged_after`; None for any silence.
        is_gone: Whether a process of this machine has ended.
    """
    others = list(others)
    limit = math.inf if timeout is None else judged_after(timeout)
    furthest = max(seen.beat.progress for seen in [*others, Seen(own, now, now)])
    at_fault, passed_on = {}, {}
    for seen in others:
        beat = seen.beat
        heard = now if beat.rank == 0 else answered
        silent = heard - max(seen.beaten, awake_since)
        stood = heard - max(seen.moved, awake_since)
        if beat.state == "failed":
            at_fault[beat.rank] = beat.failure
        elif beat.state == "left":
            passed_on[beat.rank] = beat.reason
        elif beat.state == "done":
            continue
        elif is_gone(beat) or (is_store_lost and beat.rank == 0):
            at_fault[beat.rank] = (
                f"{beat} is gone: killed or crashed in {beat.where}. Its own output says more; "
                f"without a word the machine's memory was full (see `imagen-scale plan`)."
            )
        elif silent >= limit:
            at_fault[beat.rank] = (
                f"{beat} has given no sign of life for {silent:.0f} s; it was in {beat.where}. "
                f"Its process was stopped, or its machine stands still or is out of reach "
                f"(training.hang_timeout is {timeout or 0:g} s)."
            )
        elif (
            beat.phase in PACED
            and beat.progress < furthest
            and stood >= limit + (LEAVING_S if beat.state == "leaving" else 0)
        ):
            at_fault[beat.rank] = (
                f"{beat} hangs: it has been in {beat.where} for {stood:.0f} s while others wait "
                f"for it. Look at its disk and at its card; if it may take that long, raise "
                f"training.hang_timeout (now {timeout or 0:g} s)."
            )
    return at_fault or passed_on


def pid_namespace() -> str:
    """A name for what process numbers belong to: a running system, and a container in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"


def started(pid: int) -> str:
    """When a process of this machine was started, in its clock's ticks; "" if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def io_bytes(thread: int) -> int:
    """Bytes that a thread of this process has read and written, page cache and sockets included.

    Where the system does not tell, another number each time: standing still is then not seen.
    """
    try:
        text = Path(f"/proc/self/task/{thread}/io").read_text(encoding="ascii")
        told = dict(line.split(": ") for line in text.splitlines())
        return int(told["rchar"]) + int(told["wchar"]) + int(told["write_bytes"])
    except (OSError, ValueError, KeyError):
        return time.monotonic_ns()
