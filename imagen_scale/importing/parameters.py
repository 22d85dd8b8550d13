"""Parameters of MinImagen and imagen-pytorch as one of our configurations, with notes.

Nothing is dropped in silence: each key that has no counterpart, and each value that means
something else here, is named in a note.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.config import Config, ImagenConfig, UnetConfig, parse_config
from imagen_scale.config.strict_json import parse_json
from imagen_scale.errors import UsageError

OURS_IMAGEN = frozenset(ImagenConfig.model_fields)
OURS_UNET = frozenset(UnetConfig.model_fields)
# imagen-pytorch's own defaults, where leaving a key out would mean something else here.
PYTORCH_IMAGEN = {"timesteps": 1000, "cond_drop_prob": 0.5, "dynamic_thresholding_percentile": 0.95}
PYTORCH_UNET = {"dim_mults": [1, 2, 4, 8], "attn_heads": 16, "attend_at_middle": True}
PYTORCH_KEYS = {"noise_schedules", "pred_objectives", "random_crop_sizes", "beta_schedule"}
PREDICTIONS = {"noise": "eps", "v": "v", "x_start": "x0"}


class Parameters(NamedTuple):
    """What was read, before it is turned into a configuration."""

    source: str
    is_minimagen: bool
    imagen: dict[str, Any]
    unets: list[dict[str, Any]]
    others: dict[str, Any]  # what stands beside them


class Converted(NamedTuple):
    """A configuration, and what a person should know about it."""

    config: Config
    notes: list[str]


def read_parameters(path: Path) -> Parameters:
    """Reads a MinImagen folder, or imagen-pytorch's JSON file.

    Args:
        path: MinImagen's training folder or its `parameters` folder; or a JSON file with an object
            `imagen` that holds `unets`, as the `imagen` command of imagen-pytorch takes it.

    Raises:
        UsageError: If it is neither, naming what was looked for.
    """
    if path.is_dir():
        folder = path / "parameters" if (path / "parameters").is_dir() else path
        return _read_minimagen(folder)
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder.")
    data = _read_json(path)
    imagen = data.get("imagen", data)
    holder = imagen if isinstance(imagen, dict) and "unets" in imagen else data
    unets = holder.get("unets")
    if not isinstance(imagen, dict) or not isinstance(unets, list):
        raise UsageError(
            f'{path}: no parameters found; an object "imagen" with a list "unets" is looked for, '
            f"or give MinImagen's folder `parameters`."
        )
    kind = data.get("type", "original")
    if kind != "original" or imagen.get("video"):
        what = "video" if imagen.get("video") else kind
        raise UsageError(f"{path}: {what!r} models have no counterpart here; only images, DDPM.")
    if not all(isinstance(unet, dict) for unet in unets):
        raise UsageError(f"{path}: imagen.unets: a list of objects is needed.")
    for number, unet in enumerate(unets, start=1):
        if unet.get("is_null"):
            raise UsageError(
                f"{path}: U-Net {number} is a NullUnet. Describe every U-Net; `--unet N` trains "
                f"one of them alone."
            )
    rest = {key: value for key, value in imagen.items() if key != "unets"}
    is_minimagen = not PYTORCH_KEYS & set(rest) and "type" not in data and _fits_minimagen(unets)
    taken = ("imagen", "type", *(["unets"] if holder is data else []))
    others = {} if imagen is data else {key: data[key] for key in data if key not in taken}
    return Parameters(str(path), is_minimagen, rest, unets, others)


def _fits_minimagen(unets: list[dict[str, Any]]) -> bool:
    return all(set(unet) <= OURS_UNET for unet in unets)


def _read_minimagen(folder: Path) -> Parameters:
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("unet_*.json")):
        if match := re.fullmatch(r"unet_(\d+)_.*", path.stem):
            files.setdefault(int(match[1]), []).append(path)
    cascade = sorted(folder.glob("imagen*.json"))
    if not files or not cascade:
        raise UsageError(
            f"{folder}: MinImagen's parameters are imagen_params_*.json and unet_0_params_*.json, "
            f"unet_1_params_*.json, ...; they are not all there."
        )
    for found in (cascade, *files.values()):
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UsageError(f"{folder}: {names}: several for one part; keep the one to be taken.")
    if sorted(files) != list(range(len(files))):
        raise UsageError(f"{folder}: U-Nets {sorted(files)}: they are counted from 0 without gaps.")
    unets = [_read_json(files[i][0]) for i in range(len(files))]
    return Parameters(str(folder), True, _read_json(cascade[0]), unets, {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read as JSON: {reason}.") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: holds a {type(data).__name__}; an object is needed.")
    return data


def convert(parameters: Parameters, *, text_encoder: str | None = None) -> Converted:
    """Turns parameters into a checked configuration.

    Args:
        parameters: From `read_parameters`.
        text_encoder: Another place of the text encoder, e.g. a folder; None keeps the name.

    Raises:
        ConfigError: If a value is not allowed here, naming the key.
    """
    notes: list[str] = []
    imagen, unets = dict(parameters.imagen), [dict(unet) for unet in parameters.unets]
    data: dict[str, Any] = {}
    if not parameters.is_minimagen:
        imagen = {**PYTORCH_IMAGEN, **imagen}
        unets = [{**PYTORCH_UNET, **unet} for unet in unets]
        data["text"] = {"encoder": imagen.pop("text_encoder_name", "google/t5-v1_1-base")}
        _map_pytorch(imagen, unets, notes)
        if _is_min_snr(imagen, notes):
            data["training"] = {"loss_weight": "min_snr"}
    if text_encoder is not None:
        data["text"] = {"encoder": text_encoder}
        notes.append(f"text.encoder: {text_encoder}, as asked")
    if isinstance(imagen.get("image_sizes"), int):
        imagen["image_sizes"] = [imagen["image_sizes"]]
    _map_both(imagen, unets, notes)
    data["imagen"] = _known(imagen, OURS_IMAGEN, "imagen", notes)
    data["unets"] = [_known(unet, OURS_UNET, f"unets.{i}", notes) for i, unet in enumerate(unets)]
    data["data"] = {"source": "folder", "path": "data/pictures"}
    notes.append("data: write where your pictures are; data/pictures is only a name")
    notes += [
        f"{key}: {json.dumps(value)} is left out; data and training have sections of their own"
        for key, value in parameters.others.items()
    ]
    notes.append("training, memory: else at their defaults")
    return Converted(parse_config(json.dumps(data), source=parameters.source), notes)


def _map_both(imagen: dict[str, Any], unets: list[dict[str, Any]], notes: list[str]) -> None:
    """What both say in another way than a checked configuration does."""
    width = imagen.get("text_embed_dim")
    for i, unet in enumerate(unets):
        # `Imagen` sets these itself, whatever the U-Net was given.
        if unet.get("lowres_cond") not in (None, i > 0):
            notes.append(
                f"unets.{i}.lowres_cond: {json.dumps(unet['lowres_cond'])} becomes null, since "
                f"`Imagen` overrides it"
            )
            unet["lowres_cond"] = None
        for key in ("channels", "channels_out"):
            if unet.get(key) not in (None, imagen.get("channels", 3)):
                notes.append(
                    f"unets.{i}.{key}: {unet[key]} is imagen.channels, as `Imagen` sets it"
                )
                unet[key] = imagen.get("channels", 3)
        if unet.get("text_embed_dim") != width:
            # The cascade's decides; null takes the encoder's.
            unet["text_embed_dim"] = width
    if len(unets) > 1:
        notes.append(
            "sampling: the low-resolution picture is normalised and then noised, as in training; "
            "MinImagen noises it first when sampling, so later stages see another picture"
        )


def _map_pytorch(imagen: dict[str, Any], unets: list[dict[str, Any]], notes: list[str]) -> None:
    """imagen-pytorch's own keys."""
    schedules = _schedules(imagen.get("noise_schedules", "cosine"), len(unets))
    for i, unet in enumerate(unets):
        prediction = _of_unet(imagen.get("pred_objectives", "noise"), i)
        unet["pred_type"] = PREDICTIONS.get(prediction, "v")
        if prediction not in PREDICTIONS:
            notes.append(f"unets.{i}.pred_type: v, since there is no {prediction!r}")
        schedule = schedules[i]
        if schedule == "cosine":
            unet["schedule"] = {"type": "cosine"}
        elif schedule != "linear":
            notes.append(f"unets.{i}: the noise schedule is linear here, not {schedule!r}")
        crop = _of_unet(imagen.get("random_crop_sizes"), i)
        if crop is not None:
            unet["crop"] = crop
        head = unet.pop("attn_dim_head", 32)
        if head != 64:
            notes.append(f"unets.{i}: attention heads are 64 wide here, not {head}")
    thresholded = imagen.pop("dynamic_thresholding", True)
    dynamic = {bool(_of_unet(thresholded, i)) for i in range(len(unets))}
    if dynamic == {False}:
        imagen["dynamic_thresholding_percentile"] = None
    elif False in dynamic:
        notes.append("imagen.dynamic_thresholding_percentile: all U-Nets have one here, or none")
    for key in ("pred_objectives", "noise_schedules", "random_crop_sizes"):
        imagen.pop(key, None)
    notes.append("the networks differ inside: these parameters describe a new training")


