"""Trainings in forked processes: what takes seconds to import is imported once."""

import functools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

HANG = 180  # seconds after which a process that should have ended is called hung


def warm_up() -> None:
    """Imports everything and loads DeepSpeed's operator; starts no threads, joins nothing."""
    import cpuinfo
    from deepspeed.ops.op_builder import CPUAdamBuilder

    from imagen_scale.training.operators import extensions_dir

    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    CPUAdamBuilder().load(verbose=False)
    # DeepSpeed's Adam asks it for the processor's vendor, through a process that takes a second.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()


class Training:
    """`launch/train.py` on some ranks, each a fork of this process.

    Args:
        arguments: Of the command.
        ranks: How many.
        log: File that gets what all of them print.
        first: Called in each process before it starts.
    """

    def __init__(
        self, arguments: Sequence[str], ranks: int, log: Path, first: Callable[[], None] = int
    ) -> None:
        from conftest import free_port

        self.log = log
        # Through `cat`: a rank that may write no more files can still print.
        self._cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log.open("wb"))
        port = str(free_port())
        self.pids = [self._fork(arguments, rank, ranks, port, first) for rank in range(ranks)]
        self._cat.stdin.close()
        self.codes: dict[int, int] = {}  # exit code by process, negative for a signal

    def _fork(self, arguments, rank, ranks, port, first) -> int:
        child = os.fork()
        if child:
            return child
        try:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            for stream in (1, 2):
                os.dup2(self._cat.stdin.fileno(), stream)
            first()
            from imagen_scale.commands.train_process import main

            main(list(arguments))
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else bool(end.code))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
        os._exit(98)  # click always exits

    def running(self) -> bool:
        """Whether any process is left."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def until(self, happens: Callable[[], bool], step: float = 0.001) -> bool:
        """Waits for something; tells whether it came before all processes ended."""
        deadline = time.monotonic() + HANG
        while not happens():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                return False
            time.sleep(step)
        return True

    def send(self, signum: int, pid: int) -> None:
        """A signal to one process, if it is there."""
        if pid not in self.codes:
            os.kill(pid, signum)

    def end(self) -> list[int]:
        """Waits for all; their exit codes. What does not end is killed and counts as -9."""
        self.until(lambda: not self.running(), 0.005)
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGCONT)
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._cat.wait()
        return [self.codes[pid] for pid in self.pids]

    def said(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace")
