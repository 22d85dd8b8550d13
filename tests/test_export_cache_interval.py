"""Evaluations that take the deeper levels' features from the last whole one."""

import json
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from imagen_scale_export.denoisers import export_denoisers
from imagen_scale_export.exporter import ExportOptions, export_unet
from imagen_scale_export.to_onnx import example_inputs, op_census
from support.networks import make_inputs, make_unet
from support.tiny import TINY
from torch import nn

from imagen_scale.config import parse_config
from imagen_scale.diffusion.guidance import guide
from imagen_scale.errors import ExportError, UsageError
from imagen_scale.files.pictures import to_uint8
from imagen_scale.models.unet import UNet
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.runtimes.exported import export_folder, open_export
from imagen_scale.sampling.runtimes.onnx_runtime import OnnxCpu
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.runtimes.ports import denoiser_inputs, graph_name
from imagen_scale.sampling.runtimes.torch_unet import load_unet
from imagen_scale.sampling.stage import Inputs, Stage
from imagen_scale.sampling.stages import TrainedStages

CPU = torch.device("cpu")
make = SamplingOptions.make


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_a_shallow_evaluation_is_a_whole_one_with_older_deep_features(index, memory_efficient):
    unet = make_unet(index, dim_mults=[1, 2, 4], memory_efficient=memory_efficient).eval()
    inputs = make_inputs(index, size=16)
    text = unet.condition_text(inputs.pop("text_embeds"), inputs.pop("text_mask"))
    made, deep = unet.denoise_cached(text=text, **inputs)
    assert torch.equal(made, unet.denoise(text=text, **inputs))
    side = 8 if memory_efficient else 16
    assert deep.shape[2:] == (side, side)

    inputs |= {"x_t": inputs["x_t"] + 1, "t": inputs["t"].flip(0)}
    whole = unet.denoise(text=text, **inputs)
    ran = []
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda *ignored, name=name: ran.append(name))
    found, kept = unet.denoise_cached(text=text, **inputs, deep=deep)
    below = ("downs.0.4", "downs.1", "downs.2", "mid", "ups.0", "ups.1")
    assert {"init_conv", "downs.0.1", "ups.2.0", "final_conv"} <= set(ran)
    assert not [name for name in ran if name.startswith(below)]
    assert torch.equal(kept, deep)

    unet.ups[-1][0].register_forward_pre_hook(lambda module, given: (deep, *given[1:]))
    assert torch.equal(found, unet.denoise(text=text, **inputs))
    assert not torch.equal(found, whole)


def written_out(runtime, interval):
    """A runtime of the loop in plain words: every so many evaluations whole, in two passes."""
    unet, done, kept = runtime.unet, Counter(), {}

    def bind(cond, cache):
        assert cache is None
        tile = 0.0 if cond.lowres_img is None else cond.lowres_img.double().sum().item()
        branches = unet.condition_text(*cond.text), unet.null_text(len(cond.text.embeds))

        @torch.no_grad()
        def denoise(x_t, t):
            is_whole = done[tile] % interval == 0
            done[tile] += 1
            made = []
            for name, branch in enumerate(branches):
                deep = None if is_whole else kept[tile, name]
                prediction, kept[tile, name] = unet.denoise_cached(
                    x_t, t, branch, cond.lowres_img, cond.lowres_t, deep
                )
                made.append(prediction)
            prediction = guide(*made, cond.cond_scale)
            return runtime.schedule.predicted_x_0(unet.config.pred_type, x_t, t, prediction)

        return denoise

    return SimpleNamespace(bind=bind, max_batch=None, name="written out")


def stage_of(run, number, *, tile=None, **options):
    file = read_inference(inference_path(run, number))
    return Stage(file, CPU, RuntimeOptions(**{"runtime": "torch"} | options), tile=tile)


def inputs_of(number):
    generator = torch.Generator().manual_seed(2)
    text = Text(torch.randn(2, 5, 384, generator=generator), torch.ones(2, 5).bool())
    lowres = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    return Inputs(text, [3, 4], lowres if number == 2 else None)


