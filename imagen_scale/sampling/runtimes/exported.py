"""Exported U-Nets as runtimes of the sampling loop.

A runtime takes encoded text and the low-resolution picture and gives a `Denoiser`; what the
network predicts is turned into the clean picture here, outside the graph.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from imagen_scale.diffusion.caching import DeepCache
from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.errors import ExportError, ShapeError, UsageError, option
from imagen_scale.models.unet import TextCond, UNet
from imagen_scale.runs.folders import export_dir
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.openvino_core import core_of
from imagen_scale.sampling.runtimes.checks import check_files, check_origin
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.executors import Backend, Executor
from imagen_scale.sampling.runtimes.manifest import (
    MANIFEST,
    Format,
    Manifest,
    Profile,
    read_manifest,
)
from imagen_scale.sampling.runtimes.onnx_runtime import onnx_backend
from imagen_scale.sampling.runtimes.openvino_cpu import import_openvino, openvino_backend
from imagen_scale.sampling.runtimes.ports import DEEP, Precision, graph_name
from imagen_scale.sampling.runtimes.tensorrt_rtx import tensorrt_backend
from imagen_scale.sampling.runtimes.torch_unet import empty_unet
from imagen_scale.sampling.stage_schedule import stage_schedule

KINDS = ("onnx", "tensorrt", "openvino")
# The parts of the U-Net that `UNet.condition_text` reads.
TEXT_WEIGHTS = ("norm_cond.", "text_to_cond.", "null_text", "to_text_non_attn_cond.")


class ExportedRuntime:
    """One exported U-Net, ready to have prompts bound to it.

    Args:
        file: The inference file it was exported from.
        backend: Opens its graphs.
        conditioner: The U-Net; only its text part needs weights.
        profile: Batches and sides the graph takes; None takes any batch.
        dynamic_size: Whether the graph takes other sides than the stage's own.
        has_shallow: Whether there are graphs of the finest level alone, and `backend` keeps what
            they take.
    """

    def __init__(
        self,
        file: InferenceFile,
        backend: Backend,
        conditioner: UNet,
        *,
        profile: Profile | None,
        dynamic_size: bool,
        has_shallow: bool = False,
    ) -> None:
        self.name, self.device = backend.name, backend.device
        self._backend, self._profile = backend, profile
        self._executors: dict[str, Executor] = {}
        self.has_shallow = has_shallow
        self._conditioner = conditioner
        self._stage = file.stage
        self._dynamic_size = dynamic_size
        self._schedule = stage_schedule(file.stage).to(self.device)

    @torch.no_grad()
    def bind(self, cond: Conditioning, cache: DeepCache | None = None) -> Denoiser:
        """See `Runtime`; the graph without guidance does half the work."""
        cond.check(self._stage)
        if cache is not None:
            self.check_cache()
        batch, needed = len(cond.text.embeds), cond.branches
        text, null = self._condition(cond.text), self._conditioner.null_text(batch)
        if cond.negative is not None:
            negative = self._condition(cond.negative)
            null = TextCond(*(part.expand(batch, *part.shape[1:]) for part in negative))
        # No graph computes this branch alone, but the one without guidance takes any text.
        return _BoundDenoiser(self, text if "text" in needed else null, null, cond, cache)

    def check_cache(self) -> None:
        """Refuses `cache_interval` above 1 where there is no graph for the evaluations between.

        Raises:
            UsageError: With what to do instead.
        """
        if self.has_shallow:
            return
        remedy = (
            f"export it again with `imagen-scale export --unet {self._stage.number} --cache "
            f"--force`, or take {option('runtime')} torch"
            if self.device.type == "cpu"
            else f"on cards {option('runtime')} torch alone does"
        )
        raise UsageError(
            f"{option('cache_interval')}: this export of {self._stage.name} computes every "
            f"evaluation whole; {remedy}."
        )

    def _condition(self, text: Text) -> TextCond:
        given = Text(text.embeds.cpu(), text.mask.cpu())
        return self._conditioner.condition_text(*given, given.is_kept)

    @property
    def max_batch(self) -> int | None:
        """Most images at once; None for any number."""
        return self._profile.batch[2] if self._profile else None

    def missing(self, batch: int) -> int:
        """Images that a batch lacks to be one that the graph takes."""
        return max(0, self._profile.batch[0] - batch) if self._profile else 0

    def executor(self, *, guided: bool, shallow: bool = False) -> Executor:
        """The graph with guidance or without, whole or not, loaded when it is first asked for."""
        name = graph_name(guided, shallow=shallow)
        if name not in self._executors:
            self._executors[name] = self._backend.open(name)
        return self._executors[name]

    def close(self) -> None:
        """Frees the graphs."""
        while self._executors:
            self._executors.popitem()[1].close()

    def check_shape(self, shape: torch.Size) -> None:
        """Refuses images (B, C, H, W) that the graph does not take.

        Raises:
            ExportError: Saying what it takes.
        """
        batch, sides = shape[0], tuple(shape[2:])
        number, profile, size = self._stage.number, self._profile, self._stage.size
        if profile and batch > profile.batch[2]:
            raise ExportError(
                f"the engine of U-Net {number} takes at most {profile.batch[2]} images at once, "
                f"not {batch}. Ask for fewer at once, or build it again with `imagen-scale export "
                f"--unet {number} --format tensorrt --batch MIN:OPT:MAX --force`."
            )
        if not self._dynamic_size:
            if sides != (size, size):
                raise ExportError(
                    f"the export of U-Net {number} takes images of {size} px, not "
                    f"{sides[1]} x {sides[0]}. Export it again with --dynamic-size --force."
                )
            return
        divisor = self._stage.unet.size_divisor
        if any(side % divisor for side in sides):
            raise ExportError(
                f"U-Net {number} takes sides in multiples of {divisor} px, not "
                f"{sides[1]} x {sides[0]}."
            )
        if profile and any(not profile.side[0] <= side <= profile.side[2] for side in sides):
            raise ExportError(
                f"the engine of U-Net {number} takes sides of {profile.side[0]} to "
                f"{profile.side[2]} px, not {sides[1]} x {sides[0]}."
            )

    def predicted_x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 as the graph's prediction implies it, (B, C, H, W); a correction has no base yet."""
        return self._schedule.predicted_x_0(self._stage.unet.pred_type, x_t, t, prediction)


