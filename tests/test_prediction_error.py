"""The error of the clean picture that a network predicts, the same measure for all of them."""

import pytest
import torch
from support.tiny import write_run

from imagen_scale.config import ScheduleConfig
from imagen_scale.diffusion.lowres import resize
from imagen_scale.diffusion.prediction_error import LOG_SNRS, nearest_times
from imagen_scale.evaluation.prediction import x_0_errors
from imagen_scale.runs.inference import read_stage
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.stage import Inputs, Stage
from imagen_scale.sampling.stage_schedule import noise_schedule


class Constant:
    """A runtime that predicts the same picture from everything."""

    max_batch = None

    def __init__(self, pictures):
        self.pictures, self.bound = pictures, []

    def bind(self, cond):
        self.bound.append(cond)
        return lambda x_t, t: self.pictures[: len(x_t)]


@pytest.mark.parametrize("kind", [None, {"type": "cosine"}, {"zero_terminal_snr": True}])
def test_noise_levels_are_the_same_for_every_schedule(kind):
    written = None if kind is None else ScheduleConfig(**kind)
    schedule = noise_schedule(1000, 64, written)
    found = schedule.snr.log()[nearest_times(schedule)]
    assert (found - LOG_SNRS).abs().max() < 0.4
    assert (found.diff() > 0).all()


def test_the_error_of_the_predicted_picture(tmp_path):
    write_run(tmp_path / "run")
    real = torch.rand(3, 3, 32, 32) * 2 - 1
    text = Text(torch.zeros(3, 4, 384), torch.ones(3, 4, dtype=torch.bool))
    inputs = Inputs(text, [0, 1, 2], resize(real, 16))
    stage = Stage(read_stage(tmp_path / "run", 2, False), torch.device("cpu"))
    known = x_0_errors(stage, real, inputs)
    assert known.shape == (3, len(LOG_SNRS))
    assert torch.equal(known, x_0_errors(stage, real, inputs))
    # By picture and seed: whatever else is in the batch.
    assert torch.allclose(known[1:2], x_0_errors(stage, real[1:2], inputs.part(1, 2)), atol=1e-5)
    for pictures, expected in ((real, 0.0), (real + 0.5, 0.25)):
        stage.runtime = Constant(pictures)
        assert torch.allclose(x_0_errors(stage, real, inputs), torch.tensor(expected), atol=1e-6)
        assert stage.runtime.bound[0].cond_scale == 1.0
        assert stage.runtime.bound[0].lowres_img.shape == real.shape
