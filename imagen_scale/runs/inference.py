"""Inference files: a stage's averaged weights with all that sampling needs to know."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.config import Config, dump_config, parse_config
from imagen_scale.errors import CheckpointError
from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.tensors import write_tensors
from imagen_scale.runs.folders import inference_path

INFERENCE_FORMAT = "imagen-scale inference 1"


# Inference files --------------------------------------------------------------------------------


class InferenceFile(NamedTuple):
    """What the header of an inference file says."""

    path: Path
    config: Config
    unet_number: int
    text_embed_dim: int
    text_fingerprint: str
    step: int
    steps: int

    @property
    def is_finished(self) -> bool:
        """Whether training had reached its last step."""
        return self.step >= self.steps


def save_inference(
    path: Path,
    weights: "Mapping[str, Tensor]",
    *,
    config: Config,
    unet_number: int,
    text_embed_dim: int,
    text_fingerprint: str,
    step: int,
    steps: int,
) -> None:
    """Writes EMA weights with the configuration inside; one file is all that sampling needs."""
    stream_inference(
        path,
        {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()},
        weights.items(),
        config=config,
        unet_number=unet_number,
        text_embed_dim=text_embed_dim,
        text_fingerprint=text_fingerprint,
        step=step,
        steps=steps,
    )


def stream_inference(
    path: Path,
    shapes: "Mapping[str, tuple[torch.dtype, Iterable[int]]]",
    weights: "Iterable[tuple[str, Tensor]]",
    *,
    config: Config,
    unet_number: int,
    text_embed_dim: int,
    text_fingerprint: str,
    step: int,
    steps: int,
) -> None:
    """`save_inference` of weights that come one at a time, in the order of `shapes`."""
    metadata = {
        "format": INFERENCE_FORMAT,
        "config": dump_config(config),
        "unet_number": str(unet_number),
        "text_embed_dim": str(text_embed_dim),
        "text_fingerprint": text_fingerprint,
        "step": str(step),
        "steps": str(steps),
    }
    write_atomically(path, lambda temporary: write_tensors(temporary, shapes, weights, metadata))


def read_inference(path: Path) -> InferenceFile:
    """Reads the header of an inference file.

    Raises:
        CheckpointError: If it is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: not found.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}). Restore it from a checkpoint.") from None
    if metadata.get("format") != INFERENCE_FORMAT:
        raise CheckpointError(f"{path}: not an inference file of imagen-scale.")
    return InferenceFile(
        path=path,
        config=parse_config(metadata["config"], source=str(path)),
        unet_number=int(metadata["unet_number"]),
        text_embed_dim=int(metadata["text_embed_dim"]),
        text_fingerprint=metadata["text_fingerprint"],
        step=int(metadata["step"]),
        steps=int(metadata["steps"]),
    )


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
            + (f", or sample the earlier stages with --unet-limit {unet_number - 1}."
               if unet_number > 1 else ".")
        )  # fmt: skip
    file = read_inference(path)
    if not (file.is_finished or allow_unfinished):
        raise CheckpointError(
            f"{run}: U-Net {unet_number} is half-trained ({file.step} of {file.steps} steps). "
            f"Run the training command again to finish it, or sample it as it is with "
            f"--allow-unfinished."
        )
    return file
