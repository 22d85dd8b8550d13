"""One U-Net from its inference file to a folder that runtimes accept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from imagen_scale.config.network import NORM_GROUPS
from imagen_scale.errors import ExportError, MissingExtraError, ParityError, UsageError, option
from imagen_scale.files.atomic import sha256
from imagen_scale.models.unet import UNet
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes import built_here
from imagen_scale.sampling.runtimes.executors import Backend
from imagen_scale.sampling.runtimes.exported import ExportedRuntime, export_folder, open_export
from imagen_scale.sampling.runtimes.manifest import (
    ENGINE,
    UNGUIDED_ENGINE,
    EngineFacts,
    Format,
    Graph,
    MinOptMax,
    Profile,
    SamplerConstants,
    Verification,
    onnx_sha256,
    record,
    sampler_constants,
    write_manifest,
)
from imagen_scale.sampling.runtimes.onnx_runtime import onnx_backend
from imagen_scale.sampling.runtimes.openvino_cpu import import_openvino, openvino_backend
from imagen_scale.sampling.runtimes.ports import (
    CONDITIONER,
    OPSETS,
    Precision,
    conditioner_inputs,
    conditioner_outputs,
    denoiser_inputs,
    denoiser_outputs,
    graph_name,
)
from imagen_scale.sampling.runtimes.tensorrt_library import Library, find_library
from imagen_scale.sampling.runtimes.tensorrt_rtx import tensorrt_backend
from imagen_scale.sampling.runtimes.torch_unet import load_unet
from imagen_scale_export.denoisers import (
    check_fp16_range,
    export_conditioner,
    export_denoisers,
)
from imagen_scale_export.staging import check_room, reject, staged
from imagen_scale_export.to_onnx import op_census, require_exporter
from imagen_scale_export.to_tensorrt import TensorRTNetwork, parse_targets
from imagen_scale_export.verify import verify, verify_conditioner
from imagen_scale_export.verify_text import real_text

Tell = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Args:
        format: ONNX files, or a TensorRT engine with the ONNX files it was built from.
        precision: What the denoiser computes in.
        batch: Images at once: least, best served, most; engines only.
        targets: "portable" or SM86,SM89,...; engines only.
        dynamic_size: Leave height and width free.
        cache: Make the graphs that `cache_interval` takes, too; ONNX files only.
        check: Compare with the torch network before the export counts.
        force: Replace an export that is there.
    """

    format: Format = "onnx"
    precision: Precision = "fp32"
    batch: MinOptMax = (1, 2, 8)
    targets: str = "portable"
    dynamic_size: bool = False
    cache: bool = False
    check: bool = True
    force: bool = False


def export_unet(file: InferenceFile, options: ExportOptions, tell: Tell) -> Path:
    """Exports one U-Net.

    Args:
        file: Its inference file.
        options: What to export.
        tell: Told what is being done, in one sentence each.

    Returns:
        The folder of the export.

    Raises:
        ParityError: If the result differs from the network; it is kept as `*.rejected`.
        ExportError: If no graph or engine can be made, or the weights change meanwhile.
        UsageError: If the export exists already, or has no use for `cache`.
        EnvironmentProblem: If memory or disk would run out.
        MissingExtraError: If a package is missing.
    """
    check_cache([file], options)
    require_exporter()
    _require_checker(options)
    library = find_library() if options.format == "tensorrt" else None
    targets = parse_targets(options.targets, library) if library else ()
    final = export_folder(file, options.format, options.precision)
    weights_bytes = file.path.stat().st_size
    check_room(
        final,
        weights_bytes=weights_bytes,
        graph_bytes=weights_bytes // (1 if options.precision == "fp32" else 2),
        engine=library is not None,
    )
    constants = sampler_constants(file)
    with staged(final, force=options.force, tell=tell) as folder:
        checkpoint_sha256 = sha256(file.path)
        unet = load_unet(file)
        if options.precision == "fp16":
            check_fp16_range(unet, image_size=constants.image_size, timesteps=constants.timesteps)
        tell(f"U-Net {file.unet_number}: tracing the {options.precision} graph")
        export_denoisers(
            unet, folder, image_size=constants.image_size,
            precision=options.precision, dynamic_size=options.dynamic_size,
            guided=True in constants.graphs, whole_norms=library is not None, shallow=options.cache,
        )  # fmt: skip
        export_conditioner(unet, folder / CONDITIONER)
        engine = profile = None
        if library:
            tell(f"U-Net {file.unet_number}: building the engines ({library.name})")
            profile = _profile(unet, constants, options)
            engine = _build(library, folder, unet, constants, options, profile, targets)
        verification = None
        if options.check:
            tell(f"U-Net {file.unet_number}: comparing it with the torch network")
            verification = _verify(file, unet, folder, options, constants, engine, profile)
        if sha256(file.path) != checkpoint_sha256:
            raise ExportError(
                f"{file.path}: changed while it was exported. Export again when training pauses."
            )
        sizes, free = (unet.config, constants.image_size), options.dynamic_size
        write_manifest(
            folder,
            file,
            checkpoint_sha256=checkpoint_sha256,
            format=options.format,
            precision=options.precision,
            opset=OPSETS[options.precision],
            denoiser=Graph(
                inputs=record(
                    denoiser_inputs(*sizes, dynamic_size=free, guided=constants.graphs[0])
                ),
                outputs=record(
                    denoiser_outputs(*sizes, dynamic_size=free, with_deep=options.cache)
                ),
            ),
            conditioner=Graph(
                inputs=record(conditioner_inputs(unet.config)),
                outputs=record(conditioner_outputs(unet.config)),
            ),
            profile=profile,
            engine=engine,
            verification=verification,
        )
    return final


