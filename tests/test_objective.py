"""The training objective: randomness belongs to the sample, normalise first, then noise."""

import json

import pytest
import torch
from support.tiny import TINY

from imagen_scale.config import parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.diffusion.lowres import shrink_and_enlarge
from imagen_scale.diffusion.prediction_error import LOG_SNRS, nearest_times
from imagen_scale.diffusion.schedule import at_time
from imagen_scale.files.pictures import from_uint8
from imagen_scale.training.objective import Objective


def make_objective(index, **imagen):
    config = parse_config(json.dumps(TINY | {"imagen": TINY["imagen"] | imagen}))
    return Objective(config.stage(index + 1), torch.device("cpu"))


def make_batch(size, positions):
    generator = torch.Generator().manual_seed(0)
    everything = torch.rand(16, 3, size, size, generator=generator) * 2 - 1
    return Batch(
        everything[positions],
        torch.zeros(len(positions), 4, 384),
        torch.ones(len(positions), 4, dtype=torch.bool),
        torch.tensor(positions),
        ["x"] * len(positions),
    )


@pytest.mark.parametrize("index", [0, 1])
def test_random_numbers_belong_to_the_sample_not_to_the_batch(index):
    objective = make_objective(index)
    shape = torch.Size((3, 8, 8))
    together = objective.draw(torch.arange(6), shape, "train")
    apart = [objective.draw(torch.tensor([i]), shape, "train") for i in range(6)]
    for i, alone in enumerate(apart):
        for ours, theirs in zip(together, alone, strict=True):
            if ours is not None:
                assert torch.equal(ours[i], theirs[0])
    other = objective.draw(torch.arange(6), shape, "validation")
    assert not torch.equal(other.eps, together.eps)


def test_random_numbers_have_their_distributions():
    objective = make_objective(1, cond_drop_prob=0.25)
    draws = objective.draw(torch.arange(4000), torch.Size((3, 2, 2)), "train")
    assert draws.t.min() == 0
    assert draws.t.max() == 99
    assert draws.t.float().mean() == pytest.approx(49.5, abs=2)
    assert draws.keep_mask.float().mean() == pytest.approx(0.75, abs=0.03)
    assert draws.eps.mean() == pytest.approx(0, abs=0.02)
    assert draws.eps.std() == pytest.approx(1, abs=0.02)
    assert abs((draws.eps * draws.lowres_eps).mean()) < 0.02
    assert draws.lowres_t.max() == 99


def test_lowres_aug_max_bounds_the_noise_on_the_lowres_image():
    config = TINY | {"training": TINY["training"] | {"lowres_aug_max": 0.3}}
    objective = Objective(parse_config(json.dumps(config)).stage(2), torch.device("cpu"))
    draws = objective.draw(torch.arange(500), torch.Size((3, 2, 2)), "train")
    assert draws.lowres_t.max() == 29


@pytest.mark.parametrize(("index", "size"), [(0, 16), (1, 32)])
def test_what_the_network_sees_and_must_answer(index, size):
    objective = make_objective(index)
    batch = make_batch(size, [3, 5, 9])
    draws = objective.draw(batch.positions, batch.images.shape[1:], "train")
    seen = {}

    def network(x_t, t, text_embeds, text_mask, keep_mask, *lowres):
        seen.update(x_t=x_t, t=t, keep_mask=keep_mask, lowres=lowres)
        schedule = objective.schedule
        if index == 0:
            return draws.eps
        return schedule.target("v", batch.images, t, draws.eps)  # as TINY's second U-Net

    assert objective.loss(network, batch).item() == 0
    x_t = objective.schedule.q_sample(batch.images, draws.t, draws.eps)
    assert torch.equal(seen["x_t"], x_t)
    if index == 0:
        assert seen["lowres"] == ()
    else:
        # In [-1, 1] before the noise comes, as in sampling.
        lowres = shrink_and_enlarge(batch.images, 16)
        noised = objective.schedule.q_sample(lowres, draws.lowres_t, draws.lowres_eps)
        assert torch.equal(seen["lowres"][0], noised)
        assert torch.equal(seen["lowres"][1], draws.lowres_t)


@pytest.mark.parametrize("index", [0, 1])
def test_what_travels_small_gives_the_same_losses_bit_for_bit(index):
    """Pictures in 8 bits and text in 16, beside the floats that they stand for."""
    objective = make_objective(index)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randn(4, 5, 384, generator=generator).half()
    small = Batch(pictures, text, torch.ones(4, 5, dtype=torch.bool), torch.arange(4), ["x"] * 4)
    large = small._replace(images=from_uint8(pictures), text_embeds=text.float())

    def network(x_t, t, embeds, mask, keep, *lowres):
        assert x_t.dtype == embeds.dtype == torch.float32
        return x_t * embeds.mean(dim=(1, 2))[:, None, None, None] + sum(lowres[:1])

    losses = [objective.losses(network, batch) for batch in (small, large)]
    assert torch.equal(*losses) and losses[0].isfinite().all()


KINDS = [
    (0, {"pred_type": "eps"}), (0, {"pred_type": "v"}), (0, {"pred_type": "x0"}),
    (1, {"pred_type": "v"}), (1, {"pred_type": "x0", "lowres_residual": True}),
]  # fmt: skip


@pytest.mark.parametrize(("index", "unet"), KINDS)
def test_the_error_of_the_predicted_picture_is_the_same_measure_for_every_prediction(index, unet):
    unets = [TINY["unets"][i] | (unet if i == index else {}) for i in range(2)]
    objective = Objective(
        parse_config(json.dumps(TINY | {"unets": unets})).stage(index + 1), torch.device("cpu")
    )
    batch = make_batch(objective.stage.size, [0, 3])
    x_0, seen = batch.images, []

    def wrong_by(offset):
        """A network that knows the picture but for `offset`."""

        def network(x_t, t, text, mask, keep_mask, lowres_img=None, lowres_t=None):
            seen.append((t, keep_mask, lowres_t))
            schedule, said = objective.schedule, x_0 + offset
            alpha, sigma = (at_time(of, t, x_t) for of in (schedule.alpha, schedule.sigma))
            eps = (x_t - alpha * said) / sigma
            if unet.get("lowres_residual"):
                return said - shrink_and_enlarge(x_0, objective.stage.small_size)
            return schedule.target(objective.pred_type, said, t, eps)

        return network

    for offset in (0.0, 0.5):
        errors = objective.x_0_errors(wrong_by(offset), batch, "validation")
        assert errors.shape == (2, len(LOG_SNRS))
        assert torch.allclose(errors, torch.tensor(offset**2), atol=1e-4)
    assert [int(t[0]) for t, *_ in seen[: len(LOG_SNRS)]] == nearest_times(objective.schedule)
    assert all(keep_mask.all() for _, keep_mask, _ in seen)  # with their captions
    if index == 1:
        level = objective.stage.imagen.lowres_sample_noise_level  # as noisy as in sampling
        time = objective.schedule.level_to_time(level)
        assert all((lowres_t == time).all() for *_, lowres_t in seen)
