"""DeepSpeed's launcher as a child process that ends when this one is told to."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from imagen_scale.errors import EnvironmentProblem, UsageError
from imagen_scale.training.launch_variables import free_port

MODULE = "imagen_scale.commands.train_process"
GRACE_S = 600.0  # what the training processes get to end by themselves: they may save first


def visible_cards() -> list[str] | None:
    """The cards that CUDA_VISIBLE_DEVICES names; None where it is not set.

    Raises:
        UsageError: If it names cards otherwise than by number, which DeepSpeed cannot.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not text:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(name.isdecimal() for name in names):
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES={text}: DeepSpeed's launcher takes numbers of cards, e.g. 0,1."
        )
    return names


def launcher_command(processes: int, cards: list[str] | None, arguments: list[str]) -> list[str]:
    """The command line that starts training.

    Args:
        processes: One for each card; without a card, that many on the CPU.
        cards: Numbers of the cards to choose from; None for the first ones.
        arguments: Of the training process.
    """
    # DeepSpeed ignores CUDA_VISIBLE_DEVICES beside --num_gpus: it wants the names.
    where = (
        ["--num_gpus", str(processes)]
        if cards is None
        else ["--include", f"localhost:{','.join(cards[:processes])}"]
    )
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", *where,
        "--master_port", str(free_port()), "--log_level", "critical",
        "--module", MODULE, *arguments,
    ]  # fmt: skip


def run(command: list[str], environment: Mapping[str, str] = os.environ) -> int:
    """Runs the launcher to its end and gives its exit code.

    The launcher gets a session of its own: Ctrl-C reaches this process only, which then ends all
    of them in order; a second one ends them at once.

    Raises:
        EnvironmentProblem: If a signal ended a training process, or the launcher.
        KeyboardInterrupt: After every process has ended, if this one was interrupted.
    """
    hidden = "CUDA_VISIBLE_DEVICES" if "--include" in command else ""
    environment = {name: value for name, value in environment.items() if name != hidden}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    with _told_by_signals():
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end(process, are_here="--hostfile" not in command)
            raise
    check_signal(code)
    return code


def check_signal(code: int) -> None:
    """Refuses the exit code of a launcher that a signal ended, itself or a process below it.

    DeepSpeed's launcher exits with Python's -N for the signal N that ended a training process,
    of which the system keeps the last byte.

    Raises:
        EnvironmentProblem: With the signal's name and what it means.
    """
    number = -code if code < 0 else 256 - code
    if number not in list(signal.Signals):
        return
    name = signal.Signals(number).name
    reason = (
        ": the computer's memory was full, or somebody did it; see what the run needs with "
        "`imagen-scale plan`"
        if number == signal.SIGKILL
        else ""
    )
    raise EnvironmentProblem(
        f"{name} ended a training process{reason}. The same command continues from the newest "
        f"checkpoint."
    )


def _end(process: "subprocess.Popen[bytes]", *, are_here: bool) -> None:
    """Asks the training processes to end and waits for them; asked again, kills all at once.

    Those of other machines only the launcher can ask. They get 30 s from DeepSpeed, in which small
    ones have saved.
    """
    try:
        if are_here:
            _ask(process.pid)
        else:
            process.terminate()
        process.wait(GRACE_S)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what outlived the launcher
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ask(launcher: int) -> None:
    """Asks the training processes to end; before there are any, the launcher itself.

    DeepSpeed's launcher, were it asked, would kill them after 30 seconds and end their data
    loaders first (DeepSpeed 0.19, launcher/launch.py, terminate_process_tree). When one of them
    ends it ends by itself.
    """
    ranks: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for per_node in psutil.Process(launcher).children():
            ranks += per_node.children()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.terminate()
    if not ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher, signal.SIGTERM)


@contextlib.contextmanager
def _told_by_signals() -> Iterator[None]:
    """Takes a request to end (SLURM's too), or a closed terminal, as an interruption.

    Not where `nohup` has it ignored.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
