"""Samplers against closed forms: Gaussian data, whose best denoiser is known and linear."""

import dataclasses
import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagen_scale.diffusion.names import Sampler, Spacing
from imagen_scale.diffusion.reverse import num_evaluations
from imagen_scale.diffusion.sampler import levels_at, sample
from imagen_scale.diffusion.schedule import NoiseSchedule, PredType, at_time
from imagen_scale.diffusion.solvers import ddim_step, dpmpp_2m_step
from imagen_scale.diffusion.spacing import MIDDLE_SNR, spaced_times, visited_times

MEAN = torch.tensor([0.15, -0.07]).double().view(1, 2, 1, 1)
STD = torch.tensor([0.05, 0.2]).double().view(1, 2, 1, 1)


def fine_schedule():
    """So many times, even in log-SNR, that rounding to them does not show in the order."""
    half_log_snr = torch.linspace(math.log(1e4), math.log(1 / 150), 200_000, dtype=torch.float64)
    schedule = NoiseSchedule.linear(200_000)
    return dataclasses.replace(schedule, abar=(2 * half_log_snr).sigmoid())


FINE = fine_schedule()


def exact_denoiser(schedule):
    def denoiser(x_t, t):
        a = schedule.abar[t].view(-1, 1, 1, 1)
        return MEAN + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (x_t - a.sqrt() * MEAN)

    return denoiser


def run(schedule, x_t, *, steps, draw_noise=None, **options):
    times = visited_times(schedule, steps, options.pop("spacing", "linear"))
    return sample(
        exact_denoiser(schedule), x_t, schedule, times=times,
        threshold=lambda x_0: x_0, draw_noise=draw_noise, **options,
    )  # fmt: skip


