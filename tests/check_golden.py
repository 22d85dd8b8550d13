"""Compares this network with records of what MinImagen computed.

python tests/check_golden.py FILE...

Prints the largest absolute error of each output and exits 1 beyond tolerance.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from imagen_scale.config import Network, parse_config
from imagen_scale.diffusion.guidance import guide
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.thresholding import dynamic_threshold
from imagen_scale.models.unet import UNet

sys.path.insert(0, str(Path(__file__).parent))
from support.minimagen_tables import minimagen_tables, posterior  # beside this file

TOLERANCE = 2e-5
TOLERANCES = {"p_mean": 2e-4}


def unet_errors(
    config: Network, record: dict[str, torch.Tensor], schedule: NoiseSchedule, percentile: float
) -> dict[str, float]:
    """Largest error of each recorded output of one U-Net."""
    unet = UNet(config).eval()
    unet.load_state_dict(
        {name.removeprefix("weights/"): t for name, t in record.items() if "weights/" in name}
    )

    def given(name: str) -> torch.Tensor | None:
        return record.get(f"inputs/{name}")

    embeds, mask = record["text_embeds"], record["text_mask"]
    x, t, lowres = (
        given("x"),
        given("time"),
        (given("lowres_cond_img"), given("lowres_noise_times")),
    )
    with torch.no_grad():
        cond = unet(x, t, embeds, mask, None, *lowres)
        null = unet(x, t, embeds, mask, torch.zeros(len(x), dtype=torch.bool), *lowres)
        split_null = unet.denoise(x, t, unet.null_text(len(x)), *lowres)
    guided = guide(cond, null, 3.0)
    x_0 = dynamic_threshold(schedule.predicted_x_0("eps", x, t, guided), percentile)
    p_mean, p_variance, p_log_variance = posterior(minimagen_tables(schedule.timesteps), x_0, x, t)
    ours = {
        "forward": cond,
        "forward_null_text": null,
        "forward_cond_scale_3": guided,
        "q_sample": schedule.q_sample(given("x_start"), t, given("noise")),
        "p_mean": p_mean,
        "p_variance": p_variance,
        "p_log_variance": p_log_variance,
    }
    errors = {
        name: (value - record[f"outputs/{name}"]).abs().max().item()
        for name, value in ours.items()
        if f"outputs/{name}" in record
    }
    errors["null_text split"] = (split_null - null).abs().max().item()
    return errors


def check(path: str | Path, device: torch.device | str = "cpu") -> dict[str, float]:
    """Largest error of each output in the record at `path`, computed on `device`."""
    with torch.device(device):
        return _errors(path, torch.empty(0).device)


def _errors(path: str | Path, device: torch.device) -> dict[str, float]:
    with safe_open(path, "pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    imagen, unets = json.loads(metadata["imagen"]), json.loads(metadata["unets"])
    cascade = {key: imagen[key] for key in ("image_sizes", "channels", "text_encoder_name")}
    config = parse_config(
        json.dumps({"imagen": cascade, "unets": unets, "training": {"precision": "fp32"}})
    )
    errors = {}
    schedule = NoiseSchedule.linear(imagen["timesteps"]).to(device)
    for name, value in tensors.items():
        if name.startswith("schedule/"):
            ours = minimagen_tables(schedule.timesteps)[name.removeprefix("schedule/")]
            errors[name] = (ours - value).abs().max().item()
    text = {name.removeprefix("inputs/"): t for name, t in tensors.items() if name[:3] == "inp"}
    for i in range(len(unets)):
        prefix = f"unet{i + 1}/"
        record = text | {
            name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
        }
        stage = config.stage(i + 1, text["text_embeds"].shape[-1]).network
        found = unet_errors(stage, record, schedule, imagen["dynamic_thresholding_percentile"])
        errors |= {prefix + name: error for name, error in found.items()}
    return errors


def main(paths: list[str]) -> int:
    """Prints every error; returns the exit code."""
    failed = False
    for path in paths:
        print(path)
        for name, error in check(path).items():
            tolerance = TOLERANCES.get(name.rpartition("/")[2], TOLERANCE)
            is_bad = not error <= tolerance  # NaN is bad
            failed |= is_bad
            print(f"  {name:40} {error:.2e}{'  BEYOND ' + str(tolerance) if is_bad else ''}")
    return int(failed)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
