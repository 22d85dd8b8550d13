"""What computes a U-Net: equal results by every way, and plain words where there is none."""

import pytest
import torch
from support.noise import implied_noise

from imagen_scale.diffusion.guidance import guide
from imagen_scale.errors import ImagenScaleError, UsageError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.opening import open_runtime
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.runtimes.torch_unet import TorchRuntime
from imagen_scale.sampling.stage import Stage
from imagen_scale.sampling.stages import TrainedStages

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[1, 2], ids=["base", "super-resolution"])
def file(run, request):
    return read_inference(inference_path(run, request.param))


def inputs(file, batch=2):
    generator = torch.Generator().manual_seed(0)
    size = file.config.imagen.image_sizes[file.unet_number - 1]
    x_t, lowres = torch.randn(2, batch, 3, size, size, generator=generator).unbind()
    text = Text(
        torch.randn(batch, 5, 384, generator=generator), torch.ones(batch, 5, dtype=torch.bool)
    )
    if file.unet_number == 1:
        return text, x_t, {}
    return text, x_t, {"lowres_img": lowres, "lowres_t": torch.full((batch,), 3)}


T = torch.tensor([10, 90])


def predict(runtime, file, cond_scale=3.0):
    text, x_t, lowres = inputs(file)
    x_0 = runtime.bind(Conditioning(text, cond_scale, **lowres))(x_t, T)
    return implied_noise(runtime.schedule, x_t, T, x_0)


@torch.no_grad()
def by_hand(runtime, file, cond_scale=3.0):
    """Two passes and guidance, written out."""
    text, x_t, lowres = inputs(file)
    unet = runtime.unet
    cond = unet(x_t, T, *text, **lowres)
    null = unet(x_t, T, *text, keep_mask=torch.zeros(2, dtype=torch.bool), **lowres)
    prediction = guide(cond, null, cond_scale)
    x_0 = runtime.schedule.predicted_x_0(unet.config.pred_type, x_t, T, prediction)
    return implied_noise(runtime.schedule, x_t, T, x_0)


@pytest.mark.parametrize("cond_scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    "options",
    [RuntimeOptions(), RuntimeOptions(sequential=True), RuntimeOptions(channels_last=True)],
    ids=["eager", "sequential", "channels_last"],
)
def test_guidance_is_two_passes_by_hand(file, options, cond_scale):
    runtime = TorchRuntime(file, CPU, options)
    expected = by_hand(TorchRuntime(file, CPU), file, cond_scale)
    torch.testing.assert_close(predict(runtime, file, cond_scale), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.06), ("fp16", 0.01)])
def test_half_precision_is_close_and_gives_float32(file, precision, limit):
    expected = predict(TorchRuntime(file, CPU), file)
    runtime = TorchRuntime(file, CPU, RuntimeOptions(precision=precision))
    found = predict(runtime, file)
    assert next(runtime.unet.parameters()).dtype.itemsize == 2
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < limit * expected.abs().max()


@pytest.mark.parametrize(("precision", "is_rounded"), [("fp32", False), ("bf16", True)])
def test_float32_is_float32_on_cards_too(file, precision, is_rounded, monkeypatch):
    """torch's own default rounds the inputs of convolutions there."""
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    runtime = TorchRuntime(file, CPU, RuntimeOptions(precision=precision))
    runtime.unet.final_conv.register_forward_hook(
        lambda *ignored: seen.append(torch.backends.cudnn.allow_tf32)
    )
    predict(runtime, file)
    assert seen and set(seen) == {is_rounded}
    assert torch.backends.cudnn.allow_tf32  # as it was


def test_compiled_is_eager(run):
    file = read_inference(inference_path(run, 1))
    compiled = open_runtime(file, CPU, RuntimeOptions(runtime="compile"))
    expected = predict(TorchRuntime(file, CPU), file)
    torch.testing.assert_close(predict(compiled, file), expected, atol=2e-5, rtol=0)
    compiled.close()


def test_short_memory_makes_two_passes_of_one_and_says_so(file):
    """The network refuses more images at once than fit, as a full card does."""
    said = []
    runtime = TorchRuntime(file, CPU, say=said.append)
    whole = runtime.denoise

    def small(x_t, *rest):
        if len(x_t) > 2:
            raise torch.OutOfMemoryError
        return whole(x_t, *rest)

    runtime.denoise = small
    torch.testing.assert_close(
        predict(runtime, file), by_hand(TorchRuntime(file, CPU), file), atol=2e-5, rtol=0
    )
    assert runtime.sequential
    (sentence,) = said
    assert "memory is short" in sentence


def test_auto_says_what_it_took_and_why_not_the_other(run):
    said = []
    cascade = TrainedStages.load(run, runtime=RuntimeOptions(runtime="auto"), say=said.append)
    auto = cascade.sample(["sun"], SamplingOptions(steps=2))
    assert [line.startswith(f"U-Net {n}: runtime torch fp32 on cpu; not onnx:")
            for n, line in enumerate(said, start=1)] == [True, True], said  # fmt: skip
    torch.testing.assert_close(
        auto[1], TrainedStages.load(run).sample(["sun"], SamplingOptions(steps=2))[1]
    )


@pytest.mark.parametrize("name", ["onnx", "openvino", "tensorrt"])
def test_an_export_that_is_asked_for_and_missing_is_an_error(run, name):
    with pytest.raises(ImagenScaleError, match=r"export"):
        open_runtime(read_inference(inference_path(run, 1)), CPU, RuntimeOptions(runtime=name))


def test_exports_take_no_options_of_torch(run):
    file = read_inference(inference_path(run, 1))
    with pytest.raises(UsageError, match="neither channels_last nor sequential"):
        open_runtime(file, CPU, RuntimeOptions(runtime="onnx", channels_last=True))


def test_closing_frees_the_network(run):
    stage = Stage(read_inference(inference_path(run, 1)), CPU)
    stage.close()
    assert not hasattr(stage.runtime, "unet")
    stage.close()  # again, nothing
