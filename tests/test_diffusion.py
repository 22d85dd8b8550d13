"""Diffusion mathematics against closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.minimagen_tables import minimagen_tables, posterior

from imagen_scale.diffusion.guidance import branches, guide
from imagen_scale.diffusion.loss import image_loss
from imagen_scale.diffusion.lowres import resize, shrink_and_enlarge
from imagen_scale.diffusion.sampler import levels_at, sample
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.solvers import ddim_step
from imagen_scale.diffusion.spacing import spaced_times
from imagen_scale.diffusion.thresholding import abs_quantile, dynamic_threshold


@given(timesteps=st.integers(21, 1500))
def test_schedule_properties(timesteps):
    schedule = NoiseSchedule.linear(timesteps)
    abar = schedule.abar
    assert ((abar > 0) & (abar < 1)).all()
    assert (abar.diff() < 0).all()  # so the signal-to-noise ratio falls
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(timesteps))
    torch.testing.assert_close(schedule.alpha.double() ** 2, abar, atol=1e-6, rtol=0)
    # The posterior keeps the marginals: its mean of a noiseless x_t is a noiseless x_t-1.
    tables = minimagen_tables(timesteps)
    for values in tables.values():
        assert values.isfinite().all()
    abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
    mean = tables["posterior_mean_coef1"] + tables["posterior_mean_coef2"] * abar.sqrt()
    torch.testing.assert_close(mean.double(), abar_prev.sqrt(), atol=1e-5, rtol=0)


def test_the_clean_picture_is_recovered_from_eps_and_from_v():
    schedule = NoiseSchedule.linear(1000)
    x_0, eps = torch.randn(2, 64, 3, 4, 4).unbind()
    t = torch.linspace(0, 999, 64).long()
    x_t = schedule.q_sample(x_0, t, eps)
    v = schedule.target("v", x_0, t, eps)
    recovered = schedule.predicted_x_0("v", x_t, t, v)
    torch.testing.assert_close(recovered, x_0, atol=1e-5, rtol=0)  # at every time
    assert schedule.target("eps", x_0, t, eps) is eps
    early = t < 700  # beyond, float32 cannot undo the division by a small alpha
    recovered = schedule.predicted_x_0("eps", x_t, t, eps)
    torch.testing.assert_close(recovered[early], x_0[early], atol=1e-3, rtol=0)


@given(q=st.floats(0.01, 1.0), size=st.integers(1, 200))
def test_quantile_equals_torchs(q, size):
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(abs_quantile(x, q), x.abs().quantile(q, dim=1), atol=1e-6, rtol=1e-5)


def test_quantile_takes_more_than_torchs_limit():
    x = torch.zeros(1, 2**24 + 8)
    x[0, -1] = 1
    assert abs_quantile(x, 1.0).item() == 1


def test_dynamic_threshold_only_shrinks_what_exceeds_one():
    inside = torch.rand(2, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(dynamic_threshold(inside, 0.9), inside)
    out = dynamic_threshold(inside * 7, 0.9)
    assert out.abs().max() == 1
    assert (out.abs() < 1).any()


def test_guidance_scales():
    cond, null = torch.randn(2, 1, 3, 4, 4).unbind()
    torch.testing.assert_close(guide(cond, null, 1.0), cond)
    torch.testing.assert_close(guide(cond, null, 0.0), null)
    torch.testing.assert_close(guide(cond, null, 3.0), 3 * cond - 2 * null)
    assert [branches(scale) for scale in (0, 1, 0.5, 3.0)] == [
        {"null"}, {"text"}, {"text", "null"}, {"text", "null"}
    ]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "expected"), [("l2", 4.0), ("l1", 2.0), ("huber", 1.5)])
def test_losses(loss_type, expected):
    loss = image_loss(torch.full((2, 3, 4, 4), 2.0), torch.zeros(2, 3, 4, 4), loss_type)
    torch.testing.assert_close(loss, torch.full((2,), expected))


def test_spaced_times():
    assert spaced_times(1000, 1000) == list(range(999, -1, -1))
    assert spaced_times(1000, 4000) == list(range(999, -1, -1))
    assert spaced_times(1000, 1) == [999]
    times = spaced_times(1000, 30)
    assert times[0] == 999
    assert times[-1] == 0
    assert len(set(times)) == 30


def test_full_stochastic_step_is_the_ddpm_posterior():
    schedule = NoiseSchedule.linear(1000)
    x_0, x_t = torch.randn(2, 5, 3, 4, 4).unbind()
    for time in (1, 37, 500, 999):
        t = torch.full((5,), time)
        mean, variance, _ = posterior(minimagen_tables(1000), x_0, x_t, t)
        step = (x_t.double(), x_0.double(), *levels_at(schedule, [time, time - 1]))
        ours = ddim_step(*step, eta=1.0, noise=torch.zeros(1).double())
        torch.testing.assert_close(ours.float(), mean, atol=1e-5, rtol=0)
        with_noise = ddim_step(*step, eta=1.0, noise=torch.ones(1).double())
        spread = (with_noise - ours).square().float()
        torch.testing.assert_close(spread, variance.expand_as(spread), atol=1e-6, rtol=1e-3)


MEAN = torch.tensor([0.3, -0.2]).double().view(1, 2, 1, 1)
STD = torch.tensor([0.1, 0.25]).double().view(1, 2, 1, 1)


def gaussian_denoiser(schedule):
    """The exact mean of x_0 given x_t when the data are N(MEAN, STD^2)."""
    abar = schedule.abar

    def denoiser(x_t, t):
        a = abar[t].view(-1, 1, 1, 1)
        gain = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)
        return MEAN + gain * (x_t - a.sqrt() * MEAN)

    return denoiser


def run_sampler(schedule, count, steps, eta):
    generator = torch.Generator().manual_seed(0)
    shape = (count, 2, 1, 1)

    def noise():
        return torch.randn(shape, generator=generator).double()

    start = noise()
    result = sample(
        gaussian_denoiser(schedule), start, schedule, times=spaced_times(schedule.timesteps, steps),
        eta=eta, threshold=lambda x_0: x_0, draw_noise=noise,
    )  # fmt: skip
    return start, result


def gaussian_law(schedule, steps, eta):
    """Mean and variance that the sampler must have, step by step: each step is linear."""
    abar = schedule.abar
    times = spaced_times(schedule.timesteps, steps)
    mean, variance = torch.zeros_like(MEAN), torch.ones_like(STD)
    for i, time in enumerate(times):
        a = abar[time]
        s = abar.new_ones(()) if i == len(times) - 1 else abar[times[i + 1]]
        # x_0 = MEAN + gain (x_t - sqrt(a) MEAN)
        gain = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)
        added = eta**2 * (1 - s) / (1 - a) * (1 - a / s)
        direction = ((1 - s - added).clamp(min=0) / (1 - a)).sqrt()
        on_x0, on_xt = s.sqrt() - direction * a.sqrt(), direction
        slope = on_xt + on_x0 * gain
        mean = slope * mean + on_x0 * (MEAN - gain * a.sqrt() * MEAN)
        variance = slope**2 * variance + added
    return mean, variance


@pytest.mark.parametrize(("steps", "eta"), [(200, 1.0), (200, 0.0), (25, 1.0), (25, 0.0)])
def test_sampler_has_the_exact_law_on_gaussian_data(steps, eta):
    schedule = NoiseSchedule.linear(200)
    count = 40_000
    _, result = run_sampler(schedule, count, steps, eta)
    mean, variance = gaussian_law(schedule, steps, eta)
    standard_error = (variance / count).sqrt()
    assert ((result.mean(0, keepdim=True) - mean).abs() < 4 * standard_error).all()
    spread = result.var(0, keepdim=True) / variance - 1
    assert (spread.abs() < 4 * (2 / count) ** 0.5).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampler_reaches_the_data_on_gaussian_data(eta):
    mean, variance = gaussian_law(NoiseSchedule.linear(1000), 1000, eta)
    torch.testing.assert_close(mean, MEAN, atol=2e-3, rtol=0)
    torch.testing.assert_close(variance.sqrt(), STD, atol=4e-3, rtol=0)


def test_resize_is_antialiased_and_clamped():
    checkerboard = torch.ones(1, 1, 32, 32)
    checkerboard[..., ::2, ::2] = -1
    checkerboard[..., 1::2, 1::2] = -1
    assert resize(checkerboard, 8)[..., 1:-1, 1:-1].abs().max() < 0.05
    edge = torch.ones(1, 1, 8, 8)
    edge[..., :4] = -1
    assert resize(edge, 32).abs().max() <= 1


def test_shrink_and_enlarge_keeps_size_and_loses_detail():
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    out = shrink_and_enlarge(x, 8)
    assert out.shape == x.shape
    assert out.var() < 0.3 * x.var()
