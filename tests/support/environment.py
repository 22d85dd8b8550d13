"""The environment that launchers fill, and ports that nobody else gets."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def without_launcher() -> dict[str, str]:
    """A copy of the environment without what a launcher sets."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank on this machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


@contextmanager
def environment_of_no_launcher() -> Iterator[None]:
    """No launcher's variables inside; the environment as it was afterwards."""
    before = dict(os.environ)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that is given to nobody else inside, though whoever is told of it can listen there.

    Bound and not listened to, the system leaves it out when it chooses ports; and it lets others
    bind it who allow addresses to be used again, as torch's store does.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
