"""What launchers tell a process about itself, under the names that torch.distributed reads.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun and
mpirun have names of their own; without a launcher there is one process.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from imagen_scale.data.network import LOCALHOST
from imagen_scale.errors import EnvironmentProblem

# Below the ports that Linux gives to outgoing connections, which begin at 32768.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000
NETWORK_ADVICE = (
    "Look at these on every machine: its name has to lead the others to it (a line 127.0.1.1 for "
    "it in /etc/hosts leads them to themselves); where there are several networks, the one to be "
    "used has to be named, e.g. GLOO_SOCKET_IFNAME=eth0 on CPUs, NCCL_SOCKET_IFNAME=eth0 on cards; "
    "no firewall may stand between them, whatever the port. If the port is taken, give another "
    "with `deepspeed --master_port`, torchrun's --rdzv_endpoint, or MASTER_PORT."
)


class _Place(NamedTuple):
    """Which process of a launcher's this is."""

    rank: str
    world_size: str
    local_rank: str
    local_size: str | None  # processes of this machine, where the launcher tells it


def fill_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Names this process as torch.distributed expects, whoever started it.

    Args:
        environment: Gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where it lacks
            them.

    Raises:
        EnvironmentProblem: If the address of rank 0 cannot be known.
    """
    if "RANK" not in environment:
        # mpirun inside a job of SLURM: its own daemons are what srun started and counted.
        place = _of_mpi(environment)
        if place is not None:
            _fill_address_of_mpi(environment, place)
        else:
            place = _of_slurm(environment)
            if place is not None:
                _fill_address_of_slurm(environment)
        rank, world_size, local_rank, _ = place or _Place("0", "1", "0", "1")
        environment["RANK"], environment["WORLD_SIZE"] = rank, world_size
        environment["LOCAL_RANK"] = local_rank
    environment.setdefault("WORLD_SIZE", "1")
    environment.setdefault("LOCAL_RANK", "0")
    environment.setdefault("MASTER_ADDR", LOCALHOST)
    is_alone = environment["WORLD_SIZE"] == "1"
    environment.setdefault("MASTER_PORT", str(free_port()) if is_alone else "29500")


def speaks_for_its_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is its machine's first process, as far as its launcher told.

    Before the processes can reach each other these are the ones that tell what is wrong.
    """
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    told = [environment[name] for name in names if name in environment]
    return not told or told[0] == "0"


def shows_one_card_each(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether its launcher may show each process a card of its own as its only one.

    `srun --gpus-per-task=1` does; under mpirun people do it with CUDA_VISIBLE_DEVICES.
    """
    return _of_mpi(environment) is not None or _of_slurm(environment) is not None


def first_host(node_list: str) -> str:
    """The first name of SLURM's short form of host names: `node[01-03,7],other` is `node01`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _of_mpi(environment: Mapping[str, str]) -> _Place | None:
    """OpenMPI's names, or those of PMI: MPICH, Intel MPI, `srun --mpi=pmi2`."""
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _Place(
            environment["OMPI_COMM_WORLD_RANK"],
            environment["OMPI_COMM_WORLD_SIZE"],
            environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"),
        )
    slurm = _of_slurm(environment)
    if "PMI_RANK" in environment and "PMI_SIZE" in environment:
        if slurm is not None and environment["PMI_SIZE"] == slurm.world_size:
            return None  # srun set both, and knows more
        return _Place(
            environment["PMI_RANK"],
            environment["PMI_SIZE"],
            environment.get("MPI_LOCALRANKID", environment.get("PMI_LOCAL_RANK", "0")),
            environment.get("MPI_LOCALNRANKS", environment.get("PMI_LOCAL_SIZE")),
        )
    if "PMIX_RANK" in environment and slurm is None:
        raise EnvironmentProblem(
            f"PMIX_RANK is {environment['PMIX_RANK']}, so some launcher started several processes, "
            f"but not how many: give each RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            f"MASTER_PORT, or use torchrun."
        )
    return None


def _of_slurm(environment: Mapping[str, str]) -> _Place | None:
    """Srun's names; the batch script itself, outside srun, is one process whatever the job's size.

    Source: srun(1), "OUTPUT ENVIRONMENT VARIABLES".
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    return _Place(
        environment["SLURM_PROCID"],
        environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")),
        environment.get("SLURM_LOCALID", "0"),
        None,
    )


def _fill_address_of_mpi(environment: MutableMapping[str, str], place: _Place) -> None:
    """Rank 0's address where all processes are on one machine; else it has to be given.

    Raises:
        EnvironmentProblem: If it was not.
    """
    if place.local_size == place.world_size:
        environment.setdefault("MASTER_ADDR", LOCALHOST)
        # All have mpirun, or its one proxy here, as their parent: two trainings do not collide.
        environment.setdefault("MASTER_PORT", str(_FIRST_PORT + os.getppid() % _NUM_PORTS))
    elif "MASTER_ADDR" not in environment and place.world_size != "1":
        raise EnvironmentProblem(
            f"mpirun started {place.world_size} processes on several machines and tells none of "
            f"them where rank 0 is. Tell all: `mpirun -x MASTER_ADDR=<first host> -x "
            f"MASTER_PORT=29500 ...` (Intel MPI, MPICH: `-genv MASTER_ADDR <first host>`; "
            f"`deepspeed --launcher openmpi`: a line MASTER_ADDR=<first host> in .deepspeed_env)."
        )


def _fill_address_of_slurm(environment: MutableMapping[str, str]) -> None:
    """The step's first host, which runs rank 0, and a port that other jobs of it do not take.

    SLURM_LAUNCH_NODE_IPADDR would be where srun was typed: after `salloc` the login node.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    if host := first_host(nodes):
        environment.setdefault("MASTER_ADDR", host)
    job, step = (_number(environment.get(name)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _FIRST_PORT + (16 * job + step % 16) % _NUM_PORTS
    environment.setdefault("MASTER_PORT", str(port))


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port: int = probe.getsockname()[1]
        return port
