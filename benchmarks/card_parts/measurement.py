"""One measurement, and what is known of it afterwards."""

from typing import Any, NamedTuple, TypeAlias

MEASURED = "measured"
DIFFERS = "differs"  # measured, and not what it should be
LEFT_OUT = "left out"  # cannot be measured here, and why
FULL = "out of memory"
FAILED = "failed"
TIMED_OUT = "timed out"
CRASHED = "crashed"  # its process ended without a word
SKIPPED = "skipped"  # no time was left
# What need not be measured again by another call with the same folder.
DONE = (MEASURED, DIFFERS, LEFT_OUT, FULL)
FAULTS = (DIFFERS, FAILED, TIMED_OUT, CRASHED)

# `part`, `name`, `status`, `why` (empty where it was measured), `seconds`; then the figures.
Row: TypeAlias = dict[str, Any]


class Measurement(NamedTuple):
    """Something to be measured in a process of its own, or one that it shares with others."""

    part: int  # 0 is the machine
    name: str
    call: str  # "module:function"; it returns the figures
    arguments: dict[str, Any]
    limit_s: float = 120  # of the process's start, too
    group: str = ""  # measurements of one group share a process; "": its own
    reason: str = ""  # why it is left out, where that is known before


class LeftOut(Exception):
    """Raised by what cannot be measured here, with the reason."""


class Differs(Exception):
    """Raised by what was measured and is not what it should be.

    Args:
        reason: In words.
        figures: What was measured.
    """

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


def row(
    measurement: Measurement, status: str, *, why: str = "", seconds: float = 0.0, **figures: Any
) -> Row:
    """What became of a measurement."""
    known = {"part": measurement.part, "name": measurement.name, "status": status, "why": why}
    return known | {"seconds": round(seconds, 2)} | figures
