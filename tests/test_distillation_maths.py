"""Segment distillation against the exact flow of Gaussian data."""

import itertools

import pytest
import torch

from imagen_scale.diffusion.distillation import Segments, student_factors
from imagen_scale.diffusion.sampler import levels_at, sample
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.solvers import ddim_step
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.errors import ConfigError

SPACINGS = ("trailing", "middle")
MEAN, SPREAD = 0.3, 0.3  # of the data, in every pixel
SCHEDULES = {
    "linear": NoiseSchedule.linear(1000), "cosine": NoiseSchedule.cosine(1000),
    "ends in noise": NoiseSchedule.linear(1000).with_zero_terminal_snr(),
}  # fmt: skip


def levels_of(schedule, t):
    return (part[t].reshape(-1, 1, 1, 1) for part in (schedule.abar.sqrt(),
                                                      (1 - schedule.abar).sqrt()))  # fmt: skip


def exact(schedule):
    """The mean of all that x_t may have been: what a perfect network predicts."""

    def denoise(x_t, t):
        alpha, sigma = levels_of(schedule, t)
        share = alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2)
        return MEAN + share * (x_t - alpha * MEAN)

    return denoise


def flow(schedule, x_t, t):
    """Where the exact reverse process ends: each value keeps its place in the distribution."""
    alpha, sigma = levels_of(schedule, t)
    return MEAN + SPREAD * (x_t - alpha * MEAN) / ((alpha * SPREAD) ** 2 + sigma**2).sqrt()


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def student(segments, answer):
    """A network that has learned the answers."""

    def denoise(x_t, t):
        segment = (segments.beginnings[None] == t[:, None]).int().argmax(1)
        return answer(x_t, segment)

    return denoise


def sampled(schedule, steps, spacing, denoise):
    x = noise(64, 3, 4, 4)
    times = visited_times(schedule, steps, spacing)
    made = sample(denoise, x, schedule, times=times, sampler="ddim",
                  threshold=lambda x_0: x_0, draw_noise=lambda: x)  # fmt: skip
    return made, flow(schedule, x, torch.full((64,), 999)).clamp(-1, 1)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_what_is_learned_of_an_exact_teacher_is_the_exact_map(kind, steps, spacing):
    """The more steps the teacher takes, the nearer; and its own solver is nearer than DDIM."""
    schedule, errors = SCHEDULES[kind], {}
    most = {"trailing": 200, "middle": 120}[spacing]  # the last segment is short there
    for solver, total in itertools.product(("ddim", "dpmpp_2m"), (8, 40, most)):
        segments = Segments.of(schedule, steps, total, solver, spacing)
        answer = lambda x, s, segments=segments: segments.answer(exact(schedule), x, s)  # noqa: E731
        made, wanted = sampled(schedule, steps, spacing, student(segments, answer))
        errors[solver, total] = (made - wanted).abs().mean().item()
    assert errors["ddim", most] < errors["ddim", 40] < errors["ddim", 8]
    assert errors["dpmpp_2m", most] < max(errors["dpmpp_2m", 40], 1e-4)  # float32
    assert errors["dpmpp_2m", 40] < errors["ddim", 40]
    assert errors["dpmpp_2m", most] < 2e-3


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_student_that_is_fitted_reaches_the_exact_map(spacing):
    """Of Gaussian data the answer is a straight line in x_t, so least squares find it."""
    schedule, steps = SCHEDULES["cosine"], 4
    segments = Segments.of(schedule, steps, 200, "dpmpp_2m", spacing)
    x_0 = MEAN + SPREAD * noise(4000, 1, 1, 1)
    eps = noise(8000, 1, 1, 1)[4000:]
    segment = torch.arange(4000) % steps
    alpha, sigma = levels_of(schedule, segments.beginnings[segment])
    x_t = alpha * x_0 + sigma * eps
    answers = segments.answer(exact(schedule), x_t, segment).double()
    lines = []
    for i in range(steps):
        x, y = x_t[segment == i].flatten(), answers[segment == i].flatten()
        found = torch.linalg.lstsq(torch.stack((x, torch.ones_like(x)), 1), y[:, None]).solution
        lines.append(found.flatten())
    lines = torch.stack(lines)
    slope, offset = (lines[:, i] for i in range(2))

    def fitted(x, s):
        return slope[s].reshape(-1, 1, 1, 1) * x + offset[s].reshape(-1, 1, 1, 1)

    made, wanted = sampled(schedule, steps, spacing, student(segments, fitted))
    assert (made - wanted).abs().mean() < 1e-3
    few, _ = sampled(schedule, steps, spacing, exact(schedule))  # the teacher in as many steps
    assert (made - wanted).abs().mean() < 0.1 * (few - wanted).abs().mean()


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_samples_of_all_segments_together_take_the_steps_of_the_sampler(kind, solver, spacing):
    """Each against the solver itself, alone; the DDIM step from its answer ends there too."""
    schedule, steps, m = SCHEDULES[kind], 3, 4
    segments = Segments.of(schedule, steps, steps * m, solver, spacing)
    x_t, segment = noise(3, 2, 2, 2), torch.arange(3)
    together = segments.answer(exact(schedule), x_t, segment)
    levels = levels_at(schedule, segments.beginnings.tolist())
    for i in range(steps):
        times = segments.times[i].tolist()
        following = segments.beginnings[i + 1 : i + 2].tolist()
        end = []
        sample(
            lambda x, t, end=end: end.append(x) or exact(schedule)(x, t),
            x_t[i : i + 1], schedule, times=times + following, sampler=solver,
            threshold=lambda x_0: x_0, draw_noise=lambda: None,
        )  # fmt: skip
        if following:
            landed = ddim_step(x_t[i], together[i], levels[i], levels[i + 1], eta=0, noise=None)
            torch.testing.assert_close(landed, end[-1][0], atol=1e-5, rtol=1e-5)
        else:
            x_0 = exact(schedule)(end[-1], torch.tensor(times[-1:]))
            torch.testing.assert_close(together[i], x_0[0], atol=1e-5, rtol=1e-5)


