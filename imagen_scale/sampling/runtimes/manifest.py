"""What an export is made of and belongs to: `manifest.json`, written last and checked at load.

A folder without a manifest is not an export. With one, every file in it has the recorded hash,
and the export was made from the very weights it is used with.
"""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from imagen_scale.config import ScheduleConfig
from imagen_scale.config.section import Section
from imagen_scale.diffusion.schedule import NoiseSchedule, PredType, linear_betas
from imagen_scale.errors import ExportError
from imagen_scale.files.atomic import sha256
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.onnx_files import data_files
from imagen_scale.sampling.runtimes.ports import (
    DENOISER,
    LEAST_ONNXRUNTIME,
    UNGUIDED,
    Port,
    Precision,
)
from imagen_scale.sampling.runtimes.reading import read_record
from imagen_scale.sampling.stage_schedule import noise_schedule, stage_schedule
from imagen_scale.version import __version__

MANIFEST = "manifest.json"
ENGINE, UNGUIDED_ENGINE = "denoiser.engine", "denoiser_unguided.engine"
SCHEMA_VERSION = 2  # 1: the branch without text was built into the guided graph
Format = Literal["onnx", "tensorrt"]
MinOptMax = tuple[int, int, int]  # least, best served, most


class FileRecord(Section):
    """One file of the export."""

    bytes: int
    sha256: str


class PortRecord(Section):
    """One input or output of a graph; a free dimension stands by name."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


class Graph(Section):
    """Inputs and outputs of one ONNX file."""

    inputs: tuple[PortRecord, ...]
    outputs: tuple[PortRecord, ...]


class Profile(Section):
    """What an engine accepts: images at once, and their side in pixels."""

    batch: MinOptMax
    side: MinOptMax


class SamplerConstants(Section):
    """What the sampling loop must agree on with the network's training."""

    pred_type: PredType
    timesteps: int
    betas_sha256: str
    image_size: int
    dynamic_thresholding_percentile: float | None
    lowres_sample_noise_level: float
    # Exports made before there were these have neither.
    schedule: ScheduleConfig | None = None
    lowres_residual: bool = False
    steps: int | None = None  # of a stage that takes few of them, without guidance

    @property
    def graphs(self) -> tuple[bool, ...]:
        """Which denoisers there are: guided or not."""
        return (True, False) if self.steps is None else (False,)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule, from what stands here alone."""
        return noise_schedule(self.timesteps, self.image_size, self.schedule)


class TextFacts(Section):
    """The text encoder whose features the network was trained on."""

    encoder: str
    fingerprint: str
    embed_dim: int
    max_text_len: int


class EngineFacts(Section):
    """What a TensorRT engine was built from and by."""

    library: Literal["tensorrt_rtx", "tensorrt"]
    version: str
    targets: tuple[str, ...]
    onnx_sha256: str


class Verification(Section):
    """What comparing the export with the torch network gave."""

    runtime: str
    passed: bool
    max_relative_error: float
    min_cosine: float
    loop_max_levels: float
    loop_psnr_db: float
    note: str
    loop_steps: int = 20


class Manifest(Section):
    """Everything in `manifest.json`."""

    schema_version: int
    project_version: str
    format: Format
    unet_number: int
    checkpoint_sha256: str
    checkpoint_step: int
    unet: dict[str, Any]
    precision: Precision
    opset: int
    exporter: dict[str, str]
    denoiser: Graph
    conditioner: Graph
    size_divisor: int
    profile: Profile | None
    sampler: SamplerConstants
    text: TextFacts
    engine: EngineFacts | None
    needs: dict[str, str]
    files: dict[str, FileRecord]
    verification: Verification | None

    @model_validator(mode="after")
    def _engines_have_a_profile(self) -> "Manifest":
        is_engine = self.format == "tensorrt"
        if (self.engine is not None) != is_engine or (self.profile is not None) != is_engine:
            raise ValueError("engine and profile belong to the format tensorrt")
        return self

    @property
    def dynamic_size(self) -> bool:
        """Whether height and width are free."""
        return isinstance(self.denoiser.inputs[0].dims[-1], str)

    @property
    def has_shallow(self) -> bool:
        """Whether there are graphs of the finest level alone, for `cache_interval`."""
        return len(self.denoiser.outputs) == 2

    @property
    def shallow(self) -> Graph:
        """Of these graphs."""
        prediction, deep = self.denoiser.outputs
        return Graph(inputs=(*self.denoiser.inputs, deep), outputs=(prediction,))


def record(ports: list[Port]) -> tuple[PortRecord, ...]:
    """Ports as the manifest keeps them."""
    return tuple(PortRecord(name=p.name, dtype=p.dtype, dims=p.dims) for p in ports)


def onnx_sha256(folder: Path) -> str:
    """One hash for the denoisers' graphs and weights together."""
    graphs = [name for name in (DENOISER, UNGUIDED) if (folder / name).is_file()]
    parts = [*graphs, *sorted(data_files(folder / graphs[0]))]
    return hashlib.sha256("".join(sha256(folder / name) for name in parts).encode()).hexdigest()


