"""One row of the doctor's table."""

import errno
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from imagen_scale.errors import EnvironmentProblem
from imagen_scale.files.caches import VARIABLE

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
    except EnvironmentProblem as error:
        return [of_problem(name, error, state)]
    except Exception as error:  # drivers and libraries each raise their own
        reason = str(error).strip().partition("\n")[0]
        again = "Install the package again, in the versions of constraints.txt."
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            again = f"Change its owner or rights; caches go where {VARIABLE} says."
        seen = f"cannot be examined: {type(error).__name__}: {reason}"
        return [Finding(name, state, seen, again)]


def of_problem(name: str, error: EnvironmentProblem, state: State = "problem") -> Finding:
    """What our own error says: what was seen, and after the semicolon what to do."""
    seen, _, remedy = str(error).partition("; ")
    return Finding(name, state, seen, remedy[:1].upper() + remedy[1:])
