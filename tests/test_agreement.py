"""Ranks that would train something else than rank 0 are refused by name."""

import functools
import json
import os
import shutil

import pytest
from PIL import Image
from support import ROOT, another_machine
from support.environment import rank_variables, reserved_port
from support.forker import fork
from support.tiny import TINY

from imagen_scale.training.agreement import _first_difference

OURS = {"imagen-scale": "1", "training.lr": 1e-3, "pictures": 8, "mean colours": [[10, 20, 30]]}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ""),
        ({"mean colours": [[12, 19, 30]]}, ""),  # another decoder
        ({"training.lr": 0.1}, "has training.lr 0.1, rank 0 (host a) has 0.001. All"),
        ({"pictures": 7}, "has pictures 7, rank 0 (host a) has 8."),
        ({"mean colours": [[90, 20, 30]]}, "other pictures under the same names than rank 0"),
    ],
)
def test_the_first_difference_names_the_host_and_both_values(changed, told):
    found = _first_difference([("a", OURS), ("b", OURS | changed)])
    assert told in found
    assert found.startswith("rank 1 (host b) has ") == bool(told)
    assert bool(found) == bool(told)


# The real thing: two processes, each with a folder of its own for what differs.

DATA = {"source": "folder", "path": "pictures"}


@pytest.fixture
def machines(tmp_path):
    """The working folders of two ranks, with the same pictures in each."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        (folder / "pictures").mkdir(parents=True)
        for number in range(8):
            # One name is not UTF-8, which Linux allows.
            name = f"{number}.png" if number < 7 else os.fsdecode(b"\xff.png")
            path = folder / "pictures" / name
            Image.new("RGB", (32, 32), (30 * number, 100, 200)).save(path)
            path.with_suffix(".txt").write_text(f"square {number}")
    return folders


@pytest.fixture
def outputs(tmp_path, machines, private_folders):
    """Trains, and gives each rank's exit code and what it said."""

    def run(first=None, rank_1=()):
        config = tmp_path / "config.json"
        config.write_text(json.dumps(TINY | {"data": DATA}))
        first = first or [functools.partial(os.chdir, folder) for folder in machines]
        common = [ROOT / "launch" / "train.py", "--config", config, "--run", tmp_path / "run"]
        started = []
        with reserved_port() as port:
            for rank, folder in enumerate(machines):
                argv = [*common, *(rank_1 if rank else [])]
                with (folder / "output").open("w") as output:
                    environment = os.environ | rank_variables(rank, 2, port)
                    started.append(
                        fork(argv, environment, stdout=output, stderr=output, first=first[rank])
                    )
            for process in started:
                process.join(240)
                process.kill()
        codes = [process.exitcode for process in started]
        return codes, [(folder / "output").read_text() for folder in machines]

    return run


def refused(codes, outputs, told, code=1):
    assert codes == [code, code]
    errors = [line for text in outputs for line in text.splitlines() if "error" in line]
    assert len(errors) == 1, errors  # said once
    assert told in errors[0]


@pytest.mark.distributed
def test_another_configuration_is_refused_before_anything_is_written(outputs, tmp_path):
    found = outputs(rank_1=("--set", "training.lr=0.1"))
    refused(*found, "has training.lr 0.1, rank 0 (host ")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_it_is_said_once_where_the_other_rank_hears_of_it_late(machines, outputs):
    """Rank 0 has said it and could end, while rank 1, which failed first, still waits for that."""
    hooks = another_machine.that_fails_late, another_machine.that_looks_seldom
    first = [functools.partial(hook, folder) for hook, folder in zip(hooks, machines, strict=True)]
    found = outputs(first=first, rank_1=("--set", "training.lr=0.1"))
    refused(*found, "has training.lr 0.1, rank 0 (host ")


@pytest.mark.distributed
def test_other_pictures_and_other_captions_are_refused(machines, outputs, tmp_path):
    (machines[1] / "pictures" / "3.txt").write_text("another square")
    refused(*outputs(), "has names and captions ")
    (machines[1] / "pictures" / "3.txt").write_text("square 3")
    Image.new("RGB", (32, 32), (0, 0, 0)).save(machines[1] / "pictures" / "3.png")
    refused(*outputs(), "has other pictures under the same names than rank 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_rank_that_cannot_prepare_ends_the_others_and_says_why(machines, outputs):
    shutil.rmtree(machines[1] / "pictures")
    codes, said = outputs()
    assert codes[0] != 0 and codes[1] != 0
    (line,) = [line for text in said for line in text.splitlines() if "error: " in line]
    assert line.startswith("error: rank 1 (host ") and "pictures" in line
    assert line in said[1]


@pytest.mark.distributed
def test_other_code_and_a_folder_of_its_own_are_refused(machines, outputs, tmp_path):
    here = functools.partial(os.chdir, machines[0])
    first = [here, functools.partial(another_machine.with_other_code, machines[1])]
    refused(*outputs(first=first), "has the code of imagen-scale ")
    alone = tmp_path / "its own"
    first = [here, functools.partial(another_machine.that_sees_nothing_late, machines[1])]
    refused(*outputs(first=first, rank_1=("--run", alone)), f"does not see in {alone}")
    assert not (tmp_path / "run").exists() and not alone.exists()