def sampler_constants(file: InferenceFile) -> SamplerConstants:
    """What sampling with this inference file uses."""
    stage, imagen = file.stage, file.config.imagen
    is_minimagens = stage.unet.schedule is None
    betas = linear_betas(stage.timesteps) if is_minimagens else stage_schedule(stage).betas
    return SamplerConstants(
        pred_type=stage.unet.pred_type,
        timesteps=stage.timesteps,
        betas_sha256=hashlib.sha256(betas.float().numpy().tobytes()).hexdigest(),
        image_size=stage.size,
        dynamic_thresholding_percentile=imagen.dynamic_thresholding_percentile,
        lowres_sample_noise_level=imagen.lowres_sample_noise_level,
        schedule=stage.unet.schedule,
        lowres_residual=stage.unet.lowres_residual,
        steps=None if stage.few_steps is None else stage.few_steps.steps,
    )


def text_facts(file: InferenceFile) -> TextFacts:
    """The text side of an inference file."""
    return TextFacts(
        encoder=file.config.text_encoder,
        fingerprint=file.text_fingerprint,
        embed_dim=file.text_embed_dim,
        max_text_len=file.stage.unet.max_text_len,
    )


def unet_facts(file: InferenceFile) -> dict[str, Any]:
    """The U-Net's configuration with every null filled in, as JSON has it."""
    stage = file.stage
    return json.loads(json.dumps({"crop": stage.unet.crop, **asdict(stage.network)}))


def write_manifest(
    folder: Path,
    file: InferenceFile,
    *,
    checkpoint_sha256: str,
    format: Format,
    precision: Precision,
    opset: int,
    denoiser: Graph,
    conditioner: Graph,
    profile: Profile | None,
    engine: EngineFacts | None,
    verification: Verification | None,
) -> Manifest:
    """Hashes every file in `folder` and writes the manifest, the last file of an export."""
    packages = ("torch", "onnx", "onnxscript")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        project_version=__version__,
        format=format,
        unet_number=file.unet_number,
        checkpoint_sha256=checkpoint_sha256,
        checkpoint_step=file.step,
        unet=unet_facts(file),
        precision=precision,
        opset=opset,
        exporter={name: importlib.metadata.version(name) for name in packages},
        denoiser=denoiser,
        conditioner=conditioner,
        size_divisor=file.stage.unet.size_divisor,
        profile=profile,
        sampler=sampler_constants(file),
        text=text_facts(file),
        engine=engine,
        needs=(
            {engine.library: f"=={engine.version}"}
            if engine
            else {"onnxruntime": f">={LEAST_ONNXRUNTIME}"}
        ),
        files={
            path.name: FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
            for path in sorted(folder.iterdir())
        },
        verification=verification,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export, by itself; `checks` looks at the rest.

    Raises:
        ExportError: If it is missing, damaged, or of another schema than this program's.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ExportError(
            f"{folder}: not a finished export (it has no {MANIFEST}). Export again with "
            f"`imagen-scale export`."
        )
    return read_record(path, Manifest, SCHEMA_VERSION)
