"""Somebody without a name and without rights: a user's number that no list of users has.

As in a container that is started with `--user 12345`, or under OpenShift. Files of this user belong
to the stranger, so that a folder of mode 0555 may not be written even where the tests run as root.
"""

import os
import shutil
import subprocess
import sys

from support import ROOT

ENTER = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]


def why_not():
    """What this machine lacks for it; None if nothing."""
    if shutil.which("unshare") is None:
        return "unshare is not installed (util-linux)"
    tried = subprocess.run([*ENTER, "true"], capture_output=True)
    return None if tried.returncode == 0 else "no user namespaces may be made here"


def run(code, **variables):
    """Runs Python code as the stranger, with no variables but these.

    Args:
        code: What is run.
        variables: Of the environment, beside PATH and PYTHONPATH.
    """
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [*ENTER, sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment | {name: str(value) for name, value in variables.items()},
        capture_output=True, text=True,
    )  # fmt: skip
