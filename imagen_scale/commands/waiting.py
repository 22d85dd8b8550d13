"""How the threads of a process wait for one another."""

import os


def wait_asleep() -> None:
    """Makes OpenMP's threads sleep while they wait; to be called before torch is imported.

    By default each spins, and on a processor that others use too it spins in the time of the one
    it waits for: training on two cores beside two busy processes fell to a tenth. What the user
    has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
