"""Ranks before they are a process group: they find each other, and each hears what ends another.

A collective cannot wait for a rank that prepares data for hours, and cannot tell of one that cannot
start. So a store comes first, in which the ranks watch each other; they join when all are ready.
"""

import json
import os
import platform
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from imagen_scale.data.storage import first_line
from imagen_scale.errors import EnvironmentProblem
from imagen_scale.training import ranks
from imagen_scale.training.beats import JOINING
from imagen_scale.training.launch_variables import NETWORK_ADVICE, speaks_for_its_machine
from imagen_scale.training.ranks import rank, world_size
from imagen_scale.training.watchdog import Watchdog

ARRIVAL_S = 600.0  # in which every rank has to come; what takes long comes after
NOTICE_S = 20.0  # of waiting in silence, then it is said what for
POLL_S = 0.1
WAIT_S = 0.3  # between two looks whether all have come to a place


class Meeting:
    """The ranks of a training; while `watchdog` is entered they watch each other.

    Args:
        tell: Says to the user what ends this rank; see `Watchdog`.

    Attributes:
        watchdog: Told what this rank does.

    Raises:
        EnvironmentProblem: If not all ranks can meet; said by the first one of each machine.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        # One rank needs no port.
        self._store = _find_each_other() if world_size() > 1 else HashStore()
        self.watchdog = Watchdog(None, self._store if world_size() > 1 else None, tell)

    def gather(self, what: str, own: str) -> list[str]:
        """Waits until every rank has come here, however long that takes.

        Args:
            what: Names this place; used once.
            own: This rank's word.

        Returns:
            On rank 0 everybody's, in the order of ranks; on others nothing.
        """
        self._store.set(f"{what} of {rank()}", own)
        self._store.add(f"{what} done", 1)
        while self._store.add(f"{what} done", 0) < world_size():
            time.sleep(WAIT_S)
        if rank() > 0:
            return []
        words = self._store.multi_get([f"{what} of {number}" for number in range(world_size())])
        return [word.decode() for word in words]

    def heard_from_rank_0(self, what: str, make: Callable[[], str]) -> str:
        """What `make` gives on rank 0, on every rank."""
        if rank() == 0:
            self._store.set(what, make())
        while not self._store.check([what]):
            time.sleep(POLL_S)
        return self._store.get(what).decode()

    def join(self) -> None:
        """Makes the ranks a process group.

        Raises:
            EnvironmentProblem: If they cannot be one.
        """
        waiting = f"{world_size()} processes are joining. {NETWORK_ADVICE}"
        with self.watchdog.phase(JOINING), _said_if_it_lasts(lambda: waiting):
            ranks.join(PrefixStore("group", self._store))


def _find_each_other() -> Store:
    """The store of this start's ranks, when all of them have come.

    Its address may be another training's, that of a port taken twice, or hold the words of an
    earlier try. So rank 0 answers to what only the ranks of this start can have said.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps_store = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps_store:
        _wait_for_port(host, port)
    advice = f"rank {rank()} (host {platform.node()}) is at {host}:{port}. {NETWORK_ADVICE}"
    try:
        with _said_if_it_lasts(lambda: advice):
            store = TCPStore(
                host, port, world_size(), keeps_store, timedelta(seconds=ARRIVAL_S),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        return _received(store) if rank() > 0 else _received_all(store)
    except (RuntimeError, OSError) as error:
        raise EnvironmentProblem(
            f"{world_size()} processes cannot meet: {first_line(error)}; {advice}"
        ) from None


def _received_all(store: Store) -> Store:
    """Answers every other rank until all have heard it; on rank 0."""
    name, answered = uuid.uuid4().hex, dict[str, str]()
    others = [str(number) for number in range(1, world_size())]
    own = PrefixStore(name, store)
    deadline = time.monotonic() + ARRIVAL_S

    def missing() -> str:
        names = [n for n in others if n not in answered]
        return f"{len(names)} of {world_size()} ranks have not come yet: {', '.join(names[:8])}"

    with _said_if_it_lasts(lambda: f"{missing()}. {NETWORK_ADVICE}"):
        while own.add("here", 0) < len(others):
            come = [n for n in others if store.check([_greeting(n)])]
            greetings = store.multi_get([_greeting(n) for n in come]) if come else []
            if (now := {n: g.decode() for n, g in zip(come, greetings, strict=True)}) != answered:
                answered = now
                store.set("imagen-scale answer", json.dumps([name, answered]))
            if time.monotonic() > deadline:
                raise EnvironmentProblem(f"{missing()}, after {ARRIVAL_S:g} s. {NETWORK_ADVICE}")
            time.sleep(POLL_S)
    return own


def _received(store: Store) -> Store:
    """Greets rank 0 and waits for its answer, and until all others have it too."""
    greeting, deadline = uuid.uuid4().hex, time.monotonic() + ARRIVAL_S
    store.set(_greeting(str(rank())), greeting)
    own: Store | None = None
    while own is None or own.add("here", 0) < world_size() - 1:
        if own is None and store.check(["imagen-scale answer"]):
            name, answered = json.loads(store.get("imagen-scale answer"))
            if answered.get(str(rank())) == greeting:
                own = PrefixStore(name, store)
                own.add("here", 1)
        if time.monotonic() > deadline:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise EnvironmentProblem(
                f"rank {rank()} (host {platform.node()}) has waited {ARRIVAL_S:g} s at {where} for "
                f"rank 0 and the others; another training may have that port. {NETWORK_ADVICE}"
            )
        time.sleep(POLL_S)
    return own


def _greeting(number: str) -> str:
    return f"imagen-scale greeting of {number}"


def _wait_for_port(host: str, port: int) -> None:
    """Waits until somebody listens; torch would print a trace of its own at every try.

    Raises:
        EnvironmentProblem: If nobody does.
    """
    deadline, last = time.monotonic() + ARRIVAL_S, ""

    def waiting() -> str:
        return (
            f"rank {rank()} (host {platform.node()}) cannot reach rank 0 at {host}:{port} "
            f"({last}). {NETWORK_ADVICE}"
        )

    with _said_if_it_lasts(waiting):
        while time.monotonic() < deadline:
            try:
                with socket.create_connection((host, port), timeout=5):
                    return
            except OSError as error:  # an unknown name, too: it may become known
                last = first_line(error)
                time.sleep(POLL_S)
    raise EnvironmentProblem(waiting())


@contextmanager
def _said_if_it_lasts(waiting: Callable[[], str]) -> Iterator[None]:
    """Says once what is waited for inside, if that takes long; on one rank of each machine."""

    def say() -> None:
        if speaks_for_its_machine():
            print(f"waiting for {NOTICE_S:g} s: {waiting()}", file=sys.stderr, flush=True)

    timer = threading.Timer(NOTICE_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