class _BoundDenoiser:
    """An exported graph with everything but x_t and t bound to it.

    Args:
        runtime: Holds the graphs.
        text: What depends on the text, for B images.
        null: What guidance leads away from, likewise.
        cond: The rest.
        cache: Says which evaluations are whole; None: all.
    """

    def __init__(
        self,
        runtime: ExportedRuntime,
        text: TextCond,
        null: TextCond,
        cond: Conditioning,
        cache: DeepCache | None,
    ) -> None:
        self._guided = guided = len(cond.branches) == 2
        self._runtime, self._executor = runtime, runtime.executor(guided=guided)
        self._cache = cache
        inputs = {"text_tokens": text.tokens, "text_hidden": text.hidden}
        if guided:
            inputs |= {"null_tokens": null.tokens, "null_hidden": null.hidden}
            # A whole number, as Python and pages give it, would make integers.
            scales = torch.as_tensor(cond.cond_scale, dtype=torch.float32)
            inputs["cond_scale"] = scales.expand(len(text.tokens)).contiguous()
        if cond.lowres_img is not None and cond.lowres_t is not None:
            inputs |= {"lowres_img": cond.lowres_img.float(), "lowres_t": cond.lowres_t.float()}
        self._batch = len(text.tokens)
        # An engine built for several images gets the last one more than once.
        self._more = runtime.missing(self._batch)
        self._inputs = {name: self._filled(v.to(runtime.device)) for name, v in inputs.items()}
        self._cond = cond

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicts the clean picture, (B, C, H, W) float32."""
        if len(x_t) != self._batch:
            raise ShapeError(f"{len(x_t)} images, but text of {self._batch} is bound.")
        self._runtime.check_shape(x_t.shape)
        x_t = x_t.float()
        given = {"x_t": self._filled(x_t), "t": self._filled(t.float()), **self._inputs}
        prediction = self._predict(given)[: self._batch]
        return self._cond.completed(self._runtime.predicted_x_0(prediction, x_t, t))

    def _predict(self, given: dict[str, Tensor]) -> Tensor:
        if self._cache is None:
            return self._executor(given)
        deep = self._cache.take(guided=self._guided)
        if deep is not None:
            shallow = self._runtime.executor(guided=self._guided, shallow=True)
            return shallow({**given, DEEP: deep})
        prediction, features = self._executor.outputs(given)
        self._cache.keep(features, guided=self._guided)
        return prediction

    def _filled(self, values: Tensor) -> Tensor:
        if not self._more:
            return values
        return torch.cat((values, values[-1:].expand(self._more, *values.shape[1:])))


def open_exported(
    kind: str,
    file: InferenceFile,
    *,
    folder: Path | None,
    device: torch.device,
    precision: Precision | None = None,
) -> ExportedRuntime:
    """Opens an export of a trained U-Net, checked against the inference file.

    Args:
        kind: "onnx", "tensorrt" or "openvino" (which reads the float32 ONNX file).
        file: The inference file that is to be sampled.
        folder: The export; None looks beside the run's U-Nets, see `find_export`.
        device: Where to compute.
        precision: Of the export to look for; for openvino what to compute in: bf16 where the
            processor has it, unless "fp32" is asked for. None takes the best for the device.

    Raises:
        UsageError: If the kind is unknown, or there is no such export.
        ExportError: If the export is damaged, stale or foreign.
        EnvironmentProblem: If the device cannot be used.
        MissingExtraError: If a package is missing.
    """
    if kind not in KINDS:
        raise UsageError(f"runtime {kind!r}: exported U-Nets run on {', '.join(KINDS)}.")
    if kind == "openvino" and device.type != "cpu":
        raise UsageError(f"{option('runtime')} openvino computes on the CPU, not on {device.type}.")
    format: Format = "tensorrt" if kind == "tensorrt" else "onnx"
    if folder is None:
        wanted: tuple[Precision, ...] = (precision,) if precision else _preferred(kind, device)
        folder = find_export(file, format, ("fp32",) if kind == "openvino" else wanted)
    manifest = open_export(folder, file)
    if manifest.format != format:
        raise UsageError(
            f"{folder}: holds an export for {manifest.format}; {option('runtime')} {kind} needs "
            f"one for {format}."
        )
    if kind == "tensorrt":
        assert manifest.engine is not None  # `read_manifest` checked it
        backend = tensorrt_backend(folder, manifest.engine, device)
    elif kind == "openvino":
        backend = openvino_backend(folder, bf16=_openvino_bf16(precision))
    elif device.type == "cpu" and manifest.precision == "bf16":
        raise UsageError(
            f"{folder}: ONNX Runtime computes bf16 on NVIDIA cards only. Export with "
            f"--precision fp32 for the CPU."
        )
    else:
        backend = onnx_backend(folder, device)
        check_version(folder, manifest, *backend.name.split()[:2])
    return ExportedRuntime(
        file, backend, load_conditioner(file),
        profile=manifest.profile, dynamic_size=manifest.dynamic_size,
        has_shallow=manifest.has_shallow and device.type == "cpu",
    )  # fmt: skip


def export_folder(file: InferenceFile, format: Format, precision: Precision) -> Path:
    """Where an export of this inference file lies: runs/X/export/unetN/<format>-<precision>."""
    run = file.path.parent.parent
    return export_dir(run, file.unet_number, f"{format}-{precision}")


def find_export(file: InferenceFile, format: Format, precisions: tuple[Precision, ...]) -> Path:
    """The first export there is, in the order of `precisions`.

    Raises:
        UsageError: If there is none, with the command that makes it.
    """
    folders = [export_folder(file, format, precision) for precision in precisions]
    for folder in folders:
        if (folder / MANIFEST).is_file():
            return folder
    is_asked = len(precisions) == 1
    kind = f"{format} {precisions[0]}" if is_asked else format
    asked = f" --precision {precisions[0]}" if is_asked else ""
    raise UsageError(
        f"U-Net {file.unet_number} has no {kind} export in {folders[0].parent}; "
        f"`imagen-scale export --unet {file.unet_number} --format {format}{asked}` makes one."
    )


def open_export(folder: Path, file: InferenceFile) -> Manifest:
    """The manifest of an export after every check of its files and origin.

    Raises:
        ExportError: Naming what is wrong.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    check_origin(folder, manifest, file)
    return manifest


