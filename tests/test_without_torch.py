"""The mathematics of sampling over numpy's arrays, where torch cannot be imported."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from imagen_scale.diffusion.guidance import guide
from imagen_scale.diffusion.sampler import sample
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.spacing import visited_times

SAMPLERS = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun")
SCHEDULES = {
    "linear": NoiseSchedule.linear(100),
    "ends in noise": NoiseSchedule.cosine(100).with_zero_terminal_snr(),
}
# Importing torch raises here, whoever does it.
PROGRAM = """
import math, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not to be had here")
sys.meta_path.insert(0, NoTorch())
import numpy as np
from imagen_scale.diffusion.guidance import guide
from imagen_scale.diffusion.reverse import reverse
from imagen_scale.diffusion.solvers import Level
from imagen_scale.diffusion.spacing import visited_times

given = np.load(sys.argv[1])
made = {}
for name in sys.argv[3].split(","):
    signal = given[name].tolist()
    class Schedule:
        timesteps = len(signal)
    Schedule.signal = signal
    times = visited_times(Schedule, 7, "logsnr")
    levels = [Level(t, math.sqrt(signal[t]), math.sqrt(1 - signal[t])) for t in times]
    for sampler in sys.argv[4].split(","):
        noise = iter(given["noise"])
        def predict(x, level):
            return guide(np.tanh(x), np.sin(x) * (level.time / 100), 2.0)
        made[f"{name} {sampler}"] = reverse(
            predict, next(noise), levels, sampler=sampler, eta=0.5,
            draw_noise=lambda: next(noise))
np.savez(sys.argv[2], **made)
"""


@pytest.fixture(scope="module")
def noise():
    return torch.randn(9, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(noise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    signals = {name: schedule.abar.numpy() for name, schedule in SCHEDULES.items()}
    np.savez(folder / "given.npz", noise=noise.numpy(), **signals)
    command = [sys.executable, "-c", PROGRAM, str(folder / "given.npz"), str(folder / "made.npz"),
               ",".join(SCHEDULES), ",".join(SAMPLERS)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "made.npz")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_numpy_takes_the_steps_that_torch_takes(made, noise, name, sampler):
    draws, schedule = iter(noise), SCHEDULES[name]

    def denoiser(x, t):
        return guide(x.tanh(), x.sin() * (t[0].item() / 100), 2.0)

    expected = sample(
        denoiser, next(draws), schedule, times=visited_times(schedule, 7, "logsnr"),
        sampler=sampler, eta=0.5, threshold=lambda x_0: x_0, draw_noise=lambda: next(draws),
    )  # fmt: skip
    found = made[f"{name} {sampler}"]
    assert found.dtype == np.float32 and math.isfinite(found.sum())
    np.testing.assert_allclose(found.clip(-1, 1), expected.numpy(), atol=1e-5)
