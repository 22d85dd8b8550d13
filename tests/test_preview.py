"""What is measured on the pictures drawn while training."""

import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import TINY, write_stage

from imagen_scale.config import parse_config
from imagen_scale.data.prepared import prepare
from imagen_scale.files.pictures import LABEL_HEIGHT, MARGIN
from imagen_scale.training import preview
from imagen_scale.training.preview import _drift, show_grid

SIZE = 4
LEVELS = np.array([40, 100, 130, 200], np.uint8)


@pytest.fixture
def prepared():
    """Four grey pictures, one level each."""
    pictures = [np.full((3, SIZE, SIZE), level, np.uint8) for level in LEVELS]
    return SimpleNamespace(images={SIZE: pictures}, source=SimpleNamespace(keys=list("abcd")))


def samples(levels):
    """Grey pictures in [-1, 1]."""
    values = torch.tensor(np.asarray(levels), dtype=torch.float32)
    return (values / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def test_drift_is_the_difference_of_mean_and_spread_in_levels(prepared):
    same = _drift(samples(LEVELS), prepared, SIZE)
    assert same == pytest.approx({"colour_drift_mean": 0, "colour_drift_std": 0}, abs=1e-4)
    brighter = _drift(samples(LEVELS + 20), prepared, SIZE)
    assert brighter == pytest.approx({"colour_drift_mean": 20, "colour_drift_std": 0}, abs=1e-4)
    flat = _drift(samples([80, 80]), prepared, SIZE)
    assert flat["colour_drift_mean"] == pytest.approx(80 - LEVELS.mean(), abs=1e-4)
    assert flat["colour_drift_std"] == pytest.approx(-LEVELS.std(), abs=1e-4)


def test_drift_from_the_pictures_shown(prepared):
    found = _drift(samples([130, 40]), prepared, SIZE, [2, 0])
    assert found == pytest.approx({"colour_drift_mean": 0, "colour_drift_std": 0}, abs=1e-4)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), OSError("no space"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), ValueError("of ours"),
])  # fmt: skip
def test_whatever_a_preview_dies_of_is_said_and_its_memory_given_back(error, monkeypatch, tmp_path):
    class Network:
        pass

    alive, said = [], []

    def draw_grid(*_):
        network = Network()
        alive.append(weakref.ref(network))
        raise error

    monkeypatch.setattr(preview, "draw_grid", draw_grid)
    stage = SimpleNamespace(name="U-Net 1", number=1)
    show_grid(tmp_path, stage, 7, None, None, said.append)
    assert said == [f"U-Net 1: no pictures at step 7: {type(error).__name__}: {error}"]
    assert alive[0]() is None


def test_an_empty_prompt_draws_the_branch_without_text(tmp_path):
    """Guidance, which acts between the two branches, does not act on it."""
    drawn = []
    for scale in (4, 1):
        run = tmp_path / str(scale)
        overrides = ['training.sample_prompts=[""]', f"training.sample_cond_scale={scale}"]
        write_stage(run, 1, overrides=overrides)
        config = parse_config(json.dumps(TINY), overrides=overrides)
        with Image.open(preview.draw_grid(run, 1, 6, prepare(config)).path) as grid:
            drawn.append(np.asarray(grid)[LABEL_HEIGHT + MARGIN :].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
