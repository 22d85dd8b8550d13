"""Two and three machines, each with a network of its own: `make test-hosts`."""

import json
import re
import shutil
import signal
import time

import psutil
import pytest
from support import ROOT, network
from support.tiny import TINY

pytestmark = pytest.mark.hosts
STEPS = 12


@pytest.fixture(scope="module")
def variables(private_folders):
    """Of every process: where operators are compiled, and nothing of pytest's."""
    return {
        "TORCH_EXTENSIONS_DIR": str(private_folders / "torch_extensions"), "HF_HUB_OFFLINE": "1",
        "LANG": "C.UTF-8",
    }  # fmt: skip


@pytest.fixture
def machines(tmp_path, variables):
    if reason := network.why_not():
        pytest.skip(reason)
    with network.Network(tmp_path / "network", 3, variables) as machines:
        yield machines


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    write_config(folder / "tiny.json")
    return folder


def write_config(path, **changed):
    training = {"steps": STEPS, "global_batch": 12, "hang_timeout": 20.0, "sample_every": None}
    path.write_text(json.dumps(TINY | {"training": TINY["training"] | training | changed}))


def train_words(shared, run, *more):
    config = shared / "tiny.json"
    script = ROOT / "launch" / "train.py"
    return [script, "--config", config, "--run-dir", run, "--unet", "1", *more]


def of_torchrun(machines, shared, run, numbers, *more, options=(), **per_machine):
    """One `torchrun` on each machine."""
    started = []
    for number in numbers:
        argv = [
            "torchrun", "--nnodes", len(numbers), "--nproc_per_node", 1,
            "--rdzv_backend", "c10d", "--rdzv_endpoint", f"worker-{numbers[0]}:29500", *options,
            *train_words(shared, run, *more, *per_machine.get(f"on_{number}", ())),
        ]  # fmt: skip
        started.append(machines.start(number, argv, shared / f"output{number}"))
    return started


def with_variables(machines, shared, run, numbers, variables_of, *more, **per_machine):
    """One Python on each machine, told by variables who it is."""
    started = []
    for rank, number in enumerate(numbers):
        words = train_words(shared, run, *more, *per_machine.get(f"on_{number}", ()))
        told = variables_of(rank, len(numbers)) | per_machine.get(f"variables_{number}", {})
        started.append(
            machines.start(number, ["python", *words], shared / f"output{number}", **told)
        )
    return started


