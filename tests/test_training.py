"""Real runs on CPU ranks, one and two of them through the deepspeed launcher.

Every configuration of processes, ZeRO, offload and accumulation must give the loss curve of plain
one-process training, and a continued run that of an uninterrupted one.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import losses

from imagen_scale.runs.checkpoint import list_checkpoints
from imagen_scale.runs.checkpoint_average import averaged_at
from imagen_scale.runs.folders import (
    best_path,
    best_record_path,
    inference_path,
    snapshot_path,
    snapshot_paths,
)
from imagen_scale.runs.inference import read_inference

pytestmark = pytest.mark.distributed

ZERO_2 = 'deepspeed.zero_optimization={"stage":2,"offload_optimizer":{"device":"cpu"}}'
ZERO_3 = (
    'deepspeed.zero_optimization={"stage":3,"offload_optimizer":{"device":"cpu"},'
    '"offload_param":{"device":"cpu"},"stage3_param_persistence_threshold":0}'
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from support.tiny import TINY

    path = tmp_path_factory.mktemp("config") / "tiny.json"
    data, training = TINY["data"] | {"val_fraction": 0.2}, TINY["training"] | {"val_x0": True}
    training["keep_best"] = "val_loss"
    path.write_text(json.dumps(TINY | {"data": data, "training": training}))
    return path


@pytest.fixture(scope="module")
def reference(config, launch, tmp_path_factory):
    """Both U-Nets, one process, no ZeRO, under the deepspeed launcher."""
    run = tmp_path_factory.mktemp("runs") / "reference"
    done = launch(config, run, real=True)
    return run, done.stdout


def weights(run, unet=1):
    return load_file(run / f"unet{unet}" / "inference.safetensors")


def assert_same_curve(run, reference, unet, tolerance=2e-6):
    ours, theirs = losses(run, unet), losses(reference, unet)
    assert list(ours) == list(theirs) == [1, 2, 3, 4, 5, 6]
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], abs=tolerance), f"step {step}"


def assert_checkpoint_holds_the_weights(run, unet):
    """What is sampled from can be had of the last checkpoint, too, whoever saved it."""
    with averaged_at(run, read_inference(inference_path(run, unet)), 6) as file:
        ours = load_file(file.path)
    for name, value in weights(run, unet).items():
        assert torch.equal(ours[name], value), name


def test_a_run_leaves_everything(reference):
    run, output = reference
    assert "OpenMoji" in output
    for unet in (1, 2):
        file = read_inference(run / f"unet{unet}" / "inference.safetensors")
        assert file.is_finished
        assert file.step == 6
        assert (run / "samples" / f"unet{unet}_step_00000006.png").is_file()
        assert [path.name for path in list_checkpoints(run / f"unet{unet}")] == [
            "step_00000006",
            "step_00000003",
        ]
        assert losses(run, unet)[6] < losses(run, unet)[1]
        assert_checkpoint_holds_the_weights(run, unet)
    lines = (run / "unet1" / "metrics.jsonl").read_text().splitlines()
    validations = [row for row in map(json.loads, lines) if "val_loss" in row]
    assert [row["step"] for row in validations] == [3, 6]
    assert all(row["val_x_0_error"] > 0 for row in validations)
    best = min(validations, key=lambda row: row["val_loss"])
    kept = json.loads(best_record_path(run, 1).read_text())
    wanted = {"measure": "val_loss", "value": best["val_loss"], "step": best["step"], "samples": 8}
    assert kept.items() >= wanted.items() and kept["pictures"]
    assert read_inference(best_path(run, 1)).step == best["step"]
    for row in map(json.loads, lines):
        if "loss" in row:
            quarters = [value for name, value in row.items() if name.startswith("loss_quarter_")]
            assert min(quarters) - 1e-6 <= row["loss"] <= max(quarters) + 1e-6
    drawn = [row for row in map(json.loads, lines) if "colour_drift_mean" in row]
    assert [row["step"] for row in drawn] == [6] and "psnr_db" not in drawn[0]
    lines = (run / "unet2" / "metrics.jsonl").read_text().splitlines()
    (drawn,) = [row for row in map(json.loads, lines) if "colour_drift_mean" in row]
    assert 0 < drawn["psnr_db"] < 60 and 0 < drawn["lowres_consistency_db"] < 60
    leftovers = [path for path in run.rglob("*") if path.name.startswith(".")]
    assert leftovers == []


@pytest.mark.parametrize(
    ("zero", "flags", "unets"),
    [(ZERO_2, (), (1, 2)), (ZERO_3, ("--unet", "2"), (2,))],
    ids=["zero2-offload", "zero3-offload"],
)
def test_two_processes_give_the_curve_of_one(
    zero, flags, unets, config, launch, reference, tmp_path
):
    blocks = "memory.checkpointing=blocks"  # which changes no loss either
    launch(
        config, tmp_path / "run", zero, blocks, "training.micro_batch=2", *flags, processes=2,
        real=zero == ZERO_3,
    )  # fmt: skip
    for unet in unets:
        assert_same_curve(tmp_path / "run", reference[0], unet)
        assert_checkpoint_holds_the_weights(tmp_path / "run", unet)
        ours, theirs = weights(tmp_path / "run", unet), weights(reference[0], unet)
        # Adam divides by the gradient's own size, so a weight whose gradient is all rounding
        # moves at random: compare the whole.
        change = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
        assert change.sqrt() < 1e-4 * sum(w.square().sum() for w in theirs.values()).sqrt()


def test_accumulation_is_one_large_batch_also_under_plain_python(
    config, launch, reference, tmp_path
):
    launch(config, tmp_path / "run", "training.micro_batch=2", "--unet", "1", plain=True, real=True)
    assert_same_curve(tmp_path / "run", reference[0], 1)
    assert not (tmp_path / "run" / "unet2").exists()


def test_wandb_offline_gets_the_curve_and_the_run_needs_no_network(
    config, launch, reference, tmp_path
):
    wandb = 'logging.wandb={"project":"test","mode":"offline"}'
    launch(config, tmp_path / "run", wandb, "--unet", "1")
    assert losses(tmp_path / "run") == losses(reference[0])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_lost_or_damaged_inference_file_is_written_anew(config, launch, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    inference = run / "unet1" / "inference.safetensors"
    for damage in (Path.unlink, lambda path: path.write_bytes(b"damaged")):
        damage(inference)
        launch(config, run, "--unet", "1", plain=True)
        before = weights(reference[0])
        assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    assert losses(run) == losses(reference[0])


OVERFLOW = """
import sys
sys.path.insert(0, ".")
from imagen_scale.training import loop
loop.learning_rate = lambda stage, step: 1e39  # beyond all float32
sys.argv.pop(0)
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_continues_and_a_diverged_one_saves_nothing(
    config, launch, reference, tmp_path
):
    """Killed with steps that are no multiple of anything; then driven to overflow."""
    run = tmp_path / "run"
    options = ("training.steps=7", "training.checkpoint_every=2", "logging.log_every=3")
    whole = tmp_path / "whole"
    launch(config, whole, *options, "--unet", "1", plain=True)
    killed = launch(config, run, *options, "--unet", "1", plain=True, kill_at="step_00000004")
    assert killed.returncode == -signal.SIGKILL
    launch(config, run, *options, "--unet", "1", plain=True)
    assert losses(run) == losses(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())

    script = tmp_path / "overflow.py"
    script.write_text(OVERFLOW)
    diverged = launch(
        config, run, *options, "training.lr=1e6", "training.steps=30", "--unet", "1",
        plain=True, script=script, check=False,
    )  # fmt: skip
    assert diverged.returncode == 1
    assert "training diverged before step" in diverged.stderr
    assert "changed since this run was started: training.lr: 0.001 -> 1000000.0" in diverged.stdout
    assert list_checkpoints(run / "unet1")[0].name == "step_00000007"


