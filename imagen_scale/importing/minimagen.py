"""A training folder of MinImagen as a run that samples."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagen_scale.config import dump_config
from imagen_scale.data.encoder import encoder_dim, encoder_fingerprint, encoder_folder
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.files.atomic import write_atomically
from imagen_scale.importing.parameters import convert, read_parameters
from imagen_scale.models.unet import UNet
from imagen_scale.runs.folders import config_path, inference_path
from imagen_scale.runs.inference import InferenceFile, save_inference


class Imported(NamedTuple):
    """The run that was written."""

    run: Path
    sources: list[Path]  # the weights of each U-Net
    notes: list[str]


def import_minimagen(folder: Path, run: Path, *, text_encoder: str | None = None) -> Imported:
    """Writes a run with MinImagen's weights: the same network, so the same pictures.

    Args:
        folder: MinImagen's training folder, with `parameters` and `state_dicts` (or `tmp`).
        run: The run's folder, which must not exist.
        text_encoder: Where the text encoder is; None takes MinImagen's name for it.

    Raises:
        UsageError: If the folder is not MinImagen's or the run exists.
        ConfigError: If the parameters are not allowed here.
        CheckpointError: If weights are damaged, hold code, or do not fit the parameters.
        DataError: If the text encoder is not to be had.
    """
    if run.exists():
        raise UsageError(f"{run}: exists already; name another folder with --run.")
    parameters = read_parameters(folder)
    if not parameters.is_minimagen:
        raise UsageError(f"{folder}: not MinImagen's; only its weights fit this network.")
    sources, notes = find_weights(folder, len(parameters.unets))
    converted = convert(parameters, text_encoder=text_encoder)
    config = converted.config
    encoder = encoder_folder(config.text_encoder)
    width = encoder_dim(config.text_encoder)
    # All are checked before the first is written.
    weights = []
    stages = config.stages(width)
    for stage, source in zip(stages, sources, strict=True):
        with torch.device("meta"):
            expected = UNet(stage.network).state_dict()
        weights.append(checked(read_weights(source), expected, source))
    for stage, state in zip(stages, weights, strict=True):
        file = InferenceFile(
            inference_path(run, stage.number), config, stage.number, width,
            encoder_fingerprint(encoder), step=stage.steps, steps=stage.steps,
        )  # fmt: skip
        save_inference(file, state)
    # Last: a folder with a config.json is a run.
    write_atomically(
        config_path(run),
        lambda temporary: temporary.write_text(dump_config(config), encoding="utf-8"),
    )
    notes.append("the run can be sampled, exported and evaluated; training cannot continue it")
    return Imported(run, sources, [*converted.notes, *notes])


def find_weights(folder: Path, num_unets: int) -> tuple[list[Path], list[str]]:
    """The weights of each U-Net: the best of `state_dicts`, else the last of `tmp`.

    Returns:
        A file for each U-Net, and notes on what was chosen.

    Raises:
        UsageError: Naming the U-Net without weights, or with several files.
    """
    notes: list[str] = []
    for name in ("state_dicts", "tmp"):
        found: dict[int, list[Path]] = {}
        for path in sorted((folder / name).glob("unet_*.pth")):
            if match := re.fullmatch(r"unet_(\d+)_.*", path.stem):
                found.setdefault(int(match[1]), []).append(path)
        if not found:
            continue
        if name == "tmp":
            notes.append("state_dicts is empty: the last weights, from tmp, were taken")
        for index in range(num_unets):
            files = found.get(index, [])
            if len(files) != 1:
                names = ", ".join(path.name for path in files) or "none"
                raise UsageError(
                    f"{folder / name}: one file unet_{index}_*.pth is needed for U-Net "
                    f"{index + 1}; there is {names}."
                )
        return [found[index][0] for index in range(num_unets)], notes
    raise UsageError(f"{folder}: no weights: neither state_dicts nor tmp holds unet_0_*.pth.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict, without running code from the file.

    Raises:
        CheckpointError: If the file is damaged or holds anything else.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own among them, which is not imported here
        if type(error).__name__ == "UnpicklingError":
            raise CheckpointError(
                f"{path}: damaged, or holds more than tensors; it is not loaded, since it could "
                f"run code. Save the plain state_dict of the U-Net."
            ) from None
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: damaged: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: not a state_dict: names and tensors are needed.")
    return state


def checked(
    state: dict[str, Tensor], expected: dict[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """The weights in float32, when they are those of the network.

    Raises:
        CheckpointError: Naming what is missing, left over or of another shape.
    """
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source}: these weights do not fit the parameters beside them: "
            f"{'; '.join(sorted(problems)[:5])}{more}."
        )
    return {name: state[name].float().contiguous() for name in expected}