def of_srun(rank, ranks):
    """As after `salloc` on another machine: what tells of the launch leads astray."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_NTASKS": str(ranks), "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": f"worker-[1-{ranks}]", "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.99",
    }  # fmt: skip


def of_mpirun(rank, ranks):
    return {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(ranks),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "MASTER_ADDR": "worker-1", "MASTER_PORT": "29500",
    }  # fmt: skip


def ended(processes, limit=240):
    end = time.monotonic() + limit
    return [process.wait(max(1, end - time.monotonic())) for process in processes]


def said(shared, number):
    return (shared / f"output{number}").read_text()


def losses(run):
    rows = map(json.loads, (run / "unet1" / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def reached(run, step, limit=120):
    """Waits until a training has reported so many steps."""
    end = time.monotonic() + limit
    while not (run / "unet1" / "metrics.jsonl").exists() or max(losses(run), default=0) < step:
        assert time.monotonic() < end, f"step {step} was never reported"
        time.sleep(0.5)


@pytest.fixture
def one(machines, shared):
    """The losses of one process on one machine."""
    argv = ["python", *train_words(shared, shared / "one")]
    assert ended([machines.start(3, argv, shared / "output3")]) == [0], said(shared, 3)
    return losses(shared / "one")


def test_two_machines_learn_what_one_does_whoever_starts_them(machines, shared, one):
    hostfile = shared / "hostfile"
    hostfile.write_text("worker-1 slots=1\nworker-2 slots=1\n")
    runs = {}
    argv = ["imagen-scale", "train", shared / "tiny.json", "--hostfile", hostfile, "--unet", "1"]
    runs["hostfile"] = [
        machines.start(1, [*argv, "--run", shared / "hostfile_run"], shared / "output1")
    ]
    assert ended(runs["hostfile"]) == [0], said(shared, 1)
    starts = {
        "torchrun": lambda run: of_torchrun(machines, shared, run, [1, 2]),
        "srun": lambda run: with_variables(machines, shared, run, [1, 2], of_srun),
        "mpirun": lambda run: with_variables(machines, shared, run, [1, 2], of_mpirun),
        "three": lambda run: with_variables(machines, shared, run, [1, 2, 3], of_srun),
    }
    for name, start in starts.items():
        assert set(ended(start(shared / f"{name}_run"))) == {0}, (name, said(shared, 1))
    machines.slow(2, "4mbit")
    started = of_torchrun(machines, shared, shared / "slow_run", [1, 2])
    assert ended(started) == [0, 0], said(shared, 1)
    for name in ["hostfile", *starts, "slow"]:
        assert losses(shared / f"{name}_run") == pytest.approx(one, abs=2e-6), name
        if name != "three":
            manifest = shared / f"{name}_run" / "unet1" / f"step_{STEPS:08d}" / "manifest.json"
            assert json.loads(manifest.read_text())["processes"] == 2, name


def stopped(processes, run, step):
    """Asks a training to end once it has reported a step; it saves."""
    reached(run, step)
    for process in processes[:1]:  # all ranks hear of it
        psutil.Process(process.pid).children()[0].terminate()
    assert set(ended(processes)) == {128 + signal.SIGTERM}


def test_power_is_lost_and_other_numbers_of_machines_go_on(machines, shared):
    write_config(shared / "tiny.json", steps=4000, checkpoint_every=4)
    one, run = shared / "one", shared / "run"
    alone = with_variables(machines, shared, one, [3], of_srun)
    stopped(alone, one, 20)
    started = with_variables(machines, shared, run, [1, 2], of_srun)
    reached(run, 6)
    machines.power_off(2)
    assert ended(started[:1], 60) == [1]
    lost = re.search(
        r"error: rank 1 \(host worker-2, process \d+\) has given no sign of life for (\d+) s",
        said(shared, 1),
    )
    assert lost and int(lost[1]) <= 20, said(shared, 1)
    stopped(with_variables(machines, shared, run, [1], of_srun), run, 12)
    assert "continues at step" in said(shared, 1)
    machines.boot(2)
    stopped(with_variables(machines, shared, run, [1, 2, 3], of_srun), run, 18)
    assert "processes 1 -> 3" in said(shared, 1)
    expected, found = losses(one), losses(run)
    assert sorted(found) == list(range(1, max(found) + 1))
    common = sorted(found.keys() & expected.keys())
    assert len(common) >= 18
    assert [found[n] for n in common] == pytest.approx([expected[n] for n in common], abs=2e-6)


def test_a_cable_is_cut_and_each_side_says_so_of_the_other(machines, shared):
    write_config(shared / "tiny.json", steps=4000)
    of_torchrun(machines, shared, shared / "run", [1, 2])
    reached(shared / "run", 3)
    machines.cut(2)
    end = time.monotonic() + 90
    while not all("no sign of life" in said(shared, number) for number in (1, 2)):
        assert time.monotonic() < end, said(shared, 1) + said(shared, 2)
        time.sleep(1)
    assert "rank 1 (host worker-2" in said(shared, 1)
    assert "rank 0 (host worker-1" in said(shared, 2)


def test_what_would_train_something_else_is_refused_by_name(machines, shared):
    other = shared / "other code"
    shutil.copytree(ROOT / "imagen_scale", other / "imagen_scale")
    version = other / "imagen_scale" / "version.py"
    version.write_text("# changed\n" + version.read_text())
    for told, changes in (
        ("rank 1 (host worker-2) has training.lr 0.1", {"on_2": ("--set", "training.lr=0.1")}),
        ("rank 1 (host worker-2) has training.steps 9", {"on_2": ("--set", "training.steps=9")}),
        ("has the code of imagen-scale", {"variables_2": {"PYTHONPATH": str(other)}}),
        ("does not see in", {"on_2": ("--run-dir", machines.home(2) / "run")}),
    ):  # fmt: skip
        started = with_variables(machines, shared, shared / "run", [1, 2], of_srun, **changes)
        assert 0 not in ended(started, 120)
        both = said(shared, 1) + said(shared, 2)
        assert both.count("error: ") == 1 and told in both, both
        assert not (shared / "run").exists()


def test_a_name_that_leads_to_oneself_is_explained(machines, shared):
    hosts = machines.home(2) / "hosts"
    hosts.write_text(hosts.read_text().replace("10.77.0.2", "127.0.1.1"))
    started = with_variables(machines, shared, shared / "run", [1, 2], of_srun)
    codes = ended(started)
    both = said(shared, 1) + said(shared, 2)
    assert codes == [0, 0] or "127.0.1.1" in both, both
