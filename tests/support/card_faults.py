"""Measurements that go wrong in every way."""

import os
import signal
import subprocess
import time

from card_parts.measurement import Differs, LeftOut


def measures():
    """What goes well."""
    return {"error": 0.25, "bound": 1.0}


def raises():
    """A fault of the program."""
    raise ValueError("as it was told")


def differs():
    """A wrong result."""
    raise Differs("half is not a quarter", error=0.5, bound=0.25)


def cannot():
    """Something that is missing."""
    raise LeftOut("it is not installed")


def fills():
    """Memory that runs out."""
    raise MemoryError("all of it")


def hangs():
    """A call that never comes back."""
    time.sleep(600)


def hangs_with_a_child():
    """The same, with a process of its own that ignores being asked to end."""
    child = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600"])
    print(child.pid, flush=True)
    time.sleep(600)


def dies():
    """A process that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)