def test_a_missing_compiler_is_named_with_the_remedy(config, launch, tmp_path):
    done = launch(config, tmp_path / "run", plain=True, check=False, env={"CXX": "no-such-c++"})
    assert done.returncode == 1
    assert "no C++ compiler" in done.stderr
    assert "apt install g++" in done.stderr
    assert "Traceback" not in done.stderr


def test_starting_again_does_nothing_when_all_is_done(config, launch, reference):
    done = launch(config, reference[0], "--resume")
    assert "U-Net 1: already trained (6 steps)" in done.stdout
    assert "U-Net 2: already trained (6 steps)" in done.stdout


def undo_last_checkpoint(run, unet):
    """Leaves a run as a kill after step 3 would have left it."""
    shutil.rmtree(run / f"unet{unet}" / "step_00000006")
    (run / f"unet{unet}" / "inference.safetensors").unlink()


@pytest.mark.parametrize(
    ("zero", "precision", "processes"),
    [
        ('deepspeed.zero_optimization={"stage":0}', "fp32", 1),
        (ZERO_2, "bf16", 2),
        (ZERO_3, "bf16", 2),
    ],
    ids=["zero0", "zero2-offload-2", "zero3-offload-2"],
)
def test_a_continued_run_is_the_same_run(zero, precision, processes, config, launch, tmp_path):
    run = tmp_path / "run"
    options = (zero, f'training.precision="{precision}"', "training.micro_batch=4",
               "training.ema_widths=[0.05,0.1]", "--unet", "2")  # fmt: skip
    launch(config, run, *options, processes=processes)
    before, curve = weights(run, 2), losses(run, 2)
    averages = [snapshot_path(run, 2, 6, width) for width in (0.05, 0.1)]
    saved = [path.read_bytes() for path in averages]
    assert saved[0] != saved[1] and len(snapshot_paths(run, 2)) == 12
    undo_last_checkpoint(run, 2)
    for path in averages:
        path.unlink()
    stray = snapshot_path(run, 2, 5, 0.2)  # of steps that are repeated, which may be others then
    stray.touch()
    (run / "unet2" / ".staging_00000006").mkdir()  # a save that the kill interrupted
    with (run / "unet2" / "metrics.jsonl").open("a") as file:
        file.write('{"unet": 2, "st')  # a line that it cut

    done = launch(config, run, *options, processes=processes)

    assert "continues at step 3 of 6" in done.stdout
    assert losses(run, 2) == curve
    after = weights(run, 2)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [path.read_bytes() for path in averages] == saved
    assert not (run / "unet2" / ".staging_00000006").exists() and not stray.exists()


