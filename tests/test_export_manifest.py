"""What is refused at load: whatever changed, moved, belongs elsewhere or leads outside."""

import hashlib
import json
import os
import shutil

import onnx
import pytest
import torch
from support.tiny import write_stage

from imagen_scale.errors import ExportError, ImagenScaleError, UsageError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.exported import open_exported
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Listener
from imagen_scale.sampling.stages import TrainedStages

CPU = torch.device("cpu")


@pytest.fixture
def run(exported, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(exported, tmp_path / "tiny")


def open_onnx(run, number=1):
    file = read_inference(inference_path(run, number))
    return open_exported("onnx", file, folder=None, device=CPU)


def folder(run):
    return run / "export" / "unet1" / "onnx-fp32"


def edit_manifest(run, change):
    path = folder(run) / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rehash(run, name):
    """What an attacker would do after changing a file."""
    path = folder(run) / name
    facts = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    edit_manifest(run, lambda data: data["files"].update({name: facts}))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_untouched_copy_opens(run):
    runtime = open_onnx(run)
    assert runtime.name.startswith("onnxruntime ")
    assert runtime.device == CPU


FILES = [
    "denoiser.onnx", "denoiser.onnx.data", "denoiser_unguided.onnx", "conditioner.onnx",
    "conditioner.onnx.data",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_tampered_files(run, name):
    flip_a_bit(folder(run) / name)
    with pytest.raises(ExportError, match=f"{name}: its content changed since it was exported"):
        open_onnx(run)


@pytest.mark.parametrize("name", FILES)
def test_cut_and_moved_files(run, name):
    path = folder(run) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match=f"{name}: its content changed"):
        open_onnx(run)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(ExportError, match=f"{name}: missing"):
        open_onnx(run)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data["denoiser"]["inputs"][0].update(dims=["batch", 3, "height", "width"]),
         "the inputs of denoiser.onnx are not those that it lists"),
        (lambda data: data["denoiser"]["outputs"][0].update(name="noise"),
         "the outputs of denoiser.onnx are not"),
        (lambda data: data["conditioner"]["inputs"][1].update(dtype="float32"),
         "the inputs of conditioner.onnx are not"),
        (lambda data: data.update(precision="fp16"),
         "it says fp16 of denoiser.onnx, which is fp32"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_what_the_graphs_are_not(run, change, complaint):
    edit_manifest(run, change)
    with pytest.raises(ExportError, match=f"damaged: {complaint}"):
        open_onnx(run)


def test_links_count_by_what_they_lead_to(run):
    """A backup of hard links, and the cache of the Hugging Face hub."""
    path = folder(run) / "denoiser.onnx.data"
    os.link(path, run / "backup")
    open_onnx(run)
    blobs = run / "blobs"
    blobs.mkdir()
    for file in list(folder(run).iterdir()):
        (folder(run) / file.name).symlink_to(file.rename(blobs / file.name))
    open_onnx(run).executor(guided=True)
    with pytest.raises(ExportError, match=r"is a link, and OpenVINO.*`cp -rL`.*runtime onnx"):
        open_exported("openvino", read_inference(inference_path(run, 1)), folder=None, device=CPU)
    target = blobs / path.name
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    with pytest.raises(ExportError, match="content changed"):
        open_onnx(run)
    target.unlink()
    with pytest.raises(ExportError, match="missing"):
        open_onnx(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ExportError, match="no regular file"):
        open_onnx(run)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\\b"])
def test_file_names_that_lead_out_of_the_folder(run, name):
    facts = {"bytes": 1, "sha256": "0"}
    edit_manifest(run, lambda data: data["files"].update({name: facts}))
    with pytest.raises(ExportError, match="leads out of the folder"):
        open_onnx(run)


def test_weights_hidden_in_a_node(run):
    path = folder(run) / "denoiser_unguided.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = onnx.TensorProto(
        name="x",
        data_type=onnx.TensorProto.FLOAT,
        dims=[1],
        data_location=onnx.TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value="/etc/hostname")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))
    onnx.save(model, path)
    rehash(run, path.name)
    with pytest.raises(ExportError, match="takes weights from '/etc/hostname'"):
        open_onnx(run)


@pytest.mark.parametrize("location", ["../unet2.data", "/etc/hostname", "unlisted"])
def test_weights_taken_from_elsewhere(run, location):
    """Even when the manifest was rewritten to fit."""
    path = folder(run) / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, path)
    rehash(run, "denoiser.onnx")
    with pytest.raises(ExportError, match=f"takes weights from {location!r}"):
        open_onnx(run)


