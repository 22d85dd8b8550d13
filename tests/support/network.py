"""Several machines on this one: Linux namespaces with a cable to a switch of their own.

A machine has its own network, process numbers, name, /dev/shm, boot id, HOME, /etc/hosts and shell
for the others; it shares the rest of the file system. Nothing outside the namespaces is changed,
and with their processes they are gone.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

from support import remote_shell

NET = "10.77.0"
HERE = Path(__file__).parent


def why_not():
    """What this machine lacks for it; None if nothing."""
    if os.geteuid() != 0:
        return "machines in namespaces need root"
    missing = [name for name in ("ip", "tc", "nsenter", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"])
    return None if tried.returncode == 0 else "no namespaces may be made here"


class Network:
    """Machines worker-1 to worker-N, at 10.77.0.1 and so on; its context ends all of them.

    Args:
        folder: For their homes and what they print.
        count: Of machines.
        variables: Of every process there, beside HOME and PATH.
    """

    def __init__(self, folder, count, variables):
        self.folder, self.count, self.variables = folder, count, variables
        self._outer = {}  # `unshare` by machine; 0 is the switch
        self._started = []

    def __enter__(self):
        bin_folder = self.folder / "bin"
        bin_folder.mkdir(parents=True)
        for name, text in (("ssh", "remote_shell.py"), ("pdsh", "pdsh.py")):
            program = bin_folder / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / text} "$@"\n')
            program.chmod(0o755)
        self.variables = self.variables | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
        self.home(0).mkdir()
        self._unshare(0, "exec sleep infinity")
        self._ip(0, "link add br0 type bridge")
        self._ip(0, "link set br0 up")
        for number in range(1, self.count + 1):
            self.boot(number)
        return self

    def __exit__(self, *error):
        for number in list(self._outer):
            self._end(number)
        for process in self._started:
            process.wait()

    def boot(self, number):
        """Starts a machine, for the first time or after its power was lost."""
        home = self.home(number)
        if not home.exists():
            home.mkdir()
            os.mkfifo(home / "cable")
        files = {
            "hosts": "127.0.0.1 localhost\n"
            + "".join(f"{NET}.{n} worker-{n}\n" for n in range(1, self.count + 1)),
            "boot_id": f"{uuid.uuid4()}\n",
            "environment.json": json.dumps(self._environment(number)),
        }
        for name, text in files.items():
            (home / name).write_text(text)
        shell = f"{sys.executable} {remote_shell.__file__} serve {home}/environment.json"
        self._unshare(
            number,
            f"hostname worker-{number}\n"
            f"mount -t tmpfs tmpfs /dev/shm\n"
            f"mount --bind {home}/hosts /etc/hosts\n"
            f"mount --bind {home}/boot_id /proc/sys/kernel/random/boot_id\n"
            f"read cable < {home}/cable\n"
            f"{shell} &\n"
            f"while :; do wait; sleep 1; done\n",
        )
        self._ip(0, f"link add port{number} type veth peer name eth0 netns {self._inner(number)}")
        self._ip(0, f"link set port{number} master br0 up")
        for words in (f"addr add {NET}.{number}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self._ip(number, words)
        with (home / "cable").open("w") as cable:
            cable.write("in\n")

    def start(self, number, argv, output, **variables):
        """Starts a program on a machine; its output goes into a file."""
        environment = self._environment(number) | variables
        command = ["env", "-i", *(f"{k}={v}" for k, v in environment.items()), *map(str, argv)]
        into = ["nsenter", "-t", str(self._inner(number)), "-a", f"--wd={environment['HOME']}"]
        with Path(output).open("w") as file:
            process = subprocess.Popen(
                [*into, *command], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def cut(self, number):
        """Takes its cable out: no FIN, no RST."""
        self._ip(0, f"link set port{number} down")

    def power_off(self, number):
        """Its cable goes first, or the system would close its connections."""
        self.cut(number)
        self._end(number)
        self._ip(0, f"link del port{number}")

    def slow(self, number, rate):
        """Limits its cable, e.g. to 2mbit."""
        self._inside(
            number, f"tc qdisc replace dev eth0 root tbf rate {rate} burst 32kb latency 1s"
        )

    def home(self, number):
        """Its own disk."""
        return self.folder / f"worker-{number}"

    def _environment(self, number):
        return {"HOME": str(self.home(number)), "OMP_NUM_THREADS": "1"} | self.variables

    def _unshare(self, number, script):
        home = self.home(number)
        (home / "init").write_text(f"set -e\n{script}")
        with (home / "console").open("w") as console:
            self._outer[number] = subprocess.Popen(
                ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc",
                 "--uts", "--ipc", "--propagation", "private", "bash", str(home / "init")],
                stdout=console, stderr=console, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _inner(self, number):
        while not (children := psutil.Process(self._outer[number].pid).children()):
            time.sleep(0.02)
        return children[0].pid

    def _inside(self, number, line):
        into = ["nsenter", "-t", str(self._inner(number)), "-n"]
        subprocess.run([*into, *shlex.split(line)], check=True)

    def _ip(self, number, words):
        self._inside(number, f"ip {words}")

    def _end(self, number):
        process = self._outer.pop(number)
        process.send_signal(signal.SIGKILL)
        process.wait()
