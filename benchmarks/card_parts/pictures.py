"""Part 4: seconds of a guided evaluation and of a picture, by what computes the network."""

import importlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from card_parts.measurement import LeftOut
from card_parts.runtime_switches import SWITCHES
from card_parts.scenes import Speed, scene, written
from card_parts.timing import device, now
from imagen_scale.config import StageConfig
from imagen_scale.models.unet import UNet
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import InferenceFile, read_inference, save_inference
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.executors import require_driver
from imagen_scale.sampling.runtimes.options import EXPORTED, RuntimeName, RuntimeOptions
from imagen_scale.sampling.runtimes.tensorrt_library import find_library
from imagen_scale.sampling.stage import Inputs, Stage
from imagen_scale.training.memory_use import is_out_of_memory

NO_GRAPHS = "no runtime records CUDA graphs of eager torch; torch.compile records its own"
STEPS, MINIMAGEN_STEPS, SCALE = 25, 1000, 3.0
KNOWN = ("auto", "torch", "compile", "onnx", "tensorrt", "openvino")


class How(NamedTuple):
    """A line of the table: what computes, and in what numbers."""

    name: str
    options: dict[str, Any]  # of `RuntimeOptions`
    steps: int = STEPS
    is_extra: bool = False  # measured when all else is
    switch: str | None = None  # of `runtime_switches`


def ways(half: str) -> list[How]:
    """Every way to sample on a card.

    Args:
        half: The numbers of 16 bits that the card computes in, "bf16" or "fp16".
    """
    found = [
        How("as MinImagen: torch fp32, two passes",
            {"runtime": "torch", "precision": "fp32", "sequential": True}, MINIMAGEN_STEPS),
        How("torch fp32", {"runtime": "torch", "precision": "fp32"}),
        How(f"torch {half}", {"runtime": "torch", "precision": half}),
        How(f"torch {half}, channels_last",
            {"runtime": "torch", "precision": half, "channels_last": True}),
        How(f"torch.compile {half}", {"runtime": "compile", "precision": half}),
    ]  # fmt: skip
    # What this version does not know yet is measured when it comes.
    found += [
        How(f"{name} {half}", {"runtime": name, "precision": half})
        for name in get_args(RuntimeName)
        if name not in KNOWN
    ]
    found += [
        How(f"torch {half}, {field}", {"runtime": "torch", "precision": half, field: True})
        for field in RuntimeOptions.model_fields
        if "graph" in field
    ]
    return [
        *found,
        How("ONNX Runtime fp16", {"runtime": "onnx", "precision": "fp16"}),
        How("TensorRT fp16", {"runtime": "tensorrt", "precision": "fp16"}),
        How("ONNX Runtime fp32", {"runtime": "onnx", "precision": "fp32"}, is_extra=True),
        *(
            How(f"{name} fp16, {switch}", {"runtime": runtime, "precision": "fp16"},
                is_extra=True, switch=switch)
            for runtime, name in (("onnx", "ONNX Runtime"), ("tensorrt", "TensorRT"))
            for switch in SWITCHES[runtime]
        ),
    ]  # fmt: skip


def has_graphs() -> bool:
    """Whether a runtime or an option of that name is there."""
    return any("graph" in name for name in (*get_args(RuntimeName), *RuntimeOptions.model_fields))


def measure(
    network: int, options: dict[str, Any], steps: int, folder: str, *, switch: str | None = None,
    rehearse: bool,
) -> dict[str, Any]:  # fmt: skip
    """Seconds by the number of pictures that are made together.

    Args:
        network: Place in the scene's list.
        options: Of the runtime.
        steps: Of a picture. More than `STEPS` are not taken but counted.
        folder: Where the network's files lie, for all that sample it.
        switch: What else the runtime is told; see `runtime_switches`.
        rehearse: Small networks.
    """
    _check(options, switch, rehearse=rehearse)
    what = scene(rehearse=rehearse)
    speed, figures = what.sampled[network], {}
    run = Path(folder) / f"network{network}"
    told = nullcontext() if switch is None else SWITCHES[options["runtime"]][switch]()
    with told, sampled_stage(speed.config, speed.number, device(), run, **options) as stage:
        for batch in what.batches:
            try:
                figures |= _measure(stage, batch, what.evaluations, steps)
            except Exception as error:
                if not (batch > 1 and is_out_of_memory(error)):
                    raise
                figures[f"full_{batch}"] = str(error).splitlines()[0]
        if torch.cuda.is_available():
            figures["allocated"] = torch.cuda.max_memory_allocated()
    return figures


