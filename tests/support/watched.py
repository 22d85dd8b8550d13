"""Training on one of two ranks that meets with an accident; its arguments are

    CONFIG RUN ACCIDENT RANK PHASE

In the named phase, from step 2 on, the named rank kills or stops itself, raises, sleeps or waits.
"""

import os
import signal
import sys
import time
from contextlib import contextmanager


def accident(what):
    time.sleep(3)  # until its beat says where it is
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "sleep":
        time.sleep(600)
    elif what == "wait":
        time.sleep(10)
    elif what == "raise":
        from imagen_scale.errors import EnvironmentProblem

        raise EnvironmentProblem("the card fell out. Put it back.")
    elif what == "fault":
        raise ZeroDivisionError("a fault of ours")


def main():
    from imagen_scale.commands import train_process
    from imagen_scale.training.watchdog import Watchdog

    config, run, what, who, where = sys.argv[1:]
    phase = Watchdog.phase

    @contextmanager
    def eventful(self, name):
        with phase(self, name):
            met = name == where and (self._step >= 2 or name == "building")
            if met and os.environ["RANK"] == who:
                accident(what)
            yield

    Watchdog.phase = eventful
    sys.argv[1:] = ["--config", config, "--run", run, "--unet", "1"]
    train_process.main()


if __name__ == "__main__":
    main()