def exact_trajectory(schedule, x_t):
    """Where the probability-flow ODE ends: the deviation from the mean shrinks with the marginal's.

    In z = x / alpha and s = sigma / alpha the marginal is N(MEAN, STD^2 + s^2).
    """
    abar = schedule.abar[-1]
    z, variance = x_t / abar.sqrt(), (1 - abar) / abar
    return MEAN + (z - MEAN) * STD / (STD**2 + variance).sqrt()


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
@pytest.mark.parametrize(("sampler", "nominal"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_observed_order_of_accuracy(sampler, nominal, spacing):
    x_t = torch.tensor([-1.5, -0.4, 0.3, 2.0]).double().view(4, 1, 1, 1).expand(4, 2, 1, 1)
    exact = exact_trajectory(FINE, x_t)
    assert exact.abs().max() < 1  # nothing is clamped
    errors = []
    for steps in (80, 160, 320):
        found = run(FINE, x_t, steps=steps, sampler=sampler, spacing=spacing)
        errors.append((found - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert abs(orders[-1] - nominal) < 0.1, (errors, orders)


def impulse_law(schedule, **options):
    """The sampler's exact mean and variance, read off the sampler itself without a random draw.

    Every output is linear in the start and in each noise that is drawn. Row 0 of the batch has no
    noise at all: the mean. Row i sees only the i-th, which is one: its gain.
    """
    steps = options["steps"]
    rows = steps + 2
    drawn = 0

    def draw_noise():
        nonlocal drawn
        drawn += 1
        noise = torch.zeros(rows, 2, 1, 1).double()
        noise[drawn] = 1
        return noise

    result = run(schedule, draw_noise(), draw_noise=draw_noise, **options)
    mean = result[:1]
    return mean, (result[1:] - mean).square().sum(0, keepdim=True), drawn


def exact_law(schedule):
    """Mean and variance where the exact reverse process ends when it starts from N(0, 1)."""
    a = schedule.abar[-1]
    gain = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)
    mean = MEAN - gain * a.sqrt() * MEAN
    return mean, gain**2 + STD**2 * (1 - a) / (a * STD**2 + 1 - a)


def test_ddpm_with_all_steps_has_the_exact_posterior_law():
    """Ancestral sampling as a recursion of mean and variance, step by step (Ho et al., eq. 7)."""
    schedule = NoiseSchedule.linear(200)
    abar = schedule.abar
    mean, variance = torch.zeros_like(MEAN), torch.ones_like(STD)
    for t in range(199, -1, -1):
        a = abar[t]
        previous = abar[t - 1] if t else abar.new_ones(())
        beta = 1 - a / previous
        gain = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)
        on_x0 = previous.sqrt() * beta / (1 - a)
        slope = (a / previous).sqrt() * (1 - previous) / (1 - a) + on_x0 * gain
        mean = slope * mean + on_x0 * (MEAN - gain * a.sqrt() * MEAN)
        variance = slope**2 * variance + beta * (1 - previous) / (1 - a)
    found_mean, found_variance, drawn = impulse_law(schedule, steps=200, sampler="ddpm")
    assert drawn == 200  # the start and one for every step but the last
    torch.testing.assert_close(found_mean, mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(found_variance, variance, atol=0, rtol=1e-9)


@pytest.mark.parametrize(("sampler", "nominal"), [("ddpm", 1), ("dpmpp_2m_sde", 2)])
def test_the_law_of_stochastic_samplers_approaches_the_exact_one(sampler, nominal):
    mean, variance = exact_law(FINE)
    errors = []
    for steps in (80, 160, 320):
        found_mean, found, _ = impulse_law(FINE, steps=steps, sampler=sampler, spacing="logsnr")
        torch.testing.assert_close(found_mean, mean, atol=5 / steps**nominal, rtol=0)
        errors.append((found / variance - 1).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert abs(orders[-1] - nominal) < 0.1, (errors, orders)


def test_ddim_with_eta_1_is_ddpm():
    schedule = NoiseSchedule.linear(100)
    ddpm = impulse_law(schedule, steps=10, sampler="ddpm")
    ddim = impulse_law(schedule, steps=10, sampler="ddim", eta=1.0)
    for ours, theirs in zip(ddim, ddpm, strict=True):
        assert ours == theirs if isinstance(ours, int) else torch.equal(ours, theirs)


@given(times=st.tuples(st.integers(0, 999), st.integers(0, 999)).filter(lambda t: t[0] != t[1]))
def test_a_first_step_of_dpm_solver_is_ddim_and_of_its_sde_the_ddpm_posterior(times):
    x_t, x_0, noise = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64).unbind()
    now, then = levels_at(NoiseSchedule.linear(1000), sorted(times, reverse=True))
    ode = dpmpp_2m_step(x_t, x_0, now, then, past=None, noise=None)
    torch.testing.assert_close(ode, ddim_step(x_t, x_0, now, then, eta=0, noise=None))
    sde = dpmpp_2m_step(x_t, x_0, now, then, past=None, noise=noise)
    torch.testing.assert_close(sde, ddim_step(x_t, x_0, now, then, eta=1, noise=noise))


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_every_sampler_ends_in_what_a_certain_denoiser_predicts(sampler):
    """Where the data are one picture, each sampler gives that picture; thresholding counts."""
    schedule, target = NoiseSchedule.linear(100), torch.rand(2, 3, 4, 4).double() * 3
    asked = 0

    def denoiser(x_t, t):
        nonlocal asked
        asked += 1
        return target

    for steps in (1, 2, 7):
        asked = 0
        found = sample(
            denoiser, torch.randn_like(target), schedule, times=spaced_times(100, steps),
            sampler=sampler, threshold=lambda x_0: x_0.clamp(-1, 1),
            draw_noise=lambda: torch.randn_like(target),
        )  # fmt: skip
        torch.testing.assert_close(found, target.clamp(-1, 1), atol=1e-9, rtol=0)
        assert asked == num_evaluations(sampler, steps)


SCHEDULES = {
    "linear": NoiseSchedule.linear(1000),
    "cosine": NoiseSchedule.cosine(1000),
    "shifted": NoiseSchedule.cosine(1000).shifted(1 / 16),
    "linear to noise": NoiseSchedule.linear(1000).with_zero_terminal_snr(),
    "cosine to noise": NoiseSchedule.cosine(1000).with_zero_terminal_snr(),
}
EXACT_ENOUGH = {"ddim": 2e-2, "ddpm": 2e-2, "dpmpp_2m": 4e-3, "dpmpp_2m_sde": 4e-3, "heun": 4e-3}


@pytest.mark.parametrize("sampler", get_args(Sampler))
@pytest.mark.parametrize("pred_type", get_args(PredType))
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_network_of_any_recipe_gives_the_data(name, pred_type, sampler):
    """100 steps to Gaussian data, even in log-SNR, with the x_0 that the prediction implies."""
    schedule = SCHEDULES[name]
    if pred_type == "eps" and "to noise" in name:
        return  # refused by the configuration
    exact = exact_denoiser(schedule)

    def denoiser(x_t, t):
        x_0 = exact(x_t, t)
        eps = (x_t - at_time(schedule.alpha, t, x_t) * x_0) / at_time(schedule.sigma, t, x_t)
        network = schedule.target(pred_type, x_0, t, eps)
        return schedule.predicted_x_0(pred_type, x_t, t, network)

    rows, drawn = 102, 0

    def draw_noise():  # as in `impulse_law`
        nonlocal drawn
        drawn += 1
        noise = torch.zeros(rows, 2, 1, 1).double()
        noise[drawn] = 1
        return noise

    result = sample(
        denoiser, draw_noise(), schedule, times=visited_times(schedule, 100, "logsnr"),
        sampler=sampler, threshold=lambda x_0: x_0, draw_noise=draw_noise,
    )  # fmt: skip
    mean = result[:1]
    spread = (result[1:] - mean).square().sum(0, keepdim=True).sqrt()
    assert result.isfinite().all()
    limit = EXACT_ENOUGH[sampler]
    torch.testing.assert_close(mean, MEAN, atol=limit, rtol=0)
    torch.testing.assert_close(spread, STD, atol=limit, rtol=0)


TO_THE_END = ("linear", "logsnr", "karras")  # the others' last step goes to the clean picture


@given(steps=st.integers(1, 300), spacing=st.sampled_from(get_args(Spacing)))
def test_spacings_begin_with_noise_alone_where_a_schedule_ends_so(steps, spacing):
    for name, schedule in SCHEDULES.items():
        times = visited_times(schedule, steps, spacing)
        assert len(times) == steps and times[0] == 999
        assert all(a > b for a, b in pairwise(times)), name
        if spacing in TO_THE_END and steps > 1:
            assert times[-1] == 0
    if spacing in ("logsnr", "karras") and steps > 1:  # the others as if it ended just before
        without = NoiseSchedule.of_abar(SCHEDULES["linear to noise"].abar[:-1])
        others = visited_times(SCHEDULES["linear to noise"], min(steps, 8), spacing)[1:]
        assert others == visited_times(without, min(steps, 8), spacing)[1:]


@given(
    timesteps=st.integers(21, 1200),
    steps=st.integers(1, 1300),
    spacing=st.sampled_from(get_args(Spacing)),
)
def test_spacings_visit_distinct_falling_times_from_the_noisiest(timesteps, steps, spacing):
    times = visited_times(NoiseSchedule.linear(timesteps), steps, spacing)
    assert len(times) == min(steps, timesteps)
    assert times[0] == timesteps - 1
    assert all(a > b for a, b in pairwise(times))
    assert times[-1] >= 0
    if (spacing in TO_THE_END and steps > 1) or steps >= timesteps:
        assert times[-1] == 0


def test_spacings_are_even_in_what_they_say():
    def spread(values):
        gaps = torch.tensor(values).double().diff()
        return ((gaps.max() - gaps.min()) / gaps.mean()).abs()

    for spacing, measure in {
        "linear": lambda level: level.time,
        "trailing": lambda level: level.time,
        "logsnr": lambda level: level.half_log_snr,
        "karras": lambda level: (level.sigma / level.alpha) ** (1 / 7),
    }.items():
        times = visited_times(FINE, 20, spacing)
        assert spread([measure(level) for level in levels_at(FINE, times)]) < 2e-3, spacing
    half = [level.half_log_snr for level in levels_at(FINE, visited_times(FINE, 20, "middle")[1:])]
    assert spread(half) < 2e-3
    gap = (half[-1] - half[0]) / 18
    for end, snr in zip((half[0] - gap, half[-1] + gap), MIDDLE_SNR, strict=True):
        assert math.exp(2 * end) == pytest.approx(snr, rel=1e-2)
    assert visited_times(NoiseSchedule.linear(1000), 4, "trailing") == [999, 749, 499, 249]
