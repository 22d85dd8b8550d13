"""Training on several machines through DeepSpeed's launcher: what has to be right before it starts.

DeepSpeed hands a command line to pdsh, which hands it to a shell on each machine: words, variables
and failures are lost on that way unless they are made fit for it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from imagen_scale.commands.launcher import MODULE
from imagen_scale.errors import EnvironmentProblem

# What every machine has to know alike; NCCL's and Python's are carried by DeepSpeed itself. No
# keys: whoever may call `ps` on one of the machines reads what is carried.
CARRIED = re.compile(
    r"IMAGEN_SCALE_\w+|TORCH_EXTENSIONS_DIR|HF_HOME|HF_HUB_(?!.*TOKEN)\w+|HF_ENDPOINT|GLOO_\w+|"
    r"OMP_NUM_THREADS|WANDB_(MODE|DIR|BASE_URL)|TMPDIR"
)
SSH_S = 20  # seconds to reach a machine


def address_of(host: str) -> str:
    """The address by which the others reach a machine, as itself tells it.

    Raises:
        EnvironmentProblem: If pdsh or ssh are missing, or it cannot be reached without a password.
    """
    for program, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(program) is None:
            raise EnvironmentProblem(
                f"DeepSpeed starts other machines with {program}, which is not installed: `apt "
                f"install {package}`. Without it, start `torchrun` or `srun` on every machine."
            )
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_S}", host, "hostname -I"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not done.stdout.split():
        reason = (done.stderr.strip().splitlines() or ["it tells no address"])[-1]
        raise EnvironmentProblem(
            f"{host}, the first machine of the hostfile, cannot be reached by ssh: {reason}. "
            f"`ssh {host} hostname -I` has to answer without asking for a password."
        )
    return done.stdout.split()[0]


def hosts_command(
    hostfile: Path, address: str | None, gpus: int | None, arguments: list[str]
) -> list[str]:
    """The command line that starts training on all machines of a hostfile.

    Args:
        hostfile: As DeepSpeed reads it.
        address: Of its first machine; None leaves it to DeepSpeed to ask.
        gpus: At most so many processes on each; None for as many as it has slots.
        arguments: Of the training process.
    """
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile),
        # A hostfile of one machine is another one, too.
        "--force_multi",
        *(["--no_ssh_check", "--master_addr", address] if address else []),
        *(["--num_gpus", str(gpus)] if gpus else []),
        "--log_level", "critical",
        "--module", MODULE, *map(_through_pdsh, arguments),
    ]  # fmt: skip


@contextmanager
def carried_variables(environment: Mapping[str, str] = os.environ) -> Iterator[dict[str, str]]:
    """An environment in which DeepSpeed's launcher tells the other machines ours.

    Lines of the user's own file of variables (.deepspeed_env) come after, and so prevail.
    """
    with tempfile.TemporaryDirectory(prefix="imagen-scale-") as folder:
        lines = [
            f"{name}={_value(value)}"
            for name, value in environment.items()
            if CARRIED.fullmatch(name) and "\n" not in value
        ]
        name = environment.get("DS_ENV_FILE", ".deepspeed_env")
        for path in (Path.home() / name, Path(name)):
            if path.is_file():
                lines += path.read_text(encoding="utf-8").splitlines()
        file = Path(folder, "variables")
        file.write_text("".join(f"{line}\n" for line in lines if "=" in line), encoding="utf-8")
        yield {**environment, "DS_ENV_FILE": str(file)}


def _through_pdsh(word: str) -> str:
    """A word so that it arrives as it is: pdsh replaces %h, %n and %u, then a shell reads it.

    DeepSpeed puts words with a blank in double quotes, and marks the double quotes inside.
    """
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _value(text: str) -> str:
    """A variable's value likewise; DeepSpeed puts it in double quotes where it is not plain."""
    return re.sub(r'(["\\$`])', r"\\\1", text.replace("%", "%%"))
