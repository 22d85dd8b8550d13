"""A whole cascade in one folder that samples without torch and without the run."""

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from imagen_scale.config import StageConfig
from imagen_scale.data.encoder import encoder_folder
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.errors import ExportError, UsageError
from imagen_scale.files.atomic import sha256
from imagen_scale.runs.folders import bundle_path
from imagen_scale.runs.inference import InferenceFile, check_one_encoder
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.prompts import open_encoder
from imagen_scale.sampling.runtimes.bundle import (
    BUNDLE_SCHEMA,
    NULL_TEXT,
    SCHEDULE,
    TEXT_ENCODER,
    TOKENIZER,
    Bundle,
    DefaultSettings,
    NullText,
    Schedule,
    StagePart,
    TextPart,
    Thresholding,
)
from imagen_scale.sampling.runtimes.exported import export_folder, load_conditioner, open_export
from imagen_scale.sampling.runtimes.manifest import (
    FileRecord,
    Graph,
    Manifest,
    record,
)
from imagen_scale.sampling.runtimes.ports import (
    GUIDANCE,
    LEAST_ONNXRUNTIME,
    text_encoder_inputs,
    text_encoder_output,
)
from imagen_scale.sampling.stage_schedule import stage_schedule
from imagen_scale.version import __version__
from imagen_scale_export.exporter import ExportOptions, check_cache, export_unet
from imagen_scale_export.staging import staged
from imagen_scale_export.text_encoder import export_text_encoder, verify_text_encoder

Tell = Callable[[str], None]
CPU = torch.device("cpu")


