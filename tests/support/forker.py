"""Python programs in forks of one process that has imported torch, DeepSpeed and training.

What takes seconds to import is imported once. That process is Python's own fork server: it starts
no threads, unlike pytest's or a benchmark's.
"""

import functools
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import IO

from imagen_scale.commands.torch_log import settle_torch_log
from support import ROOT
from support.environment import environment_of_no_launcher


@functools.cache
def _context() -> ForkServerContext:
    """The fork server, started."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", "support.warm"])
    with environment_of_no_launcher():
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # or it would not find `support`
        os.environ["OMP_NUM_THREADS"] = "1"
        settle_torch_log()  # before `support.warm` imports torch
        forkserver.ensure_running()
    return context


def fork(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdout: IO,
    stderr: IO,
    first: Callable[[], object] = int,
) -> ForkServerProcess:
    """Starts a Python program, as `python *argv` would, as leader of a session of its own.

    Args:
        argv: The script and its arguments.
        environment: All of it; what libraries read while they are imported was read before.
        stdout: File or pipe that gets what it prints.
        stderr: The same for errors.
        first: Called in the process before the program; to be pickled.
    """
    streams = [Connection(os.dup(stream.fileno()), readable=False) for stream in (stdout, stderr)]
    process = _context().Process(
        target=_run, args=(list(map(str, argv)), dict(environment), *streams, first)
    )
    process.start()
    return process


def run_to_end(
    argv: Sequence[str], environment: Mapping[str, str], limit: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in a fork; what it said, and how it ended."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = fork(argv, environment, stdout=stdout, stderr=stderr)
        process.join(limit)
        process.kill()
        process.join()
        said = [stream.seek(0) or stream.read() for stream in (stdout, stderr)]
    return subprocess.CompletedProcess(argv, process.exitcode, *said)


def _run(
    argv: list[str],
    environment: dict[str, str],
    stdout: Connection,
    stderr: Connection,
    first: Callable[[], object],
) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have made us deaf
    for number, stream in enumerate((stdout, stderr), 1):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.argv = argv
    first()
    runpy.run_path(argv[0], run_name="__main__")
