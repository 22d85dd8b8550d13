"""The commands `imagen-scale export ...`; torch is imported only inside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import named_here, run_option, unfinished_option, whole_number
from imagen_scale.errors import UsageError
from imagen_scale.files.places import check_place

if TYPE_CHECKING:
    from imagen_scale.runs.inference import InferenceFile
    from imagen_scale.sampling.runtimes.manifest import Manifest, Verification

ENGINES = ("batch", "target")  # options of TensorRT's engines alone


@click.group(invoke_without_command=True, short_help="Turn trained U-Nets into ONNX or TensorRT.")
@click.option("--unet", help="Number of the U-Net, counted from 1, or all.")
@click.option(
    "--format", type=click.Choice(["onnx", "tensorrt"]), default="onnx", show_default=True
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="What the graph computes in; default fp32 for onnx, fp16 for tensorrt.",
)
@run_option
@click.option(
    "--batch",
    default="1:2:8",
    show_default=True,
    metavar="MIN:OPT:MAX",
    help="Images at once that an engine takes.",
)
@click.option(
    "--target",
    default="portable",
    show_default=True,
    help="Cards an engine is for: portable, or a list such as SM86,SM89,SM120.",
)
@click.option("--dynamic-size", is_flag=True, help="Leave the picture's size free, for tiles.")
@click.option(
    "--cache", is_flag=True, help="Also the graphs that sampling with --cache-interval takes."
)
@click.option("--verify/--no-verify", default=True, help="Compare with the torch network.")
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@click.option(
    "--bundle", is_flag=True, help="All stages and the text encoder in one folder without torch."
)
@click.option("--out", help="Folder of the bundle; default export/bundle-PRECISION in the run.")
@unfinished_option
@click.pass_context
@user_errors
def export(context: click.Context, **options: Any) -> None:
    """Turn trained U-Nets into ONNX files or TensorRT engines, checked against the originals.

    \b
        imagen-scale export --unet all --format onnx
        imagen-scale export --unet 1 --format tensorrt --target SM86,SM89
        imagen-scale export --bundle --precision fp16
    """
    if (inner := context.invoked_subcommand) is not None:
        if before := named_here(*options):
            raise UsageError(
                f"--{before[0].replace('_', '-')} does not go with {inner}, which takes a folder. "
                f"What {inner} takes is written after it: `imagen-scale export {inner} --help`."
            )
        return
    is_bundle, out, of_engines = options.pop("bundle"), options.pop("out"), named_here(*ENGINES)
    if is_bundle:
        if of_engines:
            raise UsageError(f"--{of_engines[0]}: is an engine's, and a bundle holds none.")
        _bundle(out=out, **{name: options[name] for name in options if name not in ENGINES})
    elif out is not None:
        raise UsageError("--out: goes with --bundle; an export lies in its run.")
    elif of_engines and options["format"] != "tensorrt":
        raise UsageError(
            f"--{of_engines[0]}: is an engine's, and an ONNX file takes any; add --format "
            f"tensorrt, or leave it out."
        )
    else:
        _export(**options)


def _export(
    *,
    unet: str | None,
    format: Any,
    precision: Any,
    run: str | None,
    batch: str,
    target: str,
    dynamic_size: bool,
    cache: bool,
    verify: bool,
    force: bool,
    allow_unfinished: bool,
) -> None:
    if unet is None or not (unet == "all" or whole_number(unet) > 0):
        raise UsageError(f"--unet {(unet or '')[:40]}: name the U-Net: 1, 2, ... or all.")
    from imagen_scale.config import load_config
    from imagen_scale.runs.folders import config_path, find_run

    run_dir = find_run(run)
    from imagen_scale_export.exporter import ExportOptions, check_cache, export_unet
    from imagen_scale_export.to_tensorrt import parse_range

    from imagen_scale.runs.inference import read_stage, read_stages

    options = ExportOptions(
        format=format,
        precision=precision or ("fp16" if format == "tensorrt" else "fp32"),
        batch=parse_range(batch),
        targets=target,
        dynamic_size=dynamic_size,
        cache=cache,
        check=verify,
        force=force,
    )
    # Every stage is looked at before the first is exported.
    if unet == "all":
        files = read_stages(run_dir, allow_unfinished)
    else:
        number = load_config(config_path(run_dir)).check_number(int(unet), "unet")
        files = [read_stage(run_dir, number, allow_unfinished)]
    check_cache(files, options)
    for file in files:
        folder = export_unet(file, options, click.echo)
        from imagen_scale.sampling.runtimes.manifest import read_manifest

        _print_export(folder, read_manifest(folder))


def _bundle(
    *,
    unet: str | None,
    format: str,
    precision: Any,
    run: str | None,
    dynamic_size: bool,
    cache: bool,
    verify: bool,
    force: bool,
    allow_unfinished: bool,
    out: str | None,
) -> None:
    if unet not in (None, "all"):
        raise UsageError(f"--unet {unet}: a bundle holds all U-Nets; leave --unet out.")
    if format != "onnx":
        raise UsageError(f"--format {format}: a bundle holds ONNX files; leave --format out.")
    from imagen_scale.runs.folders import find_run

    run_dir = find_run(run)
    from imagen_scale_export.bundle import export_bundle
    from imagen_scale_export.exporter import ExportOptions

    from imagen_scale.runs.folders import bundle_dir
    from imagen_scale.runs.inference import read_stages

    options = ExportOptions(
        precision=precision or "fp32", dynamic_size=dynamic_size, cache=cache, check=verify,
        force=force,
    )  # fmt: skip
    files = read_stages(run_dir, allow_unfinished)
    folder = Path(out) if out else bundle_dir(run_dir, options.precision)
    check_place(folder)
    bundle = export_bundle(files, folder, options, click.echo)
    size = sum(record.bytes for record in bundle.files.values())
    sides = " to ".join(str(stage.image_size) for stage in bundle.stages)
    click.echo(
        f"{folder}: {len(bundle.stages)} stages of {sides} px, {options.precision}, text encoder "
        f"{bundle.text.encoder}, {size / 2**20:.1f} MiB"
    )


@export.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@user_errors
def export_inspect(folder: Path) -> None:
    """Say what the export in FOLDER is, and check its files.

    \b
        imagen-scale export inspect runs/NAME/export/unet1/onnx-fp32
    """
    from imagen_scale.sampling.runtimes.checks import check_files
    from imagen_scale.sampling.runtimes.manifest import read_manifest

    manifest = read_manifest(folder)
    check_files(folder, manifest)
    _print_export(folder, manifest)


@export.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", help="Folder of the run; default the one FOLDER lies in.")
@user_errors
def export_verify(folder: Path, run: str | None) -> None:
    """Compare the export in FOLDER with the torch network again; exit code 3 if it differs.

    \b
        imagen-scale export verify runs/NAME/export/unet1/onnx-fp32
    """
    from imagen_scale_export.exporter import verify_export

    from imagen_scale.sampling.runtimes.manifest import read_manifest

    file = _inference_file(folder, run, read_manifest(folder))
    _print_verification(verify_export(folder, file))


@export.command("triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new repository.")
@click.option(
    "--max-batch",
    type=click.IntRange(min=1, max=2**31 - 1),
    default=8,
    show_default=True,
    help="Pictures that a model takes at once.",
)
@user_errors
def export_triton(bundle: Path, out: Path, max_batch: int) -> None:
    """Lay the graphs of BUNDLE out as models of NVIDIA's Triton server.

    \b
        imagen-scale export triton runs/NAME/export/bundle-fp32 --out models
    """  # fmt: skip
    from imagen_scale_export.triton import write_repository

    check_place(out)
    names = write_repository(bundle, out, max_batch)
    click.echo(f"{out}: {', '.join(names)}")


def _inference_file(folder: Path, run: str | None, manifest: "Manifest") -> "InferenceFile":
    from imagen_scale.runs.folders import inference_path
    from imagen_scale.runs.inference import read_inference

    # runs/X/export/unetN/<format>-<precision>; a copy may lie nearer to the root
    run_dir = Path(run) if run else folder.resolve().parents[:3][-1]
    path = inference_path(run_dir, manifest.unet_number)
    if run is None and not path.is_file():
        raise UsageError(
            f"{folder}: lies in no run with a trained U-Net {manifest.unet_number}; name the run "
            f"that it was made from with --run."
        )
    return read_inference(path)


def _print_export(folder: Path, manifest: "Manifest") -> None:
    size = sum(record.bytes for record in manifest.files.values())
    click.echo(
        f"{folder}: U-Net {manifest.unet_number}, {manifest.format}, {manifest.precision}, opset "
        f"{manifest.opset}, {manifest.sampler.image_size} px"
        f"{' and other sizes' if manifest.dynamic_size else ''}"
        f"{', with shallow graphs' if manifest.has_shallow else ''}, {size / 2**20:.1f} MiB, from "
        f"step {manifest.checkpoint_step}"
    )
    if manifest.engine and manifest.profile:
        click.echo(
            f"  engine of {manifest.engine.library} {manifest.engine.version} for "
            f"{', '.join(manifest.engine.targets)}; images at once: "
            f"{':'.join(map(str, manifest.profile.batch))}"
        )
    if manifest.verification:
        _print_verification(manifest.verification)
    else:
        click.echo("  not compared with the torch network (--no-verify)")


def _print_verification(result: "Verification") -> None:
    click.echo(
        f"  {result.runtime} against torch: one evaluation within {result.max_relative_error:.1e} "
        f"of its largest value, cosine {result.min_cosine:.6f}; {result.loop_steps} "
        f"{'step' if result.loop_steps == 1 else 'steps'} within "
        f"{result.loop_max_levels:.3f}/255, {result.loop_psnr_db:.1f} dB"
        f"{f' ({result.note})' if result.note else ''}"
    )
