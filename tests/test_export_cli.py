"""The export commands: from a trained run to verified files, and every way to fail."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from imagen_scale_export.exporter import ExportOptions, export_unet
from imagen_scale_export.staging import check_room, staged
from support.tiny import write_stage

from imagen_scale.commands.export import _inference_file
from imagen_scale.commands.main import main
from imagen_scale.errors import EnvironmentProblem, ExportError, UsageError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.exported import export_folder, open_exported
from imagen_scale.sampling.runtimes.manifest import read_manifest
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Inputs, Stage

CPU = torch.device("cpu")
# Of the first stage, where any network will do: tracing takes as long as there are layers.
SHALLOW = ("unets.0.dim_mults=[1]", "unets.0.layer_attns=false", "unets.0.layer_cross_attns=false",
           "unets.0.attend_at_middle=false")  # fmt: skip
ALL_SHALLOW = (*SHALLOW, *(change.replace("unets.0", "unets.1") for change in SHALLOW))


def cli(*arguments):
    return CliRunner().invoke(main, ["export", *(str(argument) for argument in arguments)])


@pytest.fixture
def run(exported, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(exported, tmp_path / "tiny")


def test_export_inspect_and_verify(tmp_path):
    write_stage(tmp_path, 1, overrides=SHALLOW)
    done = cli("--unet", 1, "--format", "onnx", "--run", tmp_path)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "export" / "unet1" / "onnx-fp32"
    assert f"{folder}: U-Net 1, onnx, fp32, opset 21, 16 px" in done.output
    assert "against torch: one evaluation within" in done.output
    assert not list(folder.parent.glob(".staging_*"))
    inspected = cli("inspect", folder)
    assert inspected.exit_code == 0
    assert inspected.output in done.output
    verified = cli("verify", folder)
    assert verified.exit_code == 0, verified.output
    assert "20 steps within 0.00" in verified.output
    again = cli("--unet", 1, "--run", tmp_path)
    assert again.exit_code == 2
    assert "exists already; add --force" in again.output


def change_a_weight(folder):
    """Larger than rounding; the manifest is rewritten to fit, as an attacker would."""
    model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == "unet.final_conv.weight"]
    place = {
        entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"
    }
    path = folder / "denoiser.onnx.data"
    content = bytearray(path.read_bytes())
    part = slice(place["offset"], place["offset"] + place["length"])
    values = np.frombuffer(bytes(content[part]), np.float32).copy()
    values[0] += 0.01
    content[part] = values.tobytes()
    path.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_copy_of_an_export_is_compared_with_the_run_that_is_named(run, tmp_path):
    copy = shutil.copytree(run / "export" / "unet1" / "onnx-fp32", tmp_path / "e")
    done = cli("verify", copy)
    assert done.exit_code == 2, done.output
    assert "lies in no run with a trained U-Net 1; name the run" in done.output
    assert cli("verify", copy, "--run", run).exit_code == 0
    with pytest.raises(UsageError, match="/e1: lies in no run"):  # right below the root
        _inference_file(Path("/e1"), None, read_manifest(copy))


def test_verify_rejects_a_tampered_weight_with_exit_code_3(run):
    folder = run / "export" / "unet1" / "onnx-fp32"
    change_a_weight(folder)
    done = cli("verify", folder)
    assert done.exit_code == 3
    assert "one evaluation differs by" in done.output
    assert "(limit 3e-05)" in done.output
    rejected = folder.with_name("onnx-fp32.rejected")
    assert f"Moved to {rejected}" in done.output
    assert not folder.exists()
    assert {path.name for path in rejected.iterdir()} >= {"denoiser.onnx", "manifest.rejected.json"}
    assert cli("inspect", rejected).exit_code == 1


def test_an_export_that_differs_is_kept_as_rejected(tmp_path, monkeypatch):
    """A limit of zero stands for a graph that computes something else."""
    from imagen_scale_export import verify

    strict = verify.LIMITS["fp32"]._replace(relative_error=0.0)
    monkeypatch.setitem(verify.LIMITS, "fp32", strict)
    write_stage(tmp_path, 1, overrides=SHALLOW)
    done = cli("--unet", 1, "--run", tmp_path)
    assert done.exit_code == 3
    parent = tmp_path / "export" / "unet1"
    assert sorted(path.name for path in parent.iterdir()) == [".lock", "onnx-fp32.rejected"]
    assert not list(parent.rglob("manifest.json"))


def test_a_killed_export_leaves_nothing_that_loads(run):
    """Killed while it works on a replacement: the old export goes on serving."""
    command = [
        sys.executable, "-c", "from imagen_scale.commands.main import main; main()", "export",
        "--unet", "1", "--run", str(run), "--force",
    ]  # fmt: skip
    parent = run / "export" / "unet1"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(parent.glob(".staging_*/denoiser.onnx")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (leftover,) = parent.glob(".staging_*")
    assert not (leftover / "manifest.json").exists()
    file = read_inference(inference_path(run, 1))
    open_exported("onnx", file, folder=None, device=CPU)
    with staged(parent / "onnx-bf16", force=False):
        assert not leftover.exists()


def test_weights_that_change_during_the_export_end_it(tmp_path):
    """Training writes the file again and again; the graph must be of the weights it names."""
    write_stage(tmp_path, 1, overrides=SHALLOW)
    file = read_inference(inference_path(tmp_path, 1))
    sentences = []

    def tell(sentence):
        sentences.append(sentence)
        write_stage(tmp_path, 1, seed=1, overrides=SHALLOW)

    with pytest.raises(ExportError, match="changed while it was exported"):
        export_unet(file, ExportOptions(check=False), tell)
    assert sentences == ["U-Net 1: tracing the fp32 graph"]
    assert not list(tmp_path.rglob("*.onnx"))


def test_an_interrupted_export_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "onnx-fp32", force=False) as folder:
        (folder / "denoiser.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_replacing_takes_force(tmp_path):
    final = tmp_path / "onnx-fp32"
    for content, force in ((b"1", False), (b"2", True)):
        with staged(final, force=force) as folder:
            (folder / "file").write_bytes(content)
    assert (final / "file").read_bytes() == b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "onnx-fp32"]
    with pytest.raises(UsageError, match="--force"), staged(final, force=False):
        pass


def test_room_is_checked_first(tmp_path):
    many = 2**60
    with pytest.raises(EnvironmentProblem, match=r"GiB of memory and .* GiB are free"):
        check_room(tmp_path, weights_bytes=many, graph_bytes=1, engine=False)
    with pytest.raises(EnvironmentProblem, match="GiB of disk space in"):
        check_room(tmp_path / "new", weights_bytes=1, graph_bytes=many, engine=False)
    check_room(tmp_path, weights_bytes=1, graph_bytes=1, engine=True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name the U-Net: 1, 2, ... or all"),
        (["--unet", "0"], 2, "--unet 0: name the U-Net"),
        (["--unet", "x"], 2, "--unet x: name the U-Net"),
        (["--unet", "9" * 5000], 2, f"--unet {'9' * 40}: name the U-Net"),
        (["--unet", "9"], 2, "--unet 9: this cascade has U-Nets 1 to 2"),
        (["--unet", "1", "--run", "nowhere"], 2, "nowhere: not a run folder"),
        (["--unet", "1", "--batch", "1:2:4"], 2, "--batch: is an engine's, and an ONNX file"),
        (["--unet", "1", "--target", "SM86"], 2, "--target: is an engine's, and an ONNX file"),
        (
            ["--unet", "1", "--format", "tensorrt", "--batch", "8"],
            2,
            "--batch 8: write MIN:OPT:MAX",
        ),
        (["--unet", "2"], 1, "U-Net 2 is not trained yet"),
        (["--unet", "all"], 1, "U-Net 2 is not trained yet"),
        (["--unet", "1", "--format", "tensorrt", "--target", "SM90"], 2, "--target SM90:"),
        (["--unet", "1", "inspect", "x"], 2, "--unet does not go with inspect"),
        (["--run", "x", "verify", "x"], 2, "--run does not go with verify, which takes a folder"),
        (["--allow-unfinished", "verify", "x"], 2, "--allow-unfinished does not go with verify"),
        (["inspect", "nowhere"], 1, "not a finished export"),
        (["verify", "nowhere"], 1, "not a finished export"),
    ],
)
def test_every_failure_is_one_sentence(tmp_path, arguments, code, message):
    write_stage(tmp_path, 1)
    is_export = not {"inspect", "verify", "--run"} & set(arguments)
    done = cli(*arguments, *(["--run", tmp_path] if is_export else []))
    assert done.exit_code == code, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.onnx"))


def test_half_trained_stages_are_exported_only_when_asked_for(tmp_path):
    write_stage(tmp_path, 1, step=3, overrides=SHALLOW)
    done = cli("--unet", 1, "--run", tmp_path)
    assert done.exit_code == 1
    assert "half-trained (3 of 6 steps)" in done.output
    done = cli("--unet", 1, "--run", tmp_path, "--allow-unfinished", "--no-verify")
    assert done.exit_code == 0, done.output
    assert "not compared with the torch network" in done.output


@pytest.mark.distributed
def test_train_export_sample_gives_the_same_pixels(tiny_config, tmp_path, launch):
    """The whole way: DeepSpeed trains, the EMA weights are exported, the pictures are equal."""
    from support.exports import SCALE, lowres, pictures, random_text, torch_denoiser

    from imagen_scale.diffusion.schedule import NoiseSchedule
    from imagen_scale.sampling.runtimes.torch_unet import load_unet

    run = tmp_path / "run"
    launch(tiny_config, run, *ALL_SHALLOW, "training.sample_every=null")
    done = cli("--unet", "all", "--run", run)
    assert done.exit_code == 0, done.output
    schedule, text = NoiseSchedule.linear(100), random_text(2)
    for number, size in ((1, 16), (2, 32)):
        file = read_inference(inference_path(run, number))
        assert export_folder(file, "onnx", "fp32").is_dir()
        runtime = open_exported("onnx", file, folder=None, device=CPU)
        low = lowres(number, 2, size)
        ours = pictures(runtime.bind(Conditioning(text, SCALE, **low)), schedule, 2, size)
        theirs = pictures(torch_denoiser(load_unet(file), schedule, text, **low), schedule, 2, size)
        assert (ours.round() - theirs.round()).abs().max() <= 1
    launch(tiny_config, run, *ALL_SHALLOW, "training.steps=8", "training.sample_every=null")
    done = cli("verify", run / "export" / "unet1" / "onnx-fp32")
    assert done.exit_code == 1
    assert "the weights changed since (step 6 then, 8 now)" in done.output


def test_a_stage_of_another_recipe_is_exported_and_sampled_alike(tmp_path):
    """x_0 on a cosine schedule that ends in noise alone; the check runs the whole loop."""
    schedule = '{"type":"cosine","shift_from":8,"zero_terminal_snr":true}'
    write_stage(
        tmp_path, 1,
        overrides=(*SHALLOW, "unets.0.pred_type=x0", f"unets.0.schedule={schedule}"),
    )  # fmt: skip
    file = read_inference(inference_path(tmp_path, 1))
    folder = export_unet(file, ExportOptions(), lambda sentence: None)
    sampler = json.loads((folder / "manifest.json").read_text())["sampler"]
    assert (sampler["pred_type"], sampler["schedule"]) == ("x0", json.loads(schedule))
    text = Text(torch.randn(2, 8, 384), torch.ones(2, 8, dtype=torch.bool))
    ours = Stage(file, CPU, RuntimeOptions(runtime="onnx")), Stage(file, CPU)
    settings = StageSettings(steps=5, cond_scale=3.0, spacing="logsnr")
    pictures = [stage.sample(Inputs(text, [0, 1]), settings) for stage in ours]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)