def test_a_training_with_nothing_left_says_what_goes_on(config, launch, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    (run / "unet1" / "inference.safetensors").unlink()
    done = launch(config, run, "--unet", "1", "training.steps=4", plain=True)
    assert (
        "U-Net 1: its checkpoint is of step 6 and training.steps is 4, so nothing is left to "
        "train; set training.steps above 6 to go on"
    ) in done.stdout
    assert losses(run, 1) == losses(reference[0], 1)
    assert (run / "unet1" / "inference.safetensors").is_file()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    config, launch, reference, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    (run / "unet1" / "inference.safetensors").unlink()
    shard = run / "unet1" / "step_00000006" / "rank_0000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    done = launch(config, run, "--unet", "1")

    assert f"damaged checkpoint passed over: {shard}" in done.stdout
    assert "continues at step 3 of 6" in done.stdout
    assert losses(run, 1) == losses(reference[0], 1)

    for folder in list_checkpoints(run / "unet1"):
        (folder / "manifest.json").unlink()
    (run / "unet1" / "inference.safetensors").unlink()
    refused = launch(config, run, "--unet", "1", check=False)
    assert refused.returncode == 1
    assert "all 2 checkpoints are damaged" in refused.stderr


def test_a_run_continues_on_another_number_of_processes_and_at_another_stage(
    config, launch, reference, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    undo_last_checkpoint(run, 1)
    done = launch(config, run, ZERO_3, "training.micro_batch=4", "--unet", "1", processes=2)
    assert "continues at step 3 of 6" in done.stdout
    assert "saved with another setup: processes 1 -> 2, zero_stage 0 -> 3" in done.stdout
    assert_same_curve(run, reference[0], 1)


def test_a_run_told_to_stop_saves_and_continues_as_if_nothing_was(config, launch, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = (ZERO_2, "training.steps=24", "training.checkpoint_every=24", "training.val_every=24",
               "training.sample_every=24", "data.num_workers=1", "training.micro_batch=4",
               "--unet", "1")  # fmt: skip
    told = launch(config, run, *options, processes=2, kill_at="metrics.jsonl",
                  kill_with=signal.SIGTERM)  # fmt: skip
    assert told.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in told.stderr
    assert "Traceback" not in told.stderr
    (stopped,) = list_checkpoints(run / "unet1")
    assert 0 < int(stopped.name[-8:]) < 24
    launch(config, run, *options, processes=2)
    launch(config, whole, *options, processes=2)
    assert losses(run) == losses(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())


FULL_DISK = """
import resource, sys
sys.path.insert(0, ".")
from imagen_scale.training.telemetry import Telemetry

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

advance = Telemetry.advance

def give_back(self, step):
    advance(self, step)
    limit(50_000 if step < LAST else resource.RLIM_INFINITY)

Telemetry.advance = give_back
sys.argv.pop(0)
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_save_that_fails_costs_nothing_but_that_save(config, launch, reference, tmp_path):
    """No file may be larger than 50 kB until step 6; then until the end."""
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK.replace("LAST", "6"))
    run = tmp_path / "run"
    done = launch(config, run, "--unet", "1", plain=True, script=script)
    assert "no checkpoint saved at step 3" in done.stdout
    assert "no file for sampling saved at step 3" in done.stdout
    assert "File too large" in done.stdout
    assert [path.name for path in list_checkpoints(run / "unet1")] == ["step_00000006"]
    assert losses(run) == losses(reference[0])

    script.write_text(FULL_DISK.replace("LAST", "100"))
    run = tmp_path / "never"
    failed = launch(config, run, "--unet", "1", plain=True, script=script, check=False)
    assert failed.returncode == 1
    assert "no checkpoint saved at step 6" in failed.stderr
    assert "File too large" in failed.stderr and "run the same command again" in failed.stderr
    assert "Traceback" not in failed.stderr
    left = {path.name for path in (run / "unet1").iterdir()}
    assert left == {"metrics.jsonl", "setup.json"}
    assert losses(run) == losses(reference[0])

    # The weights to sample from are a third of a checkpoint: where they fit, they are there.
    fits = (reference[0] / "unet1" / "inference.safetensors").stat().st_size
    script.write_text(FULL_DISK.replace("LAST", "100").replace("50_000", str(fits)))
    run = tmp_path / "half"
    failed = launch(config, run, "--unet", "1", plain=True, script=script, check=False)
    assert failed.returncode == 1
    assert "inference.safetensors holds the weights of the last step" in failed.stderr
    assert all(torch.equal(v, weights(reference[0])[name]) for name, v in weights(run).items())


FAULT = """
import errno, sys
sys.path.insert(0, ".")
from imagen_scale.training import saving

def fails(*inputs):
    raise ERROR

saving.save_shard = fails
sys.argv.pop(0)
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("error", "survived"),
    [
        ("AttributeError('no such attribute')", False),
        ("FileNotFoundError(errno.ENOENT, 'No such file', 'runs/x')", False),
        ("OSError(errno.EROFS, 'Read-only file system', 'runs/x')", True),
    ],
)
def test_only_a_disk_may_spoil_a_save(error, survived, config, launch, tmp_path):
    """Any other failure would come again: training ends at the first save, not at the last."""
    script = tmp_path / "fault.py"
    script.write_text(FAULT.replace("ERROR", error))
    run = tmp_path / "run"
    done = launch(config, run, "--unet", "1", plain=True, script=script, check=False)
    assert done.returncode == 1
    assert error.partition("(")[0] in done.stderr
    assert "Traceback" in done.stderr or error.startswith(("FileNotFound", "OSError"))
    assert (6 in losses(run)) == survived
    assert ("Training goes on" in done.stdout) == survived


FP16 = """
import sys
sys.path.insert(0, ".")
from deepspeed.accelerator import get_accelerator

type(get_accelerator()).is_fp16_supported = lambda self: True  # slow here, not wrong
sys.argv.pop(0)
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_fp16_trains_and_continues_bit_for_bit(config, launch, tmp_path):
    script = tmp_path / "fp16.py"
    script.write_text(FP16)
    options = ("--unet", "2", 'training.precision="fp16"', "training.micro_batch=4")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    done = launch(config, whole, *options, plain=True, script=script)
    assert "fp16" in done.stdout
    launch(config, halves, *options, "training.steps=3", plain=True, script=script)
    launch(config, halves, *options, plain=True, script=script)
    assert losses(halves, 2) == losses(whole, 2)
    assert all(
        torch.equal(value, weights(whole, 2)[name]) for name, value in weights(halves, 2).items()
    )
    assert '"loss_scale": 65536.0' in (whole / "unet2" / "metrics.jsonl").read_text()
    manifest = json.loads((whole / "unet2" / "step_00000006" / "manifest.json").read_text())
    assert manifest["precision"] == "fp16" and manifest["loss_scale"]["cur_iter"] == 6


NOT_A_NUMBER = """
import sys
import torch
sys.path.insert(0, ".")
from imagen_scale.training.objective import Objective

losses = Objective.timed_losses

def spoiled(self, unet, batch, purpose="train"):
    found = losses(self, unet, batch, purpose)
    bad = torch.isin(batch.positions // 8, torch.tensor(STEPS)) & (batch.positions % 8 == 5)
    if purpose != "train":
        return found
    return found._replace(values=found.values * torch.where(bad, float("nan"), 1.0))

Objective.timed_losses = spoiled
sys.argv.pop(0)
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_step_that_is_not_a_number_is_left_out_and_many_end_the_run(config, launch, tmp_path):
    script = tmp_path / "nan.py"
    script.write_text(NOT_A_NUMBER.replace("STEPS", "[1]"))
    run = tmp_path / "once"
    done = launch(config, run, "--unet", "1", "logging.log_every=3", plain=True, script=script)
    (line,) = [text for text in done.stdout.splitlines() if "left out" in text]
    assert "step 2 left out: the loss of" in line
    assert line.count(",") == 0  # the one picture
    rows = [json.loads(x) for x in (run / "unet1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "skipped" in row] == [2]
    assert all(value.isfinite().all() for value in weights(run).values())
    assert read_inference(run / "unet1" / "inference.safetensors").is_finished

    script.write_text(NOT_A_NUMBER.replace("STEPS", "[3, 4, 5]"))
    run = tmp_path / "always"
    stopped = launch(config, run, "--unet", "1", "training.max_skipped=2", plain=True,
                     script=script, check=False)  # fmt: skip
    assert stopped.returncode == 1
    assert stopped.stdout.count("going back to the newest checkpoint, once") == 1
    assert stopped.stdout.count("continues at step 3 of 6") == 1
    assert "2 steps in a row left out" in stopped.stderr
    assert "training.lr" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert list_checkpoints(run / "unet1")[0].name == "step_00000003"


def test_a_spike_ends_the_same_command_again_until_it_is_gone(config, launch, tmp_path):
    """Though a training that goes on has seen few reports of its own."""
    script, run = tmp_path / "spike.py", tmp_path / "run"
    script.write_text(NOT_A_NUMBER.replace("STEPS", "[6]").replace('float("nan")', "1000"))
    options = ("--unet", "1", "training.on_spike=stop", "training.steps=12")
    said = []
    for _ in range(2):
        stopped = launch(config, run, *options, plain=True, script=script, check=False)
        assert stopped.returncode == 1, stopped.stdout
        said.append(stopped.stderr)
    assert said[0] == said[1] and "at step 7 the loss is" in said[0]
    assert "the newest checkpoint is of step 6" in said[0]
    assert "continues at step 6 of 12" in launch(config, run, *options, plain=True).stdout


def test_wrong_use_is_one_sentence_and_exit_code_2(config, launch, reference, tmp_path):
    changed = launch(config, reference[0], "unets.0.dim=16", check=False)
    assert changed.returncode == 2
    assert "unets.0.dim: 8 -> 16" in changed.stderr
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for flags in ((), ("--fresh",)):
        not_a_run = launch(config, foreign, *flags, check=False)
        assert not_a_run.returncode == 2
        assert "exists and is not a run" in not_a_run.stderr
        assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    nothing = launch(config, tmp_path / "none", "--resume", check=False)
    assert nothing.returncode == 2
    assert "holds no run yet" in nothing.stderr
    assert not (tmp_path / "none").exists()
    for done in (changed, nothing):
        assert "Traceback" not in done.stderr
