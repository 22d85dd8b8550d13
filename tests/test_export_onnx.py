"""The ONNX files themselves: what they compute, how they are built, what they do not tell."""

import gc
import json
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from imagen_scale_export.denoisers import (
    Twice,
    check_fp16_range,
    export_conditioner,
    export_denoisers,
)
from imagen_scale_export.to_onnx import example_inputs, export_graph, op_census
from support import ROOT
from support.tiny import TINY, write_run, write_stage
from torch import nn

from imagen_scale.config import parse_config
from imagen_scale.errors import ExportError
from imagen_scale.models.unet import TextCond, UNet
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.runtimes.onnx_files import data_files
from imagen_scale.sampling.runtimes.ports import (
    denoiser_inputs,
    text_encoder_inputs,
    text_encoder_output,
)
from imagen_scale.sampling.runtimes.torch_unet import load_unet

SIZES = TINY["imagen"]["image_sizes"]
LIMITS = {"fp32": 1e-5, "fp16": 1e-2}


def folder_of(run, number, precision):
    return run / "export" / f"unet{number}" / f"onnx-{precision}"


def two_passes(unet, inputs):
    """Classifier-free guidance by hand: two passes and an extrapolation."""
    rest = (inputs.get("lowres_img"), inputs.get("lowres_t"))
    text = TextCond(inputs["text_tokens"], inputs["text_hidden"])
    cond = unet.denoise(inputs["x_t"], inputs["t"], text, *rest)
    away = TextCond(inputs["null_tokens"], inputs["null_hidden"])
    null = unet.denoise(inputs["x_t"], inputs["t"], away, *rest)
    return null + (cond - null) * inputs["cond_scale"][:, None, None, None]


def relative_error(run, number, precision, *, batch, size):
    unet = load_unet(read_inference(inference_path(run, number)))
    inputs = example_inputs(
        denoiser_inputs(unet.config, size, dynamic_size=False), batch=batch, size=size, seed=batch
    )
    inputs["t"] = torch.linspace(99, 0, batch)
    session = onnxruntime.InferenceSession(folder_of(run, number, precision) / "denoiser.onnx")
    feed = {name: value.numpy() for name, value in inputs.items()}
    found = torch.from_numpy(session.run(None, feed)[0])
    expected = two_passes(unet, inputs)
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_graph_computes_guided_predictions(exported, number, precision, batch):
    """Each image has a guidance scale of its own: 0, 1 and 2."""
    error = relative_error(exported, number, precision, batch=batch, size=SIZES[number - 1])
    assert error < LIMITS[precision]
    if precision == "fp16":
        assert error > 1e-5  # it did compute in half precision


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_graph_without_guidance_shares_the_weights(exported, number, precision):
    folder, size = folder_of(exported, number, precision), SIZES[number - 1]
    assert data_files(folder / "denoiser_unguided.onnx") == {"denoiser.onnx.data"}
    model = onnx.load(folder / "denoiser_unguided.onnx", load_external_data=False)
    assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) < 30_000
    unet = load_unet(read_inference(inference_path(exported, number)))
    ports = denoiser_inputs(unet.config, size, dynamic_size=False, guided=False)
    session = onnxruntime.InferenceSession(folder / "denoiser_unguided.onnx")
    for batch in (1, 3):
        inputs = example_inputs(ports, batch=batch, size=size, seed=batch)
        feed = {name: value.numpy() for name, value in inputs.items()}
        found = torch.from_numpy(session.run(None, feed)[0])
        text = TextCond(inputs.pop("text_tokens"), inputs.pop("text_hidden"))
        expected = unet.denoise(text=text, **inputs)
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < LIMITS[precision]


@pytest.mark.parametrize("size", [16, 48])
def test_a_dynamic_graph_takes_other_sizes(exported, size):
    assert relative_error(exported, 2, "fp32", batch=2, size=size) < LIMITS["fp32"]


@pytest.mark.parametrize("number", [1, 2])
def test_the_conditioner_computes_text_tokens_and_pooled_text(exported, number):
    unet = load_unet(read_inference(inference_path(exported, number)))
    session = onnxruntime.InferenceSession(folder_of(exported, number, "fp32") / "conditioner.onnx")
    embeds = torch.randn(3, 8, 384)
    mask = torch.arange(8) < torch.tensor([[0], [3], [8]])  # none, some, all are tokens
    found = session.run(None, {"text_embeds": embeds.numpy(), "text_mask": mask.numpy()})
    for ours, theirs in zip(found, unet.condition_text(embeds, mask), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [1, 2])
