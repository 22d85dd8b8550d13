"""What is predicted, how it is weighed and at which times: closed forms and equalities."""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import TINY, write_stage

from imagen_scale.config import parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.diffusion.loss import LossWeight, image_loss, loss_factors, x_0_weights
from imagen_scale.diffusion.schedule import NoiseSchedule, PredType, at_time
from imagen_scale.errors import ConfigError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.stage import Inputs, Stage
from imagen_scale.sampling.stage_schedule import stage_schedule
from imagen_scale.training.objective import Objective
from imagen_scale.training.quarters import quarter_of_times, quarter_sums
from imagen_scale.training.times import stratified_time

CPU = torch.device("cpu")
WEIGHTS, PREDICTIONS = get_args(LossWeight), get_args(PredType)
PAIRS = list(itertools.product(PREDICTIONS, WEIGHTS))
SCHEDULES = {
    "linear": NoiseSchedule.linear(100),
    "cosine": NoiseSchedule.cosine(100),
    "shifted": NoiseSchedule.cosine(100).shifted(1 / 16),
}


def configured(*overrides):
    return parse_config(json.dumps(TINY), overrides=overrides)


# Schedules ---------------------------------------------------------------------------------------


@given(timesteps=st.integers(2, 1500))
def test_the_cosine_schedule_has_nichol_and_dhariwals_values(timesteps):
    abar = NoiseSchedule.cosine(timesteps).abar

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for time in (0, timesteps // 2, timesteps - 1):
        assert abar[time].item() == pytest.approx(f((time + 0.5) / timesteps) / f(0), rel=1e-9)
    assert abar.dtype == torch.float64
    assert ((abar > 0) & (abar < 1)).all() and (abar.diff() < 0).all()


@given(factor=st.floats(1 / 64, 64), timesteps=st.integers(21, 1200))
def test_a_shift_moves_the_log_snr_by_a_constant(factor, timesteps):
    for schedule in (NoiseSchedule.linear(timesteps), NoiseSchedule.cosine(timesteps)):
        moved = schedule.shifted(factor).snr.log() - schedule.snr.log()
        torch.testing.assert_close(moved, torch.full_like(moved, math.log(factor)), atol=1e-7,
                                   rtol=0)  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_keeps_the_first_time_and_empties_the_last(name):
    before = SCHEDULES[name]
    after = before.with_zero_terminal_snr()
    assert after.abar[-1] == 0 and after.alpha[-1] == 0 and after.sigma[-1] == 1
    torch.testing.assert_close(after.abar[0], before.abar[0], rtol=1e-12, atol=0)
    assert (after.abar.diff() < 0).all()
    # Alpha is moved and stretched: its differences keep their proportions.
    ratio = after.abar.sqrt().diff() / before.abar.sqrt().diff()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


def test_betas_make_the_schedule_again():
    for schedule in SCHEDULES.values():
        torch.testing.assert_close((1 - schedule.betas).cumprod(0), schedule.abar)


def test_a_stage_has_the_schedule_that_is_written():
    plain, same = configured(), configured('unets.1.schedule={"type":"linear"}')
    for config in (plain, same):
        assert torch.equal(stage_schedule(config.stage(2)).abar, NoiseSchedule.linear(100).abar)
    written = configured(
        'unets.1.schedule={"type":"cosine","shift_from":16,"zero_terminal_snr":true}'
    )
    expected = NoiseSchedule.cosine(100).shifted(0.25).with_zero_terminal_snr()
    assert torch.equal(stage_schedule(written.stage(2)).abar, expected.abar)  # of 32 px
    assert torch.equal(stage_schedule(written.stage(1)).abar, NoiseSchedule.linear(100).abar)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (('unets.0.schedule={"zero_terminal_snr":true}',),
         "unets.0.schedule.zero_terminal_snr: where x_t is noise alone.*pred_type to v or x0"),
        (("imagen.loss_type=huber", "training.loss_weight=v"),
         r'loss_weight: "v" weighs squared errors.*l2, not huber'),
        (("training.loss_weight=[null,\"v\",\"v\"]",), "loss_weight: 3 values for 2 U-Nets"),
        (("training.loss_weight=snr",), "loss_weight: \"snr\" is not allowed"),
        (('unets.0.schedule={"kind":"cosine"}',), "schedule.kind: unknown key; .*type"),
        (('unets.0.schedule={"shift_from":0}',), "shift_from: 0 is not allowed"),
        (('unets.0.schedule={"shift_from":65537}',), "shift_from: 65537 is not allowed"),
        (("training.lr=1e300",), r"training.lr: 1e\+300 is not allowed"),
        (("training.weight_decay=1e7",), "training.weight_decay: 10000000.0 is not allowed"),
        (("training.ema_widths=[0.05,0.1,0.0500000001]",), "has one twice"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        configured(*changes)


# Weights -----------------------------------------------------------------------------------------


def test_weights_are_what_the_documentation_says():
    snr = torch.tensor([0.0, 0.5, 4.0, 30.0]).double()
    expected = {
        "x0": [1, 1, 1, 1],
        "eps": [0, 0.5, 4, 30],
        "v": [1, 1.5, 5, 31],
        "v_clipped": [1, 1.5, 5, 10],
        "min_snr": [0, 0.5, 4, 5],
        "sigmoid": [x / (1 + math.exp(math.log(x) - 2)) if x else 0 for x in snr.tolist()],
    }
    assert set(expected) == set(WEIGHTS)
    for weight, values in expected.items():
        torch.testing.assert_close(x_0_weights(snr, weight), torch.tensor(values).double())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("pred_type", "weight"), PAIRS)
def test_factors_keep_the_mean_of_the_plain_loss(pred_type, weight, name):
    factors = loss_factors(SCHEDULES[name], pred_type, weight)
    assert factors.mean().item() == pytest.approx(1, rel=1e-5)
    if pred_type == weight:
        assert (factors == 1).all()


def test_factors_are_finite_where_the_schedule_ends_in_noise_alone():
    schedule = NoiseSchedule.cosine(100).with_zero_terminal_snr()
    for pred_type, weight in itertools.product(("v", "x0"), WEIGHTS):
        factors = loss_factors(schedule, pred_type, weight)
        assert factors.isfinite().all() and (factors >= 0).all()


def as_prediction(schedule, pred_type, x_t, t, x_0):
    """What a network says that means x_0."""
    alpha, sigma = at_time(schedule.alpha, t, x_t), at_time(schedule.sigma, t, x_t)
    eps = (x_t - alpha * x_0) / sigma
    return {"x0": x_0, "eps": eps, "v": alpha * eps - sigma * x_0}[pred_type]


@pytest.mark.parametrize(("pred_type", "weight"), PAIRS)
def test_the_exact_gaussian_denoiser_has_the_least_loss_at_every_time(pred_type, weight):
    """Data N(0.3, 0.5²): a loss quadratic in x_0 and eps is exact on the four points (+-1, +-1)."""
    mean, std = 0.3, 0.5
    for schedule in SCHEDULES.values():
        t = torch.arange(100)
        signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        x_0 = (mean + std * signs[:, 0]).view(1, 1, 2, 2).expand(100, -1, -1, -1)
        eps = signs[:, 1].view(1, 1, 2, 2).expand_as(x_0)
        x_t = schedule.q_sample(x_0, t, eps)
        alpha, sigma = at_time(schedule.alpha, t, x_t), at_time(schedule.sigma, t, x_t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        factors = loss_factors(schedule, pred_type, weight)

        def loss(more, shift):
            found = mean + (gain + more) * (x_t - alpha * mean) + shift  # noqa: B023
            said = as_prediction(schedule, pred_type, x_t, t, found)  # noqa: B023
            wanted = schedule.target(pred_type, x_0, t, eps)  # noqa: B023
            return factors * image_loss(said, wanted, "l2")  # noqa: B023

        exact = loss(0, 0)
        for more, shift in ((0.5, 0), (0, 0.5), (0.3, -0.4)):
            above, below = loss(more, shift) - exact, loss(-more, -shift) - exact
            assert (above > 0).all() and (below > 0).all()
            torch.testing.assert_close(above, below, rtol=2e-2, atol=0)  # the slope is zero


def batch_of(positions, size=16):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(len(positions), 3, size, size, generator=generator) * 2 - 1
    text = torch.zeros(len(positions), 4, 384), torch.ones(len(positions), 4, dtype=torch.bool)
    return Batch(images, *text, torch.tensor(positions), ["x"] * len(positions))


@pytest.mark.parametrize(("pred_type", "weight"), PAIRS)
def test_one_network_has_one_loss_however_it_is_asked(pred_type, weight):
    """Converted to any prediction, the loss is the x_0 error times the weight, up to one number.

    So v with the plain loss is x_0 with the weight "v", and so on.
    """
    config = configured(f"unets.0.pred_type={pred_type}", f"training.loss_weight={weight}")
    objective, batch = Objective(config.stage(1), CPU), batch_of(range(40))
    schedule = objective.schedule
    guessed = []

    def network(x_t, t, *_):
        guessed.append(0.3 * x_t)
        return as_prediction(schedule, pred_type, x_t, t, guessed[-1])

    losses, t = objective.timed_losses(network, batch)
    error = image_loss(guessed[0], batch.images, "l2")
    weights = x_0_weights(schedule.snr, weight)
    number = (weights / x_0_weights(schedule.snr, pred_type)).mean()
    torch.testing.assert_close(losses.double(), error * weights[t] / number, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("pred_type", PREDICTIONS)
def test_without_a_weight_the_loss_is_the_plain_one_bit_for_bit(pred_type):
    plain = Objective(configured(f"unets.0.pred_type={pred_type}").stage(1), CPU)
    assert plain.factors is None
    batch = batch_of(range(6))

    def network(x_t, t, *_):
        return 0.3 * x_t

    draws = plain.draw(batch.positions, batch.images.shape[1:], "train")
    x_t = plain.schedule.q_sample(batch.images, draws.t, draws.eps)
    target = plain.schedule.target(pred_type, batch.images, draws.t, draws.eps)
    expected = (0.3 * x_t - target).square().flatten(1).mean(1)
    assert torch.equal(plain.losses(network, batch), expected)
    own = Objective(
        configured(f"unets.0.pred_type={pred_type}", f"training.loss_weight={pred_type}").stage(1),
        CPU,
    )
    assert torch.equal(own.losses(network, batch), expected)


def test_a_weight_may_differ_from_stage_to_stage():
    config = configured('training.loss_weight=[null,"v_clipped"]')
    assert [stage.loss_weight for stage in config.stages()] == [None, "v_clipped"]


# Times -------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**63 - 1), count=st.integers(1, 300), timesteps=st.integers(21, 2000))
def test_each_equal_share_of_the_times_holds_one_sample(seed, count, timesteps):
    times = [stratified_time(seed, slot, count, timesteps) for slot in range(count)]
    assert all(0 <= time < timesteps for time in times)
    found = sorted(times)
    for share, time in enumerate(found):  # of width T / count, up to the time's own width
        assert share * timesteps / count - 1 <= time < (share + 1) * timesteps / count
    assert max(Counter(times).values()) <= math.ceil(count / timesteps) + 1


def test_stratified_times_are_drawn_evenly():
    seeds = torch.randint(2**62, (4000,), generator=torch.Generator().manual_seed(0)) * 2
    for slot in (0, 3):
        times = torch.tensor([stratified_time(seed, slot, 8, 100) for seed in seeds.tolist()])
        assert times.float().mean() == pytest.approx(49.5, abs=2)
        assert times.float().std() == pytest.approx(100 / 12**0.5, abs=1)


def test_stratified_times_belong_to_seed_and_position_alone():
    stage = configured("training.stratified_times=true").stage(1)
    objective, plain = Objective(stage, CPU), Objective(configured().stage(1), CPU)
    shape, positions = torch.Size((3, 4, 4)), torch.arange(24)  # three steps of 8
    together = objective.draw(positions, shape, "train")
    for step in together.t.view(3, 8):
        assert sorted((step * 8 // 100).tolist()) == list(range(8))
    # Two ranks with micro-batches of 2, and a run that is continued in its last step.
    for part in (positions.view(-1, 2, 2)[:, 1].flatten(), positions[16:]):
        assert torch.equal(objective.draw(part, shape, "train").t, together.t[part])
    drawn = plain.draw(positions, shape, "train")
    assert not torch.equal(drawn.t, together.t)
    for name in ("eps", "keep_mask", "lowres_t"):  # all else is drawn as without
        assert torch.equal(getattr(drawn, name), getattr(together, name))


def test_a_validation_sees_all_noise_levels_however_large_the_global_batch():
    """It takes the first few samples; of a step's strata these are neighbouring times."""
    positions, shape = torch.arange(32), torch.Size((3, 4, 4))
    for seed in range(4):
        words = ("training.global_batch=2048", f"training.seed={seed}")
        stratified, plain = (
            Objective(configured(*words, *more).stage(1), CPU).draw(positions, shape, "validation")
            for more in (("training.stratified_times=true",), ())
        )
        assert torch.equal(stratified.t, plain.t)
        assert len(set((stratified.t // 20).tolist())) >= 4  # of five


# The loss at little noise and at much ------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_quarters_divide_the_log_snr_evenly(name):
    for schedule in (SCHEDULES[name], SCHEDULES[name].with_zero_terminal_snr()):
        quarter, log_snr = quarter_of_times(schedule), schedule.snr.log()
        assert (quarter.diff() >= 0).all() and quarter[0] == 0 and quarter[-1] == 3
        finite = log_snr[log_snr.isfinite()]
        edges = torch.linspace(finite[0], finite[-1], 5, dtype=torch.float64)
        for i in range(4):
            inside = log_snr[quarter == i]
            assert (inside <= edges[i] + 1e-9).all()
            assert i == 3 or (inside >= edges[i + 1] - 1e-9).all()


def test_losses_are_added_up_by_quarter():
    schedule = NoiseSchedule.linear(100)
    quarter = quarter_of_times(schedule)
    steps = [SimpleNamespace(losses=torch.rand(5), times=torch.randint(100, (5,)))
             for _ in range(3)]  # fmt: skip
    sums, counts = quarter_sums(schedule, steps)
    losses, times = (torch.cat([getattr(step, name) for step in steps])
                     for name in ("losses", "times"))  # fmt: skip
    for i in range(4):
        own = losses[quarter[times] == i]
        assert counts[i] == len(own)
        assert sums[i].item() == pytest.approx(own.double().sum().item())


# Sampling ----------------------------------------------------------------------------------------


def test_the_spacing_follows_what_a_stage_predicts():
    config = configured("unets.1.pred_type=x0")
    auto = SamplingOptions().for_stages(config.stages())
    assert [settings.spacing for settings in auto] == ["trailing", "logsnr"]
    asked = SamplingOptions.make(spacing=["karras", "auto"]).for_stages(config.stages())
    assert [settings.spacing for settings in asked] == ["karras", "logsnr"]
    assert [s.spacing for s in SamplingOptions().for_stages(configured().stages())] == [
        "trailing", "trailing"
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_a_stage_of_another_recipe_is_sampled(tmp_path, sampler):
    """The clean picture is certain: a network without weights predicts the grey of its bias."""

    def grey(unet):
        unet.final_conv.weight.zero_()
        unet.final_conv.bias.copy_(torch.tensor([0.5, -0.25, 0.125]))

    write_stage(
        tmp_path, 1, change=grey,
        overrides=("unets.0.pred_type=x0",
                   'unets.0.schedule={"type":"cosine","zero_terminal_snr":true}'),
    )  # fmt: skip
    stage = Stage(read_inference(inference_path(tmp_path, 1)), CPU)
    text = Text(torch.zeros(2, 3, 384), torch.ones(2, 3, dtype=torch.bool))
    for spacing in ("linear", "trailing", "logsnr", "karras"):
        settings = StageSettings(steps=4, sampler=sampler, spacing=spacing)
        images = stage.sample(Inputs(text, [0, 1]), settings)
        colours = torch.tensor([0.5, -0.25, 0.125]).view(1, 3, 1, 1).expand_as(images)
        torch.testing.assert_close(images, colours, atol=1e-6, rtol=0)