def test_a_teacher_of_as_many_steps_answers_with_its_own_prediction():
    schedule = SCHEDULES["linear"]
    for solver in ("ddim", "dpmpp_2m"):
        segments = Segments.of(schedule, 4, 4, solver)
        x_t, segment = noise(4, 1, 2, 2), torch.arange(4)
        own = exact(schedule)(x_t, segments.beginnings)
        torch.testing.assert_close(segments.answer(exact(schedule), x_t, segment), own, rtol=1e-4,
                                   atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("total", [25, 100, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_students_times_are_those_that_sampling_visits(total, spacing):
    schedule = NoiseSchedule.cosine(total)
    for steps, m in itertools.product((1, 2, 3, 4, 5, 8), (1, 2, 3, 4)):
        if steps * m > total:
            continue
        try:
            segments = Segments.of(schedule, steps, steps * m, "dpmpp_2m", spacing)
        except ConfigError as error:
            assert total < 1000 and "find no times of their own" in str(error)
            continue
        times = segments.times.flatten().tolist()
        assert times == sorted(set(times), reverse=True) and times[-1] >= 0
        segments = Segments.of(schedule, steps, steps * m, "ddim", spacing)
        assert segments.beginnings.tolist() == visited_times(schedule, steps, spacing)
        shares = segments.of_time.bincount(minlength=steps)
        assert shares.max() - shares.min() <= 1 and len(shares) == steps
        begins = segments.beginnings[segments.of_time]
        if spacing == "trailing":
            assert (begins >= torch.arange(total) - 1).all()  # by the rounding of one


def test_weights_are_those_of_the_visited_times_and_leave_no_step_out():
    schedule = SCHEDULES["cosine"]
    times = visited_times(schedule, 4, "trailing")
    for pred_type, weight in itertools.product(("v", "x0"), (None, "v", "x0", "v_clipped")):
        factors = student_factors(schedule, times, pred_type, weight)
        assert factors[times].mean().item() == pytest.approx(1, abs=1e-6)
        assert factors.count_nonzero() == 4 and (factors[times] > 0.01).all()
    snr = schedule.snr[times]
    of_picture = student_factors(schedule, times, "x0", None)[times].double()
    torch.testing.assert_close(of_picture / of_picture[0], snr.clamp(min=1), rtol=1e-6, atol=0)
    assert torch.equal(student_factors(schedule, times, "v", "v")[times], torch.ones(4))
