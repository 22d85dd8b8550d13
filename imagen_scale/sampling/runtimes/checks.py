"""Checks of an export at load: that its files are its own, and of which weights they were made."""

import stat
from pathlib import Path

from imagen_scale.errors import ExportError
from imagen_scale.files.atomic import sha256
from imagen_scale.files.inside import leads_out
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.manifest import (
    ENGINE,
    MANIFEST,
    UNGUIDED_ENGINE,
    Graph,
    Manifest,
    sampler_constants,
    text_facts,
    unet_facts,
)
from imagen_scale.sampling.runtimes.onnx_files import describe
from imagen_scale.sampling.runtimes.ports import (
    CONDITIONER,
    DENOISER,
    GUIDANCE,
    SHALLOW,
    UNGUIDED,
    UNGUIDED_SHALLOW,
)
from imagen_scale.sampling.runtimes.reading import damaged


def check_files(folder: Path, manifest: Manifest) -> None:
    """Checks that the export's files are its own and unchanged.

    What a link leads to is as good as a file, if its content is right: backups share files that
    way, and so does the cache of the Hugging Face hub.

    Raises:
        ExportError: Naming the file that is missing, changed, no file, or outside the folder.
    """
    names = {True: (DENOISER, ENGINE), False: (UNGUIDED, UNGUIDED_ENGINE)}
    pairs = [names[guided] for guided in manifest.sampler.graphs]
    needed = {CONDITIONER, *(graph for graph, _ in pairs)}
    if manifest.format == "tensorrt":
        needed |= {engine for _, engine in pairs}
    if manifest.has_shallow:
        needed |= {SHALLOW, UNGUIDED_SHALLOW}
    if missing := sorted(needed - set(manifest.files)):
        raise damaged(folder / MANIFEST, f"it does not list {missing[0]}")
    for name, expected in manifest.files.items():
        path = folder / name
        if leads_out(name) or "/" in name:
            raise damaged(folder / MANIFEST, f"the file name {name!r} leads out of the folder")
        try:
            status = path.stat()
        except OSError:
            raise ExportError(
                f"{path}: missing. The files of an export stay together: put it back, or export "
                f"again with --force."
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise ExportError(f"{path}: is no regular file; copy the file itself there.")
        if status.st_size != expected.bytes or sha256(path) != expected.sha256:
            raise ExportError(
                f"{path}: its content changed since it was exported. Export again with --force."
            )
    check_graphs(folder, manifest)


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Checks that the manifest says of the graphs what they are, and that it lists their weights.

    Raises:
        ExportError: Naming what differs.
    """
    graphs: list[tuple[str, Graph, tuple[str, ...]]] = [
        (DENOISER, manifest.denoiser, ()),
        (UNGUIDED, manifest.denoiser, GUIDANCE),
        (CONDITIONER, manifest.conditioner, ()),
    ]
    if manifest.has_shallow:
        graphs.append((SHALLOW, manifest.shallow, ()))
        graphs.append((UNGUIDED_SHALLOW, manifest.shallow, GUIDANCE))
    for name, meant, left_out in graphs:
        if name == DENOISER and True not in manifest.sampler.graphs:
            continue
        found = describe(folder / name)
        if foreign := sorted(found.data_files - set(manifest.files)):
            raise damaged(
                folder / name, f"it takes weights from {foreign[0]!r}, which is not of this export"
            )
        for what, ours, theirs in (
            ("inputs", found.inputs, meant.inputs),
            ("outputs", found.outputs, meant.outputs),
        ):
            said = [(p.name, p.dtype, p.dims) for p in theirs if p.name not in left_out]
            if [tuple(port) for port in ours] != said:
                raise damaged(
                    folder / MANIFEST, f"the {what} of {name} are not those that it lists"
                )
        precision = "fp32" if name == CONDITIONER else manifest.precision
        if found.precision not in (None, precision):
            raise damaged(
                folder / MANIFEST, f"it says {precision} of {name}, which is {found.precision}"
            )


def check_origin(folder: Path, manifest: Manifest, file: InferenceFile) -> None:
    """Checks that the export was made from this inference file, as it is now.

    Raises:
        ExportError: Naming what differs.
    """
    if manifest.unet_number != file.unet_number:
        raise ExportError(
            f"{folder}: holds U-Net {manifest.unet_number}, not U-Net {file.unet_number}."
        )
    pairs = [
        ("text encoder", manifest.text, text_facts(file)),
        ("sampler", manifest.sampler, sampler_constants(file)),
    ]
    for what, theirs, ours in pairs:
        for key in type(ours).model_fields:
            value = getattr(ours, key)
            if (seen := getattr(theirs, key)) != value:
                raise _stale(folder, file, f"{what}: {key} is {seen!r} there and {value!r} here")
    if manifest.unet != unet_facts(file):
        raise _stale(folder, file, "the U-Net's configuration differs")
    if manifest.checkpoint_sha256 != sha256(file.path):
        raise _stale(
            folder, file,
            f"the weights changed since (step {manifest.checkpoint_step} then, {file.step} now)",
        )  # fmt: skip


def _stale(folder: Path, file: InferenceFile, reason: str) -> ExportError:
    return ExportError(
        f"{folder}: was not exported from {file.path} as it is now: {reason}. Export again with "
        f"`imagen-scale export --unet {file.unet_number} --force`."
    )
