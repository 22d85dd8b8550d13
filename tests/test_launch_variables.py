"""What srun and mpirun tell a process, under the names that torch.distributed reads."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT
from support.environment import environment_of_no_launcher, reserved_port, without_launcher
from support.forker import run_to_end
from support.tiny import TINY

from imagen_scale.errors import EnvironmentProblem
from imagen_scale.training.launch_variables import (
    fill_environment,
    first_host,
    speaks_for_its_machine,
)

# What `srun` of SLURM 23 sets in the third of four tasks of a step, two on each machine.
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_JOBID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0",
    "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[05-08]", "SLURM_NODELIST": "gpu[05-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_SRUN_COMM_HOST": "10.0.0.1",
    "SLURMD_NODENAME": "gpu08",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "3",
}  # fmt: skip
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ADDRESS = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}


def filled(variables):
    environment = dict(variables)
    fill_environment(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return [environment[name] for name in names]


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("node[01-03,7],other", "node01"),
        ("node7,node[1-2]", "node7"),
        ("rack[1-2]n[04-05,9],x", "rack1n04"),
        ("gpu-[3,5-7]", "gpu-3"),
        ("a-b-c", "a-b-c"),
        ("", ""),
    ],
)
def test_the_first_name_of_a_node_list(names, first):
    assert first_host(names) == first


def test_srun_leads_to_the_first_host_of_the_step_and_not_to_where_it_was_typed():
    rank, world_size, local_rank, address, port = filled(SRUN)
    assert (rank, world_size, local_rank, address) == ("2", "4", "0", "gpu07")
    others = [filled(SRUN | {"SLURM_JOB_ID": "4712"}), filled(SRUN | {"SLURM_STEP_ID": "1"})]
    ports = {port, *(other[-1] for other in others)}
    assert len(ports) == 3 and all(12_000 <= int(port) < 32_000 for port in ports)
    assert filled(SRUN | {"SLURM_PROCID": "0"})[-1] == port
    assert filled(SRUN | ADDRESS)[-2:] == ["head", "1234"]


def test_a_batch_script_outside_srun_is_one_process():
    batch = {name: SRUN[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NODELIST")}
    assert filled(batch | {"SLURM_PROCID": "0"})[:4] == ["0", "1", "0", "127.0.0.1"]
    assert filled({})[:4] == ["0", "1", "0", "127.0.0.1"]


def test_what_deepspeed_and_torchrun_set_is_left_alone():
    own = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | ADDRESS
    assert filled(own | SRUN | OPENMPI) == list(own.values())


@pytest.mark.parametrize("variables", [OPENMPI, MPICH])
def test_mpirun_counts_and_has_to_be_told_the_address_of_another_machine(variables):
    assert filled(variables | ADDRESS) == ["3", "4", "1", "head", "1234"]
    # Inside a job of SLURM what srun started are mpirun's own daemons.
    daemon = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert filled(variables | daemon | ADDRESS)[:3] == ["3", "4", "1"]
    with pytest.raises(EnvironmentProblem, match="mpirun -x MASTER_ADDR=<first host> -x MASTER_P"):
        filled(variables)
    here = {name: "4" for name in variables if name.endswith(("LOCAL_SIZE", "LOCALNRANKS"))}
    assert filled(variables | here)[3] == "127.0.0.1"
    assert filled(variables | here)[4] == str(12_000 + os.getppid() % 20_000)


def test_srun_with_pmi_is_srun():
    assert filled(SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}) == filled(SRUN)
    assert filled(SRUN | {"PMIX_RANK": "2"}) == filled(SRUN)
    with pytest.raises(EnvironmentProblem, match="PMIX_RANK is 2"):
        filled({"PMIX_RANK": "2"})


def test_the_first_process_of_a_machine_speaks_for_it():
    assert speaks_for_its_machine({})
    assert speaks_for_its_machine(SRUN)
    assert not speaks_for_its_machine(OPENMPI)
    assert not speaks_for_its_machine(MPICH)


def test_each_process_without_an_address_is_refused_before_it_trains_alone(tmp_path):
    """It was one training by each process, into the same folder, with exit code 0."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    argv = [ROOT / "launch" / "train.py", "--config", config, "--run", tmp_path / "run"]
    with environment_of_no_launcher():
        for local_rank in "01":
            place = {"OMPI_COMM_WORLD_LOCAL_RANK": local_rank}
            done = run_to_end(argv, dict(os.environ) | OPENMPI | place)
            assert done.returncode == 1
            assert done.stderr.count("error: mpirun started 4 processes") == (local_rank == "0")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_deepspeed_takes_the_one_card_that_srun_shows_each_task(private_folders, tmp_path):
    done = run_to_end(
        [ROOT / "tests" / "support" / "one_card.py"],
        {**without_launcher(), **SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "3",
         "SLURM_STEP_NUM_TASKS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"taken": [0, 0], "local_rank": 3}


@pytest.mark.distributed
def test_torchrun_leaves_run_dir_to_the_training(private_folders, tmp_path):
    """Its own parser takes --run for the beginning of an option of its own."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    with reserved_port() as port:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--master_port", str(port),
             ROOT / "launch" / "train.py", "--config", config, "--run-dir", tmp_path / "run",
             "--unet", "1", "--set", "training.steps=3"],
            env=without_launcher(), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "unet1").is_dir()
