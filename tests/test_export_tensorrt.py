"""Engines built by TensorRT-RTX without a GPU, and which engines may be loaded."""

import json
import shutil

import pytest
import torch
from imagen_scale_export.to_onnx import op_census
from imagen_scale_export.to_tensorrt import TensorRTNetwork, parse_range, parse_targets
from support.exported import engines_run
from support.kept import OTHER_JSON

from imagen_scale.errors import EnvironmentProblem, ExportError, UsageError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.runtimes.executors import require_driver
from imagen_scale.sampling.runtimes.exported import open_export, open_exported
from imagen_scale.sampling.runtimes.manifest import Profile, read_manifest
from imagen_scale.sampling.runtimes.ports import denoiser_inputs
from imagen_scale.sampling.runtimes.tensorrt_library import find_library
from imagen_scale.sampling.runtimes.tensorrt_rtx import check_engine


@pytest.fixture(scope="module")
def run(private_folders, tmp_path_factory):
    """A run with engines; it may be changed."""
    run = tmp_path_factory.mktemp("engines") / "tiny"
    return shutil.copytree(engines_run(private_folders), run)


def open_file(run, number):
    return read_inference(inference_path(run, number))


def folder_of(run, number):
    return run / "export" / f"unet{number}" / "tensorrt-fp16"


@pytest.mark.parametrize(
    ("number", "targets", "batch", "side"),
    [(1, ("portable",), (1, 2, 4), (16,) * 3), (2, ("SM86", "SM120"), (1, 2, 8), (16, 32, 64))],
)
def test_an_engine_is_built_without_a_gpu(run, number, targets, batch, side):
    folder = folder_of(run, number)
    manifest = open_export(folder, open_file(run, number))
    library = find_library("tensorrt_rtx")
    assert manifest.engine.library == "tensorrt_rtx"
    assert manifest.engine.version == library.version
    assert manifest.engine.targets == targets
    assert manifest.profile == Profile(batch=batch, side=side)
    # Weights are inside.
    weights = (folder / "denoiser.onnx.data").stat().st_size
    for name in ("denoiser.engine", "denoiser_unguided.engine"):
        assert (folder / name).stat().st_size > weights
    assert manifest.verification.passed
    if not torch.cuda.is_available():
        assert "the engine itself was not run" in manifest.verification.note


@pytest.mark.parametrize("name", ["denoiser.onnx", "denoiser_unguided.onnx"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_parsed_network_has_every_group_norm_with_eight_groups(run, number, name):
    path = folder_of(run, number) / name
    groups = TensorRTNetwork(find_library("tensorrt_rtx"), path).norm_groups()
    assert groups == [8] * op_census(path)["GroupNormalization"]
    assert len(groups) > 10  # they are whole here


def test_fp32_builds_because_its_attention_is_in_parts(exported):
    library = find_library("tensorrt_rtx")
    path = exported / "export" / "unet1" / "onnx-fp32" / "denoiser.onnx"
    file = open_file(exported, 1)
    ports = denoiser_inputs(file.config.stage(1, 384).network, 16, dynamic_size=False)
    profile = Profile(batch=(1, 1, 1), side=(16, 16, 16))
    assert (
        len(TensorRTNetwork(library, path).build(ports, profile, ("portable",)))
        > path.stat().st_size
    )


def test_float32_is_not_rounded_to_tf32(exported):
    """The library's own default is to do so on every card since Ampere."""
    library = find_library("tensorrt_rtx")
    network = TensorRTNetwork(
        library, exported / "export" / "unet1" / "onnx-fp32" / "denoiser.onnx"
    )
    tf32 = library.module.BuilderFlag.TF32
    assert network.builder.create_builder_config().get_flag(tf32)
    assert not network.config().get_flag(tf32)


def test_a_profile_that_the_library_refuses_is_its_own_sentence(exported):
    path = exported / "export" / "unet1" / "onnx-fp32" / "denoiser.onnx"
    ports = denoiser_inputs(
        open_file(exported, 1).config.stage(1, 384).network, 16, dynamic_size=False
    )
    with pytest.raises(ExportError, match="built no engine: "):
        TensorRTNetwork(find_library("tensorrt_rtx"), path).build(
            ports, Profile(batch=(3, 2, 1), side=(16, 16, 16)), ("portable",)
        )


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "denoiser.onnx").write_bytes(b"\x08")
    with pytest.raises(ExportError, match="cannot read it"):
        TensorRTNetwork(find_library("tensorrt_rtx"), tmp_path / "denoiser.onnx")


def test_an_engine_built_here_may_be_loaded_and_no_other(run, tmp_path, monkeypatch):
    copy = shutil.copytree(folder_of(run, 1), tmp_path / "copy")
    facts = read_manifest(copy).engine
    check_engine(copy, facts)
    with pytest.raises(ExportError, match=r"was built by tensorrt_rtx 1\.0 and .* is installed"):
        check_engine(copy, facts.model_copy(update={"version": "1.0"}))
    with pytest.raises(ExportError, match="not built on this machine by this user"):
        check_engine(copy, facts.model_copy(update={"targets": ("SM86",)}))
    with pytest.raises(ExportError, match=r"was built from another denoiser\.onnx"):
        check_engine(copy, facts.model_copy(update={"onnx_sha256": "0"}))
    engine = copy / "denoiser.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ExportError, match="not built on this machine by this user"):
        check_engine(copy, facts)
    engine.write_bytes(content)
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path / "another user's"))
    with pytest.raises(ExportError, match="not built on this machine by this user"):
        check_engine(copy, facts)


def test_without_a_driver_the_engine_is_refused_in_one_sentence(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for device in ("cpu", "cuda"):
        with pytest.raises(EnvironmentProblem, match="needs an NVIDIA card, its driver"):
            open_exported("tensorrt", open_file(run, 1), folder=None, device=torch.device(device))
        with pytest.raises(EnvironmentProblem, match=f"runtime onnx on {device}"):
            require_driver(torch.device(device), "onnx")


def test_a_damaged_record_of_builds_means_building_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    from imagen_scale.sampling.runtimes import built_here

    facts = read_manifest(folder_of(run, 1)).engine
    built_here.remember(facts, "a", "1")
    built_here.remember(facts, "a", "2")
    assert built_here.is_built_here(facts, "a", "1")
    assert not built_here.is_built_here(facts, "b", "1")
    (record,) = (tmp_path / "engines").glob("*.json")
    assert json.loads(record.read_text()) == {"a": ["1", "2"]}
    for text in OTHER_JSON:
        record.write_text(text)
        assert not built_here.is_built_here(facts, "a", "1")
        built_here.remember(facts, "a", "3")
        assert json.loads(record.read_text()) == {"a": ["3"]}


@pytest.mark.parametrize("text", ["1", "1:2", "2:1:3", "0:1:2", "1:2:x", "1:2:3:4", "-1:2:3"])
def test_batch_ranges_that_make_no_sense(text):
    with pytest.raises(UsageError, match="write MIN:OPT:MAX"):
        parse_range(text)


def test_targets():
    library = find_library("tensorrt_rtx")
    assert parse_range("1:2:8") == (1, 2, 8)
    assert parse_targets("portable", library) == ("portable",)
    assert parse_targets("sm86, SM120,SM86", library) == ("SM86", "SM120")
    with pytest.raises(UsageError, match=r"--target SM90: tensorrt_rtx .* portable, .*SM86"):
        parse_targets("SM90", library)