def export_bundle(
    files: Sequence[InferenceFile], final: Path, options: ExportOptions, tell: Tell
) -> Bundle:
    """Writes a cascade's bundle, from exports that are there where they fit.

    Args:
        files: The inference files of all stages, in order.
        final: The bundle's folder.
        options: Of the stages' exports, whose format is onnx; `force` replaces the bundle and makes
            no export anew.
        tell: Told what is being done, in one sentence each.

    Raises:
        ParityError: If a graph differs from the network.
        ExportError: If one cannot be made.
        CheckpointError: If the text encoder at hand is not the one of training, or not all stages
            had the same.
        UsageError: If the folder exists already.
    """
    if final.exists() and not bundle_path(final).is_file():
        raise UsageError(f"{final}: is there and no bundle; name a folder that does not exist.")
    if final.exists() and not options.force:
        raise UsageError(f"{final}: exists already; add --force to replace it.")
    check_one_encoder(files)
    check_cache(files, options)
    exports = [_export_of(file, options, tell) for file in files]
    settings = SamplingOptions().for_stages([file.stage for file in files])
    final.parent.mkdir(parents=True, exist_ok=True)
    with staged(final, force=options.force, tell=tell) as folder:
        text = _write_text(files[0], folder, check=options.check, tell=tell)
        stages = [
            _write_stage(folder / f"unet{file.unet_number}", file, source, of_stage)
            for file, source, of_stage in zip(files, exports, settings, strict=True)
        ]
        _write_licences(folder / "licences", encoder_folder(text.encoder))
        bundle = Bundle(
            schema_version=BUNDLE_SCHEMA,
            project_version=__version__,
            text=text,
            stages=tuple(stages),
            needs={"onnxruntime": f">={LEAST_ONNXRUNTIME}"},
            files={
                path.relative_to(folder).as_posix(): FileRecord(
                    bytes=path.stat().st_size, sha256=sha256(path)
                )
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        )
        bundle_path(folder).write_text(bundle.model_dump_json(indent=1), encoding="utf-8")
    return bundle


def _export_of(file: InferenceFile, options: ExportOptions, tell: Tell) -> Path:
    """The stage's export, made unless there is one that is whole, of these weights, and as wide."""
    folder = export_folder(file, "onnx", options.precision)
    if folder.is_dir():
        try:
            found = open_export(folder, file)
        except ExportError as error:
            tell(f"{error.marked.rstrip('.')}: exported anew")
        else:
            is_wide = found.dynamic_size or not options.dynamic_size
            if is_wide and (found.has_shallow or not options.cache):
                tell(f"U-Net {file.unet_number}: takes {folder}")
                return folder
    anew = ExportOptions(
        precision=options.precision, dynamic_size=options.dynamic_size, cache=options.cache,
        check=options.check, force=True,
    )  # fmt: skip
    return export_unet(file, anew, tell)


def _write_text(file: InferenceFile, folder: Path, *, check: bool, tell: Tell) -> TextPart:
    name, embed_dim = file.config.text_encoder, file.text_embed_dim
    tell(f"text encoder {name}: tracing its graph")
    encoder = open_encoder(file, CPU)
    (folder / TOKENIZER).write_text(encoder.tokenizer_json(name), encoding="utf-8")
    export_text_encoder(encoder, folder / TEXT_ENCODER, embed_dim)
    if check:
        verify_text_encoder(encoder, folder / TEXT_ENCODER, folder / TOKENIZER)
    return TextPart(
        encoder=name,
        fingerprint=file.text_fingerprint,
        embed_dim=embed_dim,
        max_tokens=encoder.max_tokens,
        graph=Graph(
            inputs=record(text_encoder_inputs()), outputs=record([text_encoder_output(embed_dim)])
        ),
    )


def _write_stage(
    folder: Path, file: InferenceFile, source: Path, settings: StageSettings
) -> StagePart:
    manifest = open_export(source, file)
    folder.mkdir()
    for name in manifest.files:
        shutil.copyfile(source / name, folder / name)
    stage, schedule = file.stage, stage_schedule(file.stage)
    written = Schedule(betas=tuple(schedule.betas.tolist()), abar=tuple(schedule.abar.tolist()))
    (folder / SCHEDULE).write_text(written.model_dump_json(), encoding="utf-8")
    null = load_conditioner(file).null_text(1)
    tokens = tuple(tuple(token) for token in null.tokens[0].tolist())
    text = NullText(tokens=tokens, hidden=tuple(null.hidden[0].tolist()))
    (folder / NULL_TEXT).write_text(text.model_dump_json(), encoding="utf-8")
    lowres_level = stage.imagen.lowres_sample_noise_level
    return StagePart(
        unet=file.unet_number,
        folder=folder.name,
        image_size=stage.size,
        channels=stage.imagen.channels,
        size_divisor=manifest.size_divisor,
        precision=manifest.precision,
        dynamic_size=manifest.dynamic_size,
        max_text_len=stage.unet.max_text_len,
        pred_type=stage.unet.pred_type,
        thresholding=thresholding(stage),
        percentile=stage.threshold or 1.0,  # of nothing but "dynamic"
        lowres_time=schedule.level_to_time(lowres_level) if stage.is_super_resolution else None,
        lowres_residual=stage.unet.lowres_residual,
        few_steps=stage.few_steps is not None,
        settings=DefaultSettings.of(
            settings, visited_times(schedule, settings.steps, settings.spacing)
        ),
        conditioner=manifest.conditioner,
        denoiser=manifest.denoiser if True in manifest.sampler.graphs else None,
        denoiser_unguided=_unguided(manifest),
        verification=manifest.verification,
    )


def thresholding(stage: StageConfig) -> Thresholding:
    """What a program without torch does to the clean picture that a stage predicts."""
    if stage.few_steps:
        return "none"
    return "clamp" if stage.threshold is None else "dynamic"


def _unguided(manifest: Manifest) -> Graph:
    inputs = tuple(port for port in manifest.denoiser.inputs if port.name not in GUIDANCE)
    return Graph(inputs=inputs, outputs=manifest.denoiser.outputs)


def _write_licences(folder: Path, encoder: Path) -> None:
    """This package's licence and those it names, and what the encoder says of itself."""
    folder.mkdir()
    for own in importlib.metadata.files("imagen-scale") or ():
        if own.parent.name == "licenses":
            shutil.copyfile(str(own.locate()), folder / own.name)
    for path in encoder.iterdir():
        if path.name.lower().startswith(("license", "licence", "notice", "readme")):
            shutil.copyfile(path, folder / f"text_encoder_{path.name}")