@pytest.mark.parametrize(
    ("number", "sampler", "interval", "tile"),
    [(1, "dpmpp_2m", 2, None), (1, "heun", 3, None), (2, "ddpm", 2, None), (2, "ddim", 3, 16)],
)
def test_every_nth_evaluation_is_whole(run, number, sampler, interval, tile):
    """All are counted, both of Heun's steps too; each tile has features of its own."""
    settings = StageSettings(steps=5, cond_scale=3.0, sampler=sampler, threshold=0.9)
    cached = settings.model_copy(update={"cache_interval": interval})
    stage, inputs = stage_of(run, number, tile=tile), inputs_of(number)
    uncached = stage.sample(inputs, settings)
    found = stage.sample(inputs, cached)
    in_two_passes = stage_of(run, number, tile=tile, sequential=True).sample(inputs, cached)
    stage.runtime = written_out(stage.runtime, interval)
    expected = stage.sample(inputs, settings)
    for made in (found, in_two_passes):
        torch.testing.assert_close(made, expected, atol=2e-4, rtol=0)
    assert (found - uncached).abs().max() > 0.01


@pytest.fixture
def evaluations(monkeypatch):
    """Images that went through a network and whether through all of it, of each call."""
    seen, denoise = [], UNet.denoise

    def counted(self, x_t, *others, deep=None, **more):
        seen.append((len(x_t), deep is None))
        return denoise(self, x_t, *others, deep=deep, **more)

    monkeypatch.setattr(UNet, "denoise", counted)
    return seen


def sample(run, **options):
    return TrainedStages.load(run).sample(["sun"], make(**{"steps": 5} | options))


def test_one_is_every_evaluation_whole_bit_for_bit(run, evaluations):
    usual = sample(run)
    assert evaluations == [(2, True)] * 5 + [(1, True)] * 5
    assert all(map(torch.equal, sample(run, cache_interval=1), usual))
    base, super_resolution = sample(run, cache_interval=[1, 2])
    assert torch.equal(base, usual[0]) and not torch.equal(super_resolution, usual[1])


def test_the_others_leave_the_deeper_levels_out(run, evaluations):
    sample(run, cache_interval=[2, 3])
    assert [is_whole for _, is_whole in evaluations] == [
        *(True, False, True, False, True),
        *(True, False, False, True, False),
    ]


def test_where_guidance_sets_in_or_ends_the_next_evaluation_is_whole(run, evaluations):
    sample(run, steps=8, cache_interval=[3, 8], guidance_interval=["0.25:0.5", None])
    plain, guided = (1, False), (2, False)
    whole, both = (1, True), (2, True)
    assert evaluations[:8] == [whole, plain, both, guided, whole, plain, plain, whole]


def test_compiled_is_eager(run, monkeypatch):
    """Captured as ever, and run without generated code, which takes minutes to make."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = StageSettings(steps=3, threshold=0.9, cache_interval=2)
    eager, compiled = stage_of(run, 1), stage_of(run, 1, runtime="compile")
    found, expected = (one.sample(inputs_of(1), settings) for one in (compiled, eager))
    assert compiled.runtime.compiled
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    compiled.close()


def test_a_stage_of_one_level_is_refused():
    config = parse_config(
        json.dumps(TINY),
        overrides=["unets.0.dim_mults=[1]", "unets.0.layer_attns=false",
                   "unets.0.layer_cross_attns=false"],
    )  # fmt: skip
    stages = [config.stage(number, 384) for number in (1, 2)]
    assert [of.cache_interval for of in make(cache_interval=[1, 2]).for_stages(stages)] == [1, 2]
    with pytest.raises(UsageError, match="cache_interval 2: U-Net 1 has one level, .* give 1 for"):
        make(cache_interval=2).for_stages(stages)


def in_255(images):
    return to_uint8(images).astype(int)


def drawn(run, runtime, options):
    """The last stage's picture."""
    stages = TrainedStages.load(run, runtime=RuntimeOptions(runtime=runtime, precision="fp32"))
    return stages.sample(["sun"], make(**options))[1]


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "options",
    [
        {"cond_scale": [3.0, 2.0], "guidance_interval": [None, "0.5:1"], "sampler": "heun"},
        {"tile": 16, "sampler": "dpmpp_2m_sde"},
    ],
)
def test_an_export_does_the_same(exported, tmp_path, runtime, options):
    """Of the second stage, which takes any size and was exported with `--cache`."""
    asked = {"steps": 5, **options}
    cached = asked | {"cache_interval": [1, 3]}
    theirs = drawn(exported, "torch", cached)
    ours, uncached = (drawn(exported, runtime, how) for how in (cached, asked))
    assert np.abs(in_255(theirs) - in_255(ours)).max() <= 1
    assert np.abs(in_255(uncached) - in_255(ours)).max() > 1


