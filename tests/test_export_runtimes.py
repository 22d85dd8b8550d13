"""Exported U-Nets in the sampling loop: the same pictures as torch, and what cannot be used."""

import math
import subprocess
import sys

import onnx
import pytest
import torch
from support.exports import SCALE, lowres, open_file, pictures, random_text, torch_denoiser
from support.noise import implied_noise

from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.errors import (
    CardProblem,
    EnvironmentProblem,
    ExportError,
    ShapeError,
    UsageError,
)
from imagen_scale.sampling.runtimes.contract import Conditioning
from imagen_scale.sampling.runtimes.executors import computing
from imagen_scale.sampling.runtimes.exported import (
    ExportedRuntime,
    export_folder,
    load_conditioner,
    open_exported,
)
from imagen_scale.sampling.runtimes.manifest import Profile
from imagen_scale.sampling.runtimes.onnx_runtime import cuda_options, is_outdated, onnx_session
from imagen_scale.sampling.runtimes.ports import graph_name
from imagen_scale.sampling.runtimes.torch_unet import load_unet

CPU = torch.device("cpu")


@pytest.mark.parametrize("cond_scale", [0.0, 1.0, 3])  # whole numbers count as well
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
@pytest.mark.parametrize("number", [1, 2])
def test_same_seed_same_pixels_as_torch(exported, number, kind, cond_scale):
    file, size, batch = open_file(exported, number), 16 * number, 3
    unet, schedule, text = load_unet(file), NoiseSchedule.linear(100), random_text(batch)
    low = lowres(number, batch, size)
    runtime = open_exported(kind, file, folder=None, device=CPU, precision="fp32")
    bound = runtime.bind(Conditioning(text, cond_scale, **low))
    reference = torch_denoiser(unet, schedule, text, cond_scale=cond_scale, **low)
    ours, theirs = (pictures(fn, schedule, batch, size) for fn in (bound, reference))
    needed = graph_name(cond_scale == 3)
    assert list(runtime._executors) == [needed]
    runtime.close()
    assert theirs.std() > 10
    assert (ours - theirs).abs().max() <= 0.5  # half a level before rounding: one at most after


def test_fp16_pictures_are_close(exported):
    file = open_file(exported, 1)
    schedule, text = NoiseSchedule.linear(100), random_text(2)
    runtime = open_exported("onnx", file, folder=None, device=CPU, precision="fp16")
    bound = runtime.bind(Conditioning(text, SCALE))
    ours = pictures(bound, schedule, 2, 16)
    reference = torch_denoiser(load_unet(file), schedule, text, **lowres(1, 2, 16))
    error = (ours - pictures(reference, schedule, 2, 16)).square().mean().item()
    assert error > 0
    assert 20 * math.log10(255) - 10 * math.log10(error) > 40


def test_openvino_computes_bf16_unless_told_otherwise(exported):
    """Its error is stated in docs/export.md: some percent of the largest value."""
    file, schedule = open_file(exported, 1), NoiseSchedule.linear(100)
    runtime = open_exported("openvino", file, folder=None, device=CPU)
    if "fp32" in runtime.name:
        pytest.skip("this processor does not compute in bf16")
    x_t, t, text = torch.randn(2, 3, 16, 16), torch.tensor([10, 90]), random_text(2)
    found = runtime.bind(Conditioning(text, SCALE))(x_t, t)
    expected = torch_denoiser(load_unet(file), schedule, text)(x_t, t)
    found, expected = (implied_noise(schedule, x_t, t, x_0) for x_0 in (found, expected))
    assert 1e-4 < (found - expected).abs().max() / expected.abs().max() < 0.08


