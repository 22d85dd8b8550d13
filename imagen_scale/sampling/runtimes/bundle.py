"""What a bundle is: `bundle.json`, which says all that sampling needs beside the graphs.

A bundle is one folder with every graph of a cascade, from the text encoder on, that needs neither
the run nor torch. docs/bundle.md is written for those who read it in another language.
"""

from pathlib import Path
from typing import Literal

from imagen_scale.config.section import Section
from imagen_scale.diffusion.names import Sampler, Spacing
from imagen_scale.diffusion.schedule import PredType
from imagen_scale.errors import ExportError
from imagen_scale.runs.folders import bundle_path
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.runtimes.manifest import FileRecord, Graph, Verification
from imagen_scale.sampling.runtimes.options import Precision
from imagen_scale.sampling.runtimes.reading import read_record

BUNDLE_SCHEMA = 1
TEXT_ENCODER, TOKENIZER = "text_encoder.onnx", "tokenizer.json"
SCHEDULE, NULL_TEXT = "schedule.json", "null_text.json"

# "dynamic" by a percentile, "clamp" to [-1, 1], or "none" before the last step.
Thresholding = Literal["dynamic", "clamp", "none"]


class Schedule(Section):
    """`schedule.json` of a stage: T times, of which T - 1 is all noise."""

    betas: tuple[float, ...]  # abar_t = product of 1 - beta up to t
    abar: tuple[float, ...]  # alpha²; in double precision, as solvers take them


class NullText(Section):
    """`null_text.json` of a stage: what the branch without text is given."""

    tokens: tuple[tuple[float, ...], ...]  # (max_text_len, cond_dim)
    hidden: tuple[float, ...]  # (time_cond_dim,)


class DefaultSettings(Section):
    """How a stage is sampled unless the caller says otherwise."""

    steps: int
    cond_scale: float
    sampler: Sampler
    spacing: Spacing
    eta: float
    times: tuple[int, ...]  # that these steps visit, falling

    @classmethod
    def of(cls, settings: StageSettings, times: list[int]) -> "DefaultSettings":
        """Of resolved settings."""
        values = settings.model_dump(exclude={"threshold", "guidance_interval", "cache_interval"})
        return cls(**values, times=tuple(times))


class TextPart(Section):
    """The text encoder."""

    encoder: str
    fingerprint: str
    embed_dim: int
    max_tokens: int  # longer prompts are cut
    graph: Graph


class StagePart(Section):
    """One U-Net, whose files lie in `folder`."""

    unet: int
    folder: str
    image_size: int
    channels: int
    size_divisor: int
    precision: Precision
    dynamic_size: bool
    max_text_len: int
    pred_type: PredType
    thresholding: Thresholding
    percentile: float
    lowres_time: int | None  # of the noise on the enlarged picture; None for the base
    lowres_residual: bool  # whether the prediction is added to the enlarged picture
    few_steps: bool  # sampled as it learned it, in no other way
    settings: DefaultSettings
    conditioner: Graph
    denoiser: Graph | None  # guided; none of few steps
    denoiser_unguided: Graph
    verification: Verification | None


class Bundle(Section):
    """Everything in `bundle.json`."""

    schema_version: int
    project_version: str
    text: TextPart
    stages: tuple[StagePart, ...]
    needs: dict[str, str]
    files: dict[str, FileRecord]  # by their path in the folder, with /


def read_bundle(folder: Path) -> Bundle:
    """What a bundle says of itself.

    Raises:
        ExportError: If it is missing, damaged, or of another schema than this program's.
    """
    path = bundle_path(folder)
    if not path.is_file():
        raise ExportError(f"{folder}: is no bundle; make one with `imagen-scale export --bundle`.")
    return read_record(path, Bundle, BUNDLE_SCHEMA)