def test_operators_follow_the_precision(exported, number):
    """Half precision has one node per attention; every norm's statistics are float32.

    ONNX Runtime has a kernel for InstanceNormalization, none for GroupNormalization.
    """
    unet = load_unet(read_inference(inference_path(exported, number)))
    kinds = Counter(type(module).__name__ for module in unet.modules())
    for precision, opset in (("fp32", 21), ("fp16", 23)):
        path = folder_of(exported, number, precision) / "denoiser.onnx"
        ops = op_census(path)
        assert ops["InstanceNormalization"] == kinds["GroupNorm"]
        attentions = kinds["Attention"] + kinds["CrossAttention"]
        assert ops.get("Attention", 0) == (attentions if precision == "fp16" else 0)
        assert not {"Einsum", "GroupNormalization", "If", "Loop"} & set(ops)
        model = onnx.load(path, load_external_data=False)
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
        for node in model.graph.node:
            if node.op_type == "LayerNormalization":
                (stash,) = [a.i for a in node.attribute if a.name == "stash_type"]
                assert stash == onnx.TensorProto.FLOAT
        kinds_of = value_kinds(model)
        assert {kinds_of[value] for node in model.graph.node for value in node.input
                if node.op_type == "InstanceNormalization"} == {onnx.TensorProto.FLOAT}  # fmt: skip


def value_kinds(model):
    """The element type of everything in a graph, by name."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type
             for v in (*graph.value_info, *graph.input, *graph.output)}  # fmt: skip
    return kinds | {tensor.name: tensor.data_type for tensor in graph.initializer}


# What ONNX Runtime 1.27 computes in bfloat16 on NVIDIA cards (docs/OperatorKernels.md there, and
# for normalisations and attention its contributed kernels and functions).
BF16_ON_CARDS = {
    "Add", "Attention", "Cast", "Concat", "Conv", "Expand", "Gemm", "LayerNormalization", "MatMul",
    "Mul", "Reshape", "Shape", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def test_a_bf16_graph_has_no_operator_that_cards_do_not_compute_in_bf16(tmp_path):
    write_run(tmp_path / "run")
    unet = load_unet(read_inference(inference_path(tmp_path / "run", 2)))
    export_denoisers(
        unet, tmp_path, image_size=32, precision="bf16", dynamic_size=True, shallow=True
    )
    assert any(isinstance(module, nn.Upsample) for module in unet.modules())  # the network's own
    for name in ("denoiser", "denoiser_unguided", "denoiser_shallow", "denoiser_unguided_shallow"):
        model = onnx.load(tmp_path / f"{name}.onnx")
        kinds = value_kinds(model)
        in_bf16 = {
            node.op_type for node in model.graph.node
            if any(kinds.get(v) == onnx.TensorProto.BFLOAT16 for v in (*node.input, *node.output))
        }  # fmt: skip
        assert {"Conv", "Gemm"} < in_bf16 <= BF16_ON_CARDS


def test_nearest_neighbours_without_resize_are_the_same():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(Twice()(x), nn.Upsample(scale_factor=2, mode="nearest")(x))


@pytest.mark.parametrize("number", [1, 2])
def test_every_input_keeps_a_free_batch(exported, number):
    model = onnx.load(
        folder_of(exported, number, "fp16") / "denoiser.onnx", load_external_data=False
    )
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param == "batch"
        assert all(dim.dim_value > 0 for dim in dims[1:])
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_weights_lie_outside_and_nothing_tells_of_the_machine(exported):
    for path in (exported / "export").rglob("*.onnx"):
        name = path.name.replace("_unguided", "").replace("_shallow", "")
        assert data_files(path) == {f"{name}.data"}
        content = path.read_bytes()
        for secret in (str(ROOT), "site-packages", ".py", "def forward", "stack_trace"):
            assert secret.encode() not in content, path


class ReadsItsBatch(nn.Module):
    """`len` of a tensor is a number to the tracer."""

    def __init__(self, unet):
        super().__init__()
        self.config = unet.config
        self.unet = unet

    def condition_text(self, text_embeds, text_mask):
        text = self.unet.condition_text(text_embeds, text_mask)
        return TextCond(text.tokens + torch.zeros(len(text_embeds), 1, 1), text.hidden)


def test_a_batch_that_would_be_fixed_silently_is_an_error(tmp_path):
    config = parse_config(json.dumps(TINY))
    with pytest.raises(ExportError, match="ties an input dimension"):
        export_conditioner(
            ReadsItsBatch(UNet(config.stage(1, 384).network)), tmp_path / "conditioner.onnx"
        )


def test_fp16_is_refused_with_advice_where_it_would_overflow(tmp_path):
    def enlarge(unet):
        unet.mid_block1.block1.project.weight *= 1e6

    write_stage(tmp_path, 1, change=enlarge)
    unet = load_unet(read_inference(inference_path(tmp_path, 1)))
    with pytest.raises(ExportError, match=r"fp16: .*'mid_block1.* Use --precision bf16"):
        check_fp16_range(unet, image_size=16, timesteps=100)
    write_stage(tmp_path, 1)
    unet = load_unet(read_inference(inference_path(tmp_path, 1)))
    check_fp16_range(unet, image_size=16, timesteps=100)


def test_nothing_is_finalised_while_torch_traces(tmp_path):
    """Else another library's finaliser, which computes with tensors, is a part of the graph."""
    seen = []

    class Module(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            seen.append(gc.isenabled())
            return (input_ids * attention_mask)[..., None].float()

    export_graph(
        Module(), tmp_path / "graph.onnx", text_encoder_inputs(), [text_encoder_output(1)],
        opset=21, size=1, divisor=1,
    )  # fmt: skip
    assert set(seen) == {False} and gc.isenabled()