def test_an_export_without_shallow_graphs_says_how_to_get_them(exported):
    cascade = TrainedStages.load(exported, runtime=RuntimeOptions(runtime="onnx"))
    with pytest.raises(UsageError) as caught:
        cascade.sample(["sun"], make(steps=2, cache_interval=[2, 1]))
    assert str(caught.value) == (
        "cache_interval: this export of U-Net 1 computes every evaluation whole; export it again "
        "with `imagen-scale export --unet 1 --cache --force`, or take runtime torch."
    )
    said = []
    best = TrainedStages.load(exported, runtime=RuntimeOptions(runtime="auto"), say=said.append)
    best.sample(["sun"], make(steps=2, cache_interval=[2, 1]))
    assert any("U-Net 1: runtime torch" in sentence and "whole" in sentence for sentence in said)
    assert any("U-Net 2: runtime onnxruntime" in sentence for sentence in said)
    file = read_inference(inference_path(exported, 1))
    with pytest.raises(UsageError, match="cache: engines compute every evaluation whole; export"):
        export_unet(file, ExportOptions(format="tensorrt", cache=True), print)


def test_an_export_that_lacks_a_shallow_graph_is_damaged(exported, tmp_path):
    file, folder = read_inference(inference_path(exported, 2)), tmp_path / "export"
    shutil.copytree(export_folder(file, "onnx", "fp32"), folder)
    open_export(folder, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["denoiser_shallow.onnx"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"damaged: it does not list denoiser_shallow\.onnx"):
        open_export(folder, file)


@pytest.mark.parametrize("guided", [True, False])
def test_a_shallow_graph_holds_the_finest_level_alone(exported, guided):
    folder = export_folder(read_inference(inference_path(exported, 2)), "onnx", "fp32")
    whole, shallow = (
        op_census(folder / graph_name(guided, shallow=each)) for each in (False, True)
    )
    unet = load_unet(read_inference(inference_path(exported, 2)))
    below = [unet.downs[1], unet.mid_block1, unet.mid_block2, unet.ups[0], unet.downs[0][4]]
    convolutions, norms = (
        sum(isinstance(module, kind) for part in below for module in part.modules())
        for kind in (nn.Conv2d, nn.GroupNorm)
    )
    assert whole["InstanceNormalization"] - shallow["InstanceNormalization"] == norms > 5
    # A convolution of features beside a skip connection is two in the graph.
    assert whole["Conv"] - shallow["Conv"] >= convolutions


def test_half_precision_and_half_the_side(tmp_path):
    """The deeper features leave in float32, and of this network at half the picture's side."""
    unet = make_unet(1, memory_efficient=True).eval().requires_grad_(False)
    export_denoisers(
        unet, tmp_path, image_size=16, precision="fp16", dynamic_size=True, shallow=True
    )
    for guided in (True, False):
        ports = denoiser_inputs(unet.config, 16, dynamic_size=True, guided=guided)
        inputs = example_inputs(ports, batch=2, size=24)
        whole, shallow = (
            OnnxCpu(tmp_path / graph_name(guided, shallow=each)) for each in (False, True)
        )
        prediction, deep = whole.outputs(inputs)
        assert deep.shape == (4 if guided else 2, 8, 12, 12)
        again = shallow(inputs | {"deep": deep})
        assert (again - prediction).abs().max() < 1e-2 * prediction.abs().max()
        other = shallow(inputs | {"deep": deep.flip(0)})
        assert (other - prediction).abs().max() > 1e-1 * prediction.abs().max()
