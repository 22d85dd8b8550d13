"""Inference files: a stage's averaged weights with all that sampling needs to know."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.config import Config, StageConfig, dump_config, load_config, parse_config
from imagen_scale.config.distillation import FewSteps
from imagen_scale.errors import CheckpointError, ConfigError, option
from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.system_text import is_text
from imagen_scale.files.tensors import write_tensors
from imagen_scale.runs.folders import config_path, inference_path

INFERENCE_FORMAT = "imagen-scale inference 1"


class InferenceFile(NamedTuple):
    """An inference file, by what its header says."""

    path: Path
    config: Config
    unet_number: int
    text_embed_dim: int
    text_fingerprint: str
    step: int
    steps: int
    average: str = ""  # of the weights, where it is not that of training
    # Hash of the inference file that training began with, where it was not random weights.
    origin_sha256: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether training had reached its last step."""
        return self.step >= self.steps

    @property
    def stage(self) -> StageConfig:
        """What its stage is."""
        return self.config.stage(self.unet_number, self.text_embed_dim)


def save_inference(file: InferenceFile, weights: "Mapping[str, Tensor]") -> None:
    """Writes EMA weights with the configuration inside; one file is all that sampling needs."""
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
    stream_inference(file, shapes, weights.items())


def stream_inference(
    file: InferenceFile,
    shapes: "Mapping[str, tuple[torch.dtype, Iterable[int]]]",
    weights: "Iterable[tuple[str, Tensor]]",
) -> None:
    """`save_inference` of weights that come one at a time, in the order of `shapes`."""
    metadata = {
        "format": INFERENCE_FORMAT,
        "config": dump_config(file.config),
        "unet_number": str(file.unet_number),
        "text_embed_dim": str(file.text_embed_dim),
        "text_fingerprint": file.text_fingerprint,
        "step": str(file.step),
        "steps": str(file.steps),
    }
    if file.average:
        metadata["average"] = file.average
    if file.origin_sha256 is not None:
        metadata["origin_sha256"] = file.origin_sha256
    file.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        file.path, lambda temporary: write_tensors(temporary, shapes, weights, metadata)
    )


def read_inference(path: Path) -> InferenceFile:
    """Reads the header of an inference file.

    Raises:
        CheckpointError: If it is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: not found.")
    if not is_text(path):
        raise CheckpointError(
            f"{path}: safetensors opens only files whose names are UTF-8 text; rename the folder "
            f"that is not."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}). Restore it from a checkpoint.") from None
    if metadata.get("format") != INFERENCE_FORMAT:
        raise CheckpointError(f"{path}: not an inference file of imagen-scale.")
    try:
        found = InferenceFile(
            path=path,
            config=parse_config(metadata["config"], source=str(path)),
            unet_number=int(metadata["unet_number"]),
            text_embed_dim=int(metadata["text_embed_dim"]),
            text_fingerprint=metadata["text_fingerprint"],
            step=int(metadata["step"]),
            steps=int(metadata["steps"]),
            average=metadata.get("average", ""),
            origin_sha256=metadata.get("origin_sha256"),
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged (what it says of itself: {error}). Restore it from a checkpoint."
        ) from None
    if not 1 <= found.unet_number <= len(found.config.unets):
        raise CheckpointError(
            f"{path}: damaged (it is of U-Net {found.unet_number}, and its cascade has U-Nets 1 to "
            f"{len(found.config.unets)}). Restore it from a checkpoint."
        )
    return found


def is_finished(path: Path, steps: int) -> bool:
    """Whether an inference file is whole, and of so many steps or more."""
    try:
        return read_inference(path).step >= steps
    except CheckpointError:
        return False


def check_one_encoder(files: Iterable[InferenceFile]) -> None:
    """Refuses stages that read text through different encoders, as one cascade reads it once.

    Args:
        files: Of a run, the first stage's first.

    Raises:
        CheckpointError: Naming the stage.
    """
    first, *others = files
    for file in others:
        if file.text_fingerprint != first.text_fingerprint:
            raise CheckpointError(
                f"{file.path.parents[1]}: {file.stage.name} was trained with another version of "
                f"the text encoder than {first.stage.name}. Train one of them again with --unet N "
                f"--fresh."
            )


def learned_stages(run: Path, unets: int) -> dict[int, FewSteps]:
    """Of a run's first U-Nets those that take few steps, by their number."""
    found = {}
    for number in range(1, unets + 1):
        with suppress(CheckpointError):  # not trained yet
            if few := read_inference(inference_path(run, number)).stage.few_steps:
                found[number] = few
    return found


def load_weights(path: Path) -> dict[str, "Tensor"]:
    """The tensors of an inference file, on the CPU."""
    from safetensors.torch import load_file

    return load_file(path)


def read_stage(run: Path, unet_number: int, allow_unfinished: bool) -> InferenceFile:
    """The header of one stage's inference file, checked."""
    path = inference_path(run, unet_number)
    if not path.is_file():
        raise CheckpointError(
            f"{run}: U-Net {unet_number} is not trained yet ({path} does not exist). Train it "
            f"with `deepspeed launch/train.py --unet {unet_number} --config ...`"
            + (f", or sample the earlier stages with {option('unet_limit')} {unet_number - 1}."
               if unet_number > 1 else ".")
        )  # fmt: skip
    file = read_inference(path)
    if file.unet_number != unet_number:
        raise CheckpointError(
            f"{path}: is of U-Net {file.unet_number}, not {unet_number}. Put it where that one's "
            f"is, or restore this one from a checkpoint."
        )
    if file.config.imagen.channels != 3:
        raise CheckpointError(
            f"{path}: draws {file.config.imagen.channels} channels (imagen.channels); pictures are "
            f"made of 3, red, green and blue."
        )
    if not (file.is_finished or allow_unfinished):
        raise CheckpointError(
            f"{run}: U-Net {unet_number} is half-trained ({file.step} of {file.steps} steps). "
            f"Run the training command again to finish it, or sample it as it is with "
            f"{option('allow_unfinished')}."
        )
    return file


def read_stages(
    run: Path, allow_unfinished: bool, unet_limit: int | None = None
) -> list[InferenceFile]:
    """`read_stage` of every stage of a run, or of the first so many.

    Raises:
        CheckpointError: If one is missing, damaged, or of another cascade than the run's.
        UsageError: If `unet_limit` is out of range.
    """
    first = read_stage(run, 1, allow_unfinished)
    cascade = first.config
    with suppress(ConfigError):  # each file has its own: a run without its file can be sampled
        cascade = load_config(config_path(run))
    last = len(cascade.unets)
    if unet_limit is not None:
        last = cascade.check_number(unet_limit, "unet_limit")
    files = [first, *(read_stage(run, n, allow_unfinished) for n in range(2, last + 1))]
    for file in files:
        sizes, theirs = (c.imagen.image_sizes[: file.unet_number] for c in (cascade, file.config))
        if sizes != theirs:
            raise CheckpointError(
                f"{file.path}: was trained for {' -> '.join(map(str, theirs))} px, and the run is "
                f"of {' -> '.join(map(str, sizes))} px. Put the run's own file there."
            )
    return files