def _is_min_snr(imagen: dict[str, Any], notes: list[str]) -> bool:
    """Whether the loss is weighted by min(SNR, 5), as imagen-pytorch does unless told otherwise."""
    is_weighted, gamma = imagen.pop("min_snr_loss_weight", True), imagen.pop("min_snr_gamma", 5)
    if not is_weighted:
        return False
    if imagen.get("loss_type", "l2") != "l2":
        notes.append("imagen.min_snr_loss_weight: errors other than squared ones are not weighted")
        return False
    if gamma != 5:
        notes.append(f"imagen.min_snr_gamma: {gamma} is 5 here")
    return True


def _schedules(given: Any, count: int) -> list[Any]:
    """Of each U-Net: the first two take cosine and the others linear where nothing is given.

    So it is in imagen-pytorch, where one name counts for the first alone.
    """
    names = given if isinstance(given, list) else [given]
    names = [*names, *["cosine"] * (2 - len(names))]
    return [*names, *["linear"] * (count - len(names))]


def _of_unet(value: Any, index: int) -> Any:
    if not isinstance(value, list):
        return value
    return value[index] if index < len(value) else None


def _known(
    section: dict[str, Any], known: frozenset[str], where: str, notes: list[str]
) -> dict[str, Any]:
    """The keys that there are here; the others are noted."""
    for key in section.keys() - known:
        notes.append(
            f"{where}.{key}: {json.dumps(section[key])} has no counterpart and is left out"
        )
    return {key: value for key, value in section.items() if key in known}
