"""Real runs with what is traded for memory: the curve stays that of plain training."""

import json
import subprocess
import sys

import pytest
from support.runs import assert_same_curve, losses, weights
from support.tiny import TINY

from imagen_scale.runs.folders import best_path, grid_path, inference_path, snapshot_path
from imagen_scale.runs.inference import read_inference

pytestmark = pytest.mark.distributed

CPU = '"offload_optimizer":{"device":"cpu"}'


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    training = TINY["training"] | {"val_every": 100, "sample_every": None, "checkpoint_every": 2}
    unets = [TINY["unets"][0], TINY["unets"][1] | {"num_resnet_blocks": 2}]
    path.write_text(json.dumps(TINY | {"training": training, "unets": unets}))
    return path


@pytest.fixture(scope="module")
def reference(config, launch, tmp_path_factory):
    """U-Net 2, one process, no ZeRO, nothing recomputed."""
    run = tmp_path_factory.mktemp("runs") / "reference"
    launch(config, run, "memory.checkpointing=none", "--unet", "2", plain=True)
    return run


@pytest.mark.parametrize(
    ("zero", "memory", "processes"),
    [
        ('{"stage":1}', '{"checkpointing":"norms"}', 2),
        (f'{{"stage":2,{CPU}}}', '{"checkpointing":[["none","none"],["blocks","norms"]]}', 1),
        (f'{{"stage":3,{CPU},"stage3_param_persistence_threshold":0}}',
         '{"checkpointing":"norms","offload_activations":true}', 2),
        ('{"stage":3,"stage3_param_persistence_threshold":0}', '{"checkpointing":"blocks"}', 2),
        ('{"stage":0}', '{"checkpointing":"norms","ema_offload":true}', 2),
    ],
    ids=["zero1-norms-2", "zero2-mixed-1", "zero3-norms-offload-2", "zero3-blocks-2", "zero0-2"],
)  # fmt: skip
def test_no_setup_changes_the_curve(zero, memory, processes, config, launch, reference, tmp_path):
    launch(
        config, tmp_path / "run", f"deepspeed.zero_optimization={zero}", f"memory={memory}",
        "training.micro_batch=2", "--unet", "2", processes=processes,
    )  # fmt: skip
    assert_same_curve(tmp_path / "run", reference, 2)


def test_8_bit_adam_runs_offloaded_on_two_processes(config, launch, reference, tmp_path):
    launch(
        config, tmp_path / "run", f'deepspeed.zero_optimization={{"stage":2,{CPU}}}',
        "training.optimizer=adamw_8bit", "--unet", "2", processes=2,
    )  # fmt: skip
    assert_same_curve(tmp_path / "run", reference, 2, tolerance=5e-3)


def test_a_budget_is_planned_kept_and_checked(config, launch, tmp_path):
    run = tmp_path / "run"
    options = ("memory.budget=3GB", "training.precision=bf16", "--unet", "1")
    done = launch(config, run, *options, "--plan-check", "2", "training.steps=4", plain=True)
    assert "U-Net 1: planned: adamw, " in done.stdout
    assert "plan check, U-Net 1: " in done.stdout
    setup = json.loads((run / "unet1" / "setup.json").read_text())["setup"]
    assert setup["micro_batch"] * setup["accumulation"] == 8
    again = launch(config, run, *options, "training.steps=6", plain=True)
    assert "planned: " not in again.stdout
    assert "continues at step 4 of 6" in again.stdout
    too_small = launch(config, tmp_path / "none", "memory.budget=20MB", plain=True, check=False)
    assert too_small.returncode == 1
    assert "memory.budget 20MB: U-Net 1 does not fit" in too_small.stderr
    assert "Traceback" not in too_small.stderr


