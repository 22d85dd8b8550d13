"""What a training left in its folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def losses(run_dir: Path, unet: int = 1) -> dict[int, float]:
    """The training losses of one U-Net as metrics.jsonl has them, by step."""
    lines = (Path(run_dir) / f"unet{unet}" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights(run: Path, unet: int = 1) -> dict[str, torch.Tensor]:
    """The weights to sample from."""
    return load_file(run / f"unet{unet}" / "inference.safetensors")


def assert_same_curve(run: Path, reference: Path, unet: int, tolerance: float = 2e-6) -> None:
    """All six steps, each with the reference's loss."""
    ours, theirs = losses(run, unet), losses(reference, unet)
    assert list(ours) == list(theirs) == [1, 2, 3, 4, 5, 6]
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], abs=tolerance), f"step {step}"