def check_version(folder: Path, manifest: Manifest, package: str, version: str) -> None:
    """Checks that an installed package is one that the export was made for.

    Raises:
        ExportError: Naming both versions.
    """
    from packaging.specifiers import SpecifierSet

    needed = manifest.needs.get(package, "")
    if not SpecifierSet(needed).contains(version, prereleases=True):
        raise ExportError(
            f"{folder}: needs {package} {needed} and {version} is installed. Install one that "
            f"fits, or export again with --force."
        )


def load_conditioner(file: InferenceFile) -> UNet:
    """The U-Net with weights for `condition_text` alone, on the CPU."""
    unet = empty_unet(file)
    with safe_open(file.path, "pt") as weights:
        text = {
            name: weights.get_tensor(name).float()
            for name in weights.keys()  # noqa: SIM118  # not a mapping
            if name.startswith(TEXT_WEIGHTS)
        }
    unet.load_state_dict(text, assign=True, strict=False)
    return unet.requires_grad_(False)


def _preferred(kind: str, device: torch.device) -> tuple[Precision, ...]:
    """Half precision where tensor cores compute it, float32 on the CPU."""
    if kind == "tensorrt" or device.type == "cuda":
        return ("fp16", "bf16", "fp32")
    return ("fp32", "fp16")


def _openvino_bf16(precision: Precision | None) -> bool:
    core = core_of(import_openvino())
    capabilities: Any = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in capabilities:
        raise UsageError(
            f"{option('precision')} bf16: this processor computes bf16 no faster; use fp32."
        )
    return precision in (None, "bf16") and "BF16" in capabilities
