"""A cascade of two tiny U-Nets: its configuration, and a run of it that was never trained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TINY = {
    "imagen": {"image_sizes": [16, 32], "text_encoder_name": "minilm", "timesteps": 100},
    "unets": [
        {"dim": 8, "dim_mults": [1, 2], "layer_attns": [False, True],
         "layer_cross_attns": [False, True], "attn_heads": 2, "max_text_len": 8},
        {"dim": 8, "dim_mults": [1, 2], "layer_attns": False,
         "layer_cross_attns": [False, True], "max_text_len": 8, "pred_type": "v"},
    ],
    "data": {"source": "emoji", "names": ["red heart", "sun", "pizza", "rocket", "key", "house"]},
    "training": {"steps": 6, "global_batch": 8, "lr": 1e-3, "warmup_steps": 2,
                 "precision": "fp32", "checkpoint_every": 3, "val_every": 3, "sample_every": 6,
                 "sample_steps": 2, "sample_prompts": ["red heart"]},
    "logging": {"log_every": 1},
}  # fmt: skip


def write_stage(
    run: Path,
    number: int,
    *,
    seed: int = 0,
    noise: float = 0.05,
    step: int = 6,
    fingerprint: str | None = None,
    origin: str | None = None,
    change: Callable[[Any], None] | None = None,
    overrides: Sequence[str] = (),
) -> Any:
    """Writes the inference file of one stage of TINY with random weights.

    Args:
        run: Folder of the run.
        number: Of the stage, from 1.
        seed: Of the weights.
        noise: Added to every parameter, so that no norm is the identity.
        step: Of 6; fewer is half-trained.
        fingerprint: Of another text encoder than there is.
        origin: Hash of the file that it began with.
        change: Called with the network before it is written.
        overrides: Changes to TINY, as `key=value`.

    Returns:
        The network that it holds.
    """
    import torch

    from imagen_scale.config import dump_config, parse_config
    from imagen_scale.data.encoder import encoder_fingerprint, encoder_folder
    from imagen_scale.models.unet import UNet
    from imagen_scale.runs.folders import inference_path
    from imagen_scale.runs.inference import InferenceFile, save_inference

    config = parse_config(json.dumps(TINY), overrides=overrides)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(dump_config(config))
    torch.manual_seed(10 * seed + number)
    unet = UNet(config.stage(number, 384).network).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter += noise * torch.randn_like(parameter)
    if change:
        change(unet)
    file = InferenceFile(
        inference_path(run, number), config, number, text_embed_dim=384,
        text_fingerprint=fingerprint or encoder_fingerprint(encoder_folder("minilm")),
        step=step, steps=6, origin_sha256=origin,
    )  # fmt: skip
    save_inference(file, unet.state_dict())
    return unet


def write_run(run: Path, *, overrides: Sequence[str] = ()) -> Path:
    """Writes both stages; gives the run's folder back."""
    for number in (1, 2):
        write_stage(run, number, overrides=overrides)
    return run


def write_checkpoint(run: Path, number: int, step: int, *, shares: int = 2) -> dict[str, Any]:
    """Writes a checkpoint of one stage of TINY: every parameter cut in two, none beside its half.

    Args:
        run: With the stage's inference file.
        number: Of the stage, from 1.
        step: Of the checkpoint; its averages are drawn from it.
        shares: Files, of so many ranks.

    Returns:
        The averages that it holds.
    """
    import torch

    from imagen_scale.files.tensors import write_tensors
    from imagen_scale.models.unet import UNet
    from imagen_scale.runs import checkpoint
    from imagen_scale.runs.folders import inference_path, unet_dir
    from imagen_scale.runs.inference import read_inference

    config = read_inference(inference_path(run, number)).config
    torch.manual_seed(step)
    unet = UNet(config.stage(number, 384).network)
    averages = {name: torch.randn(value.shape) / 9 for name, value in unet.named_parameters()}
    staging = checkpoint.staging_folder(unet_dir(run, number), step)
    for rank in range(shares):
        fragments, pieces, offset = [], [], 0
        for name, value in reversed(averages.items()):
            start, stop = (value.numel() * one // shares for one in (rank, rank + 1))
            fragments.append((name, start, stop - start, offset))
            pieces.append(value.flatten()[start:stop])
            offset += stop - start
        whole = torch.cat(pieces)
        tensors = {"0/master": torch.zeros_like(whole), "0/ema": whole}
        write_tensors(
            staging / f"rank_{rank:04d}.safetensors",
            {name: (value.dtype, value.shape) for name, value in tensors.items()},
            tensors.items(),
            {"optimizer": "adamw", "fragments": json.dumps([fragments]), "plain": "[{}]"},
        )
    checkpoint.commit(staging, step, {})
    return averages