MISMATCHES = {
    "another schedule": (
        lambda data: data["sampler"].update(betas_sha256="0"), "sampler: betas_sha256 is '0'"
    ),
    "other timesteps": (
        lambda data: data["sampler"].update(timesteps=1000), "timesteps is 1000 there and 100 here"
    ),
    "another parametrisation": (
        lambda data: data["sampler"].update(pred_type="v"), "pred_type is 'v' there"
    ),
    "another text encoder": (
        lambda data: data["text"].update(encoder="t5_small"), "text encoder: encoder is 't5_small'"
    ),
    "another version of the encoder": (
        lambda data: data["text"].update(fingerprint="0"), "text encoder: fingerprint is '0'"
    ),
    "another network": (
        lambda data: data["unet"].update(dim=16), "the U-Net's configuration differs"
    ),
    "another U-Net": (lambda data: data.update(unet_number=2), "holds U-Net 2, not U-Net 1"),
    "a newer schema": (
        lambda data: data.update(schema_version=3), "schema version 3; this program reads 2"
    ),
    "an older schema": (
        lambda data: data.update(schema_version=1), "program reads 2. Export again with --force"
    ),
    "no schema": (lambda data: data.pop("schema_version"), "not JSON with a schema_version"),
    "an unknown key": (lambda data: data.update(extra=1), "damaged: extra"),
    "no weights listed": (
        lambda data: data["files"].pop("denoiser.onnx.data"), "takes weights from"
    ),
    "no graph listed": (lambda data: data["files"].pop("denoiser.onnx"), "does not list denoiser"),
    "another version of the runtime": (
        lambda data: data["needs"].update(onnxruntime=">=99"), "needs onnxruntime >=99 and 1"
    ),
    "an engine without a profile": (
        lambda data: data.update(format="tensorrt"), "engine and profile belong"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatches_are_named(run, case):
    change, message = MISMATCHES[case]
    edit_manifest(run, change)
    with pytest.raises(ExportError, match=message):
        open_onnx(run)


def test_an_export_is_stale_once_the_weights_change(run):
    write_stage(run, 1, seed=1, step=5)
    with pytest.raises(
        ExportError, match=r"weights changed since \(step 6 then, 5 now\).*--unet 1 --force"
    ):
        open_onnx(run)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"\xff", b'{"schema_version": 2}'])
def test_damaged_manifests(run, content):
    (folder(run) / "manifest.json").write_bytes(content)
    with pytest.raises(ExportError, match=r"manifest\.json: damaged"):
        open_onnx(run)


def test_without_a_manifest_there_is_no_export(run):
    file = read_inference(inference_path(run, 1))
    (folder(run) / "manifest.json").unlink()
    with pytest.raises(ExportError, match="not a finished export"):
        open_exported("onnx", file, folder=folder(run), device=CPU)
    open_onnx(run)  # the fp16 export is taken
    shutil.rmtree(run / "export" / "unet1" / "onnx-fp16")
    with pytest.raises(UsageError, match=r"U-Net 1 has no onnx export.*--unet 1 --format onnx"):
        open_onnx(run)


def test_exports_made_before_there_were_schedules_open(run):
    edit_manifest(run, lambda data: data["sampler"].pop("schedule"))
    open_onnx(run)


def test_an_export_of_another_schedule_is_refused(run):
    edit_manifest(run, lambda data: data["sampler"].update(schedule={"type": "cosine"}))
    with pytest.raises(ExportError, match="sampler: schedule is .*cosine.* there and None here"):
        open_onnx(run)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "U-Net 2 has no onnx fp16 export"),
        ({"tile": 16}, "export of U-Net 2 takes images of 32 px, not 16 x 16"),
        ({"cache_interval": [1, 2]}, "this export of U-Net 2 computes every evaluation whole"),
    ],
)
def test_what_a_later_stages_export_cannot_do_is_told_before_any_work(run, asked, told):
    if not asked:
        shutil.rmtree(run / "export" / "unet2" / "onnx-fp16")
    runtime = RuntimeOptions(runtime="onnx", precision="fp16")
    stages, steps = TrainedStages.load(run, runtime=runtime), []
    listener = Listener(on_step=lambda *numbers: steps.append(numbers))
    with pytest.raises(ImagenScaleError, match=told):
        stages.sample(["sun"], SamplingOptions(steps=2, **asked), listener)
    assert not steps