def verify_export(folder: Path, file: InferenceFile) -> Verification:
    """Compares a finished export with the torch network again.

    Raises:
        ParityError: If it differs; the folder is renamed to `*.rejected`.
        ExportError: If it is damaged or stale.
    """
    manifest = open_export(folder, file)
    options = ExportOptions(
        format=manifest.format, precision=manifest.precision, dynamic_size=manifest.dynamic_size,
        cache=manifest.has_shallow,
    )  # fmt: skip
    try:
        return _verify(
            file, load_unet(file), folder, options, manifest.sampler, manifest.engine,
            manifest.profile,
        )  # fmt: skip
    except ParityError as error:
        raise ParityError(f"{error}. Moved to {reject(folder, folder)}.") from None


def check_cache(files: Sequence[InferenceFile], options: ExportOptions) -> None:
    """Refuses graphs that no sampling would take, if `cache` asks for them.

    Args:
        files: Of all that is to be exported.
        options: How.

    Raises:
        UsageError: Saying why, and what to do.
    """
    if not options.cache:
        return
    asked = option("cache")
    if options.format != "onnx":
        raise UsageError(f"{asked}: engines compute every evaluation whole; export to onnx.")
    for stage in (file.stage for file in files):
        if stage.few_steps is not None or stage.unet.num_levels == 1:
            reason = "learned few steps" if stage.few_steps is not None else "has one level"
            raise UsageError(
                f"{asked}: {stage.name} {reason}, and every evaluation is whole there. Export the "
                f"others with {option('unet')}, one by one; a bundle takes them as they are."
            )


def _require_checker(options: ExportOptions) -> None:
    """Refuses a bf16 export that nothing on this machine could check.

    ONNX Runtime has no bf16 kernels for CPUs; OpenVINO has.
    """
    if options.check and options.precision == "bf16" and not torch.cuda.is_available():
        try:
            import_openvino()
        except MissingExtraError:
            raise MissingExtraError(
                "a bf16 graph cannot be checked here: that takes an NVIDIA card, or the package "
                "openvino. Run pip install 'imagen-scale[openvino]', or export without the "
                "check: --no-verify."
            ) from None


def _profile(unet: UNet, constants: SamplerConstants, options: ExportOptions) -> Profile:
    size, divisor = constants.image_size, unet.config.size_divisor
    if not options.dynamic_size:
        return Profile(batch=options.batch, side=(size, size, size))
    half = max(divisor, size // 2 // divisor * divisor)
    return Profile(batch=options.batch, side=(half, size, 2 * size))


def _build(
    library: Library,
    folder: Path,
    unet: UNet,
    constants: SamplerConstants,
    options: ExportOptions,
    profile: Profile,
    targets: tuple[str, ...],
) -> EngineFacts:
    facts = EngineFacts(
        library=library.name,
        version=library.version,
        targets=targets,
        onnx_sha256=onnx_sha256(folder),
    )
    for guided in constants.graphs:
        graph, engine = folder / graph_name(guided), ENGINE if guided else UNGUIDED_ENGINE
        network = TensorRTNetwork(library, graph)
        # Importers have got grouped normalisation wrong before (NVIDIA/TensorRT issue 4336).
        groups, meant = network.norm_groups(), op_census(graph)["GroupNormalization"]
        if groups != [NORM_GROUPS] * meant:
            raise ParityError(
                f"{library.name} {library.version} reads {meant} group normalisations of "
                f"{NORM_GROUPS} groups as {groups}"
            )
        ports = denoiser_inputs(
            unet.config, constants.image_size, dynamic_size=options.dynamic_size, guided=guided
        )
        (folder / engine).write_bytes(network.build(ports, profile, targets))
        built_here.remember(facts, engine, sha256(folder / engine))
    return facts


def _verify(
    file: InferenceFile,
    unet: UNet,
    folder: Path,
    options: ExportOptions,
    constants: SamplerConstants,
    engine: EngineFacts | None,
    profile: Profile | None,
) -> Verification:
    backend, note = _backend(folder, options, engine)
    verify_conditioner(unet, folder / CONDITIONER)
    text, without = real_text(file)
    batches = (1, 2) if profile is None else (profile.batch[0], profile.batch[2])
    divisor = unet.config.size_divisor
    half = max(divisor, constants.image_size // 2 // divisor * divisor)
    stages = file.config.stages(file.text_embed_dim)
    settings = SamplingOptions().for_stages(stages)[file.unet_number - 1]
    runs_shallow = options.cache and backend.device.type == "cpu"
    if options.cache and not runs_shallow:
        note = "its shallow graphs were not run"
    runtime = ExportedRuntime(
        file, backend, unet, profile=None, dynamic_size=options.dynamic_size,
        has_shallow=runs_shallow,
    )  # fmt: skip
    try:
        return verify(
            unet, runtime,
            precision=options.precision, constants=constants,
            settings=settings, batches=batches,
            other_side=half if options.dynamic_size else None,
            text=text, note="; ".join(part for part in (note, without) if part),
        )  # fmt: skip
    finally:
        runtime.close()


def _backend(
    folder: Path, options: ExportOptions, engine: EngineFacts | None
) -> tuple[Backend, str]:
    """What can compute the export on this machine, and what is left unproven by it."""
    cpu, cuda, has_gpu = torch.device("cpu"), torch.device("cuda"), torch.cuda.is_available()
    if engine is not None and has_gpu:
        return tensorrt_backend(folder, engine, cuda), ""
    note = "" if engine is None else "its ONNX graph; the engine itself was not run: no NVIDIA card"
    if options.precision != "bf16":
        return onnx_backend(folder, cpu), note
    if has_gpu:
        return onnx_backend(folder, cuda), note
    return openvino_backend(folder, bf16=False), note