def test_the_conditioner_needs_only_the_text_weights(exported):
    file, text = open_file(exported, 2), random_text(3)
    part = load_conditioner(file)
    assert part.final_conv.weight.is_meta
    for ours, theirs in zip(
        part.condition_text(*text), load_unet(file).condition_text(*text), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_images_that_the_export_does_not_take(exported):
    file = open_file(exported, 1)
    runtime = open_exported("onnx", file, folder=None, device=CPU)
    with pytest.raises(ExportError, match=r"takes images of 16 px, not 8 x 16.*--dynamic-size"):
        runtime.check_shape(torch.Size((1, 3, 16, 8)))
    dynamic = open_exported("onnx", open_file(exported, 2), folder=None, device=CPU)
    dynamic.check_shape(torch.Size((5, 3, 16, 64)))
    with pytest.raises(ExportError, match="in multiples of 2 px, not 33 x 32"):
        dynamic.check_shape(torch.Size((1, 3, 32, 33)))
    profile = Profile(batch=(1, 2, 8), side=(16, 16, 32))
    engine = ExportedRuntime(
        file, runtime._backend, load_unet(file), profile=profile, dynamic_size=True
    )
    assert (engine.max_batch, dynamic.max_batch) == (8, None)
    engine.check_shape(torch.Size((8, 3, 32, 32)))
    with pytest.raises(ExportError, match=r"at most 8 images at once, not 9.*--batch MIN:OPT:MAX"):
        engine.check_shape(torch.Size((9, 3, 16, 16)))
    with pytest.raises(ExportError, match="sides of 16 to 32 px, not 34 x 32"):
        engine.check_shape(torch.Size((8, 3, 32, 34)))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_engine_for_several_images_takes_fewer(exported, batch):
    """It is given some of them twice, and the surplus is dropped."""
    file, schedule, text = open_file(exported, 1), NoiseSchedule.linear(100), random_text(batch)
    runtime = open_exported("onnx", file, folder=None, device=CPU)
    engine = ExportedRuntime(
        file, runtime._backend, load_unet(file),
        profile=Profile(batch=(2, 2, 4), side=(16, 16, 16)), dynamic_size=False,
    )  # fmt: skip
    asked, compute = [], engine.executor(guided=True)

    def spy(inputs):
        asked.append({len(value) for value in inputs.values()})
        return compute(inputs)

    engine._executors[graph_name(True)] = spy
    ours, theirs = (
        pictures(one.bind(Conditioning(text, SCALE)), schedule, batch, 16)
        for one in (engine, runtime)
    )
    assert asked == [{max(2, batch)}] * 20  # every input alike
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 0.5


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_library_that_fails_while_it_computes_says_so(exported, kind, monkeypatch):
    runtime = open_exported(kind, open_file(exported, 2), folder=None, device=CPU)
    # The manifest may claim what the graph does not take.
    broken = {"x_t": torch.randn(1, 5, 32, 32), "t": torch.ones(1)}
    with pytest.raises(ExportError, match=r"(ONNX Runtime|OpenVINO), .*denoiser.* failed: "):
        runtime.executor(guided=False)(broken)
    with (
        pytest.raises(torch.OutOfMemoryError, match="Failed to allocate memory"),
        computing("ONNX Runtime, denoiser.onnx"),
    ):
        raise RuntimeError("bfc_arena.cc:359 Failed to allocate memory for requested buffer")


@pytest.mark.parametrize(
    ("reason", "known"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=", CardProblem),
        ("CUDA failure 719: unspecified launch failure ; GPU=0", CardProblem),
        ("CUDA failure 2: out of memory ; GPU=0", torch.OutOfMemoryError),
        ("CUDA failure 801: operation not supported ; GPU=0", ExportError),
    ],
)
def test_what_a_card_does_not_recover_from_is_told_apart(reason, known):
    with pytest.raises(known), computing("ONNX Runtime, denoiser.onnx"):
        raise RuntimeError(reason)


def test_torchs_own_word_of_a_lost_card_is_kept():
    with (
        pytest.raises(CardProblem, match="ONNX Runtime, a: the card failed"),
        computing("ONNX Runtime, a"),
    ):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


HEARS = """
import faulthandler, gc, os, signal, sys
from pathlib import Path
from {module} import {opener}

heard = []
signal.signal(signal.SIGUSR1, lambda *signal: heard.append(signal))
faulthandler.enable()  # gives signals a stack of their own
path = Path(sys.argv[1])
first, second = {opened}, {opened}
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
assert heard
"""


@pytest.mark.parametrize(
    ("module", "opener", "opened"),
    [
        ("imagen_scale.sampling.runtimes.openvino_cpu", "OpenVino", "OpenVino(path, bf16=False)"),
        ("imagen_scale_runtime.graphs", "Engine", 'Engine("openvino").open(path)'),
    ],
)
def test_signals_are_heard_once_graphs_of_openvino_have_gone(exported, module, opener, opened):
    graph = export_folder(open_file(exported, 1), "onnx", "fp32") / graph_name(guided=False)
    program = HEARS.format(module=module, opener=opener, opened=opened)
    subprocess.run([sys.executable, "-c", program, str(graph)], check=True)


def test_inputs_that_do_not_belong_together(exported):
    base, large = (
        open_exported("onnx", open_file(exported, number), folder=None, device=CPU)
        for number in (1, 2)
    )
    with pytest.raises(ShapeError, match="go with super-resolution"):
        base.bind(Conditioning(random_text(1), 1.0, **lowres(2, 1, 16)))
    with pytest.raises(ShapeError, match="go with super-resolution"):
        large.bind(Conditioning(random_text(1), 1.0))
    bound = base.bind(Conditioning(random_text(2), 1.0))
    with pytest.raises(ShapeError, match="3 images, but text of 2 is bound"):
        bound(torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3]))