def test_the_optimizer_in_backward_trains_and_continues(config, launch, tmp_path):
    options = ("memory.optimizer_in_backward=true", "training.grad_clip=null", "--unet", "2")
    plain = ("training.grad_clip=null", "--unet", "2")
    launch(config, tmp_path / "plain", *plain, plain=True)
    launch(config, tmp_path / "whole", *options, plain=True)
    assert losses(tmp_path / "whole", 2) == losses(tmp_path / "plain", 2)
    run = tmp_path / "run"
    killed = launch(config, run, *options, plain=True, kill_at="step_00000002")
    assert killed.returncode < 0
    launch(config, run, *options, plain=True)
    assert losses(run, 2) == losses(tmp_path / "whole", 2)
    ours, theirs = weights(run, 2), weights(tmp_path / "whole", 2)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_crops_train(config, launch, reference, tmp_path):
    done = launch(config, tmp_path / "run", "unets.1.crop=16", "--unet", "2", plain=True)
    assert "16 px crops of 32 px" in done.stdout
    assert losses(tmp_path / "run", 2) != losses(reference, 2)
    assert all(0 < loss < 2 for loss in losses(tmp_path / "run", 2).values())


LIMITED = """
import resource, runpy, sys
import torch, deepspeed  # their libraries take address space of their own
from imagen_scale.training.session import Session
build = Session.__init__
def limited(self, *arguments, **named):
    build(self, *arguments, **named)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + {room}, resource.RLIM_INFINITY))
Session.__init__ = limited
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_running_out_of_memory_halves_the_micro_batch_and_keeps_the_curve(config, launch, tmp_path):
    """A real refusal of the allocator: the process may not map more than a few hundred MB."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(room=450_000_000))
    options = (
        "imagen.image_sizes=[64,128]", "training.global_batch=16", "training.steps=3",
        "memory.checkpointing=none", "--unet", "1",
    )  # fmt: skip
    launch(config, tmp_path / "free", *options, plain=True)
    done = launch(config, tmp_path / "run", *options, plain=True, script=script)
    assert "out of memory at step 1" in done.stdout
    assert "the global batch stays 16" in done.stdout
    setup = json.loads((tmp_path / "run" / "unet1" / "setup.json").read_text())["setup"]
    assert setup["micro_batch"] < 16
    assert setup["micro_batch"] * setup["accumulation"] == 16
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "free")
    assert ours == pytest.approx(theirs, abs=2e-6)


FULL = """
import runpy, sys
import torch
from imagen_scale.training import loop
validate, seen = loop.validate, set()
def validate_the_second_time(session, *arguments):
    if session.step not in seen:
        seen.add(session.step)
        torch.empty(2**60)
    return validate(session, *arguments)
loop.validate = validate_the_second_time
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_is_due_after_a_step_is_done_though_memory_runs_out_there(config, launch, tmp_path):
    """At the last step too, which is not taken again."""
    script, run = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL)
    options = (
        "training.steps=2", "training.warmup_steps=1", "training.val_every=1",
        "data.val_fraction=0.3", "training.keep_best=val_loss", "training.ema_widths=[0.1]",
        "training.ema_snapshot_every=1", "training.sample_every=1", "--unet", "1",
    )  # fmt: skip
    done = launch(config, run, *options, plain=True, script=script)
    assert done.stdout.count("out of memory at step") == 2
    rows = [json.loads(line) for line in (run / "unet1" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "val_loss", "colour_drift_mean"):
        assert [row["step"] for row in rows if name in row] == [1, 2], name
    assert best_path(run, 1).is_file()
    for step in (1, 2):
        assert snapshot_path(run, 1, step, 0.1).is_file() and grid_path(run, 1, step).is_file()
    assert read_inference(inference_path(run, 1)).step == 2


HOLES = """
import sys
import torch
from imagen_scale.training.memory_use import host_bytes, return_freed_host_memory

if sys.argv[1] == "returned":
    return_freed_host_memory()
torch.zeros(31 * 2**18)  # glibc takes blocks of 31 MB from heaps once it has freed one
blocks = [torch.ones(2**19) for _ in range(200)]
before = host_bytes()
del blocks[:-1:2]
print(before - host_bytes())
"""


@pytest.mark.parametrize("way", ["kept", "returned"])
def test_what_is_freed_between_blocks_in_use_goes_back_to_the_system(way):
    """200 blocks of 2 MB, every other one freed."""
    done = subprocess.run([sys.executable, "-c", HOLES, way], capture_output=True, text=True)
    freed = int(done.stdout)
    assert freed > 190 * 2**20 if way == "returned" else freed < 10 * 2**20