def _measure(stage: Stage, batch: int, evaluations: int, steps: int) -> dict[str, Any]:
    inputs, size = random_inputs(stage.config, batch), stage.config.size
    x_t = torch.randn(batch, 3, size, size, device=stage.device)
    t = torch.full((batch,), stage.config.timesteps // 2, device=stage.device)
    cond = Conditioning(inputs.text, SCALE)
    if stage.config.is_super_resolution:
        cond = cond._replace(lowres_img=x_t.clone(), lowres_t=t // 2)
    denoiser = stage.runtime.bind(cond)
    first = _seconds(lambda: denoiser(x_t, t))
    _seconds(lambda: denoiser(x_t, t))  # CUDA graphs are recorded at the second call
    one = statistics.median(_seconds(lambda: denoiser(x_t, t)) for _ in range(evaluations))
    found = {f"first_{batch}": first, f"evaluation_{batch}": one}
    if steps > STEPS:
        return found | {f"picture_{batch}": steps * one / batch, "is_extrapolated": True}
    settings = StageSettings(steps=steps, cond_scale=SCALE)
    whole = _seconds(lambda: stage.sample(inputs, settings, at_once=batch))
    return found | {f"picture_{batch}": whole / batch}


def _seconds(call: Callable[[], object]) -> float:
    start = now()
    call()
    return now() - start


def _check(options: dict[str, Any], switch: str | None, *, rehearse: bool) -> None:
    """Leaves out what cannot run here before minutes go into its export.

    Raises:
        LeftOut: If an option, a package or the card is missing.
        MissingExtraError: Likewise.
        EnvironmentProblem: Likewise.
    """
    runtime = options["runtime"]
    if switch is not None and not torch.cuda.is_available():
        raise LeftOut("what runtimes are told of a card means nothing without one")
    if runtime == "compile" and rehearse:
        raise LeftOut("a rehearsal compiles nothing: it would take minutes")
    if runtime == "tensorrt":
        require_driver(device(), runtime)
        find_library()
    if runtime == "onnx":
        try:
            providers = importlib.import_module("onnxruntime").get_available_providers()
        except ImportError:
            raise LeftOut("onnxruntime is not installed") from None
        if torch.cuda.is_available() and "CUDAExecutionProvider" not in providers:
            raise LeftOut("onnxruntime has no CUDA: pip install 'imagen-scale[gpu]' in its place")


@contextmanager
def sampled_stage(
    config: dict[str, Any],
    number: int,
    where: torch.device,
    run: Path | None = None,
    **options: Any,
) -> Iterator[Stage]:
    """A stage with random weights, exported if that is what is asked for.

    Args:
        config: `imagen` and `unets`.
        number: Of the stage.
        where: The device.
        run: Folder in which its files stay; None for a passing one.
        options: Of the runtime.
    """
    with nullcontext(run) if run else tempfile.TemporaryDirectory() as folder:
        file = _inference_file(config, number, Path(folder))
        if options["runtime"] in EXPORTED:
            _export(file, options["runtime"], options["precision"])
        stage = Stage(file, where, RuntimeOptions.make(**options))
        try:
            yield stage
        finally:
            stage.close()


def _inference_file(config: dict[str, Any], number: int, run: Path) -> InferenceFile:
    """The file that sampling reads, with random weights; written once."""
    path = inference_path(run, number)
    if not path.is_file():
        whole = written(config)
        stage = whole.stage(number)
        torch.manual_seed(number)
        unet = UNet(stage.network).eval().requires_grad_(False)
        for parameter in unet.parameters():  # the last layers start at zero
            parameter += 0.02 * torch.randn_like(parameter)
        file = InferenceFile(
            path, whole, number, text_embed_dim=stage.network.text_embed_dim,
            text_fingerprint="0" * 16, step=1, steps=1,
        )  # fmt: skip
        save_inference(file, unet.state_dict())
    return read_inference(path)


def _export(file: InferenceFile, kind: Any, precision: Any) -> None:
    """Exports it unless that was done; unchecked: part 1 and the tests compare numbers."""
    from imagen_scale_export.exporter import ExportOptions, export_unet

    from imagen_scale.sampling.runtimes.exported import export_folder

    if not export_folder(file, kind, precision).is_dir():
        export_unet(file, ExportOptions(format=kind, precision=precision, check=False), print)


def random_inputs(stage: StageConfig, batch: int) -> Inputs:
    """Text of B prompts, and the pictures of the stage before."""
    generator = torch.Generator().manual_seed(0)
    tokens, small = 32, stage.small_size
    text = Text(
        torch.randn(batch, tokens, stage.network.text_embed_dim, generator=generator),
        torch.ones(batch, tokens, dtype=torch.bool),
    )
    lowres = None
    if small is not None:
        lowres = torch.rand(batch, 3, small, small, generator=generator) * 2 - 1
    return Inputs(text, list(range(batch)), lowres)


def network_name(speed: Speed) -> str:
    """As the table calls it."""
    return speed.name if speed.name != "tiny" else f"tiny, stage {speed.number}"