def test_a_card_computes_float32_in_float32():
    """The provider's default is TF32."""
    assert cuda_options(torch.device("cuda", 2), 5) == {
        "device_id": "2", "user_compute_stream": "5", "use_tf32": "0",
    }  # fmt: skip


def test_a_gpu_that_is_not_there_is_an_error_not_the_cpu(exported):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EnvironmentProblem, match="needs an NVIDIA card"):
        open_exported("onnx", open_file(exported, 1), folder=None, device=torch.device("cuda"))


def test_onnx_runtime_may_not_fall_back_silently(exported):
    """It goes on with the CPU when a provider cannot be used; here none but the CPU can."""
    import onnxruntime

    path = exported / "export" / "unet1" / "onnx-fp32" / "denoiser.onnx"
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is onnxruntime-gpu")
    with pytest.raises(EnvironmentProblem, match=r"with CPUExecutionProvider instead of CUDA"):
        onnx_session(path, "CUDAExecutionProvider")


def test_wrong_use(exported):
    file = open_file(exported, 1)
    folder = exported / "export" / "unet1" / "onnx-fp32"
    with pytest.raises(UsageError, match=r"'torch'.*onnx, tensorrt, openvino"):
        open_exported("torch", file, folder=None, device=CPU)
    with pytest.raises(UsageError, match="openvino computes on the CPU"):
        open_exported("openvino", file, folder=None, device=torch.device("cuda"))
    with pytest.raises(UsageError, match="no tensorrt export"):
        open_exported("tensorrt", file, folder=None, device=CPU)
    with pytest.raises(UsageError, match="an export for onnx; runtime tensorrt needs"):
        open_exported("tensorrt", file, folder=folder, device=CPU)


@pytest.mark.parametrize(
    ("package", "call", "advice"),
    [
        ("onnxruntime", "onnx_session(Path('x'), 'CPUExecutionProvider')", "imagen-scale[export]"),
        ("openvino", "import_openvino()", "imagen-scale[openvino]"),
        ("tensorrt_rtx", "find_library()", "imagen-scale[tensorrt]"),
        ("onnxscript", "require_exporter()", "imagen-scale[export]"),
    ],
)
def test_a_missing_extra_is_named(package, call, advice):
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.modules['tensorrt'] = None\n"
        "from pathlib import Path\n"
        "from imagen_scale.errors import MissingExtraError\n"
        "from imagen_scale.sampling.runtimes.onnx_runtime import onnx_session\n"
        "from imagen_scale.sampling.runtimes.openvino_cpu import import_openvino\n"
        "from imagen_scale.sampling.runtimes.tensorrt_library import find_library\n"
        "from imagen_scale_export.to_onnx import require_exporter\n"
        f"try: {call}\nexcept MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert advice in done.stdout, done.stderr


@pytest.mark.parametrize(("ir_version", "opset"), [(99, 21), (10, 99)])
def test_a_file_that_is_too_new_says_what_to_update(tmp_path, ir_version, opset):
    value = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", value, out),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    model.ir_version = ir_version
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ExportError, match=r"newer packages\. Update ONNX Runtime \(pip") as caught:
        onnx_session(tmp_path / "new.onnx", "CPUExecutionProvider")
    assert "/onnxruntime_src/" not in str(caught.value)


def test_a_runtime_that_is_too_old_says_which_is_needed(exported, monkeypatch):
    """Before it looks at a file: what it would say of one is a riddle."""
    monkeypatch.setattr("onnxruntime.__version__", "1.17.3")
    file = open_file(exported, 1)
    with pytest.raises(ExportError, match=r"1\.17\.3 .* need 1\.23 or later\. Update it: pip inst"):
        open_exported("onnx", file, folder=None, device=CPU)


@pytest.mark.parametrize(
    ("version", "old"),
    [("1.9.0", True), ("1.22.1", True), ("1.23.0", False), ("1.23.0rc1", False), ("2.0", False)],
)
def test_which_runtimes_are_too_old(version, old):
    assert is_outdated(version) == old
