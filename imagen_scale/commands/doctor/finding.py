"""One row of the doctor's table."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

State = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """What was seen, and what to do where it is not well.

    Attributes:
        name: Of the thing examined.
        state: "ok"; "warning" where something works less well, or not at all but is not needed by
            everyone; "problem" where training or sampling will fail.
        seen: One line.
        remedy: What to do next; empty where nothing is to be done.
    """

    name: str
    state: State
    seen: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def examined(name: str, check: Check, state: State = "problem") -> list[Finding]:
    """The findings of one check; an examination that fails is a finding itself, of `state`."""
    try:
        return list(check())
    except Exception as error:  # drivers and libraries each raise their own
        reason = str(error).strip().partition("\n")[0]
        return [
            Finding(
                name, state, f"cannot be examined: {type(error).__name__}: {reason}",
                "Install the package again, in the versions of constraints.txt.",
            )
        ]  # fmt: skip
