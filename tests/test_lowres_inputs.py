"""Low-resolution pictures in training that are not the pictures themselves made small."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.tiny import TINY, write_stage

from imagen_scale.config import dump_config, parse_config
from imagen_scale.data.degradation import degraded
from imagen_scale.data.lowres_inputs import LowresInputs
from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.sequence import split_indices
from imagen_scale.diffusion.lowres import resize, shrink_and_enlarge
from imagen_scale.errors import ConfigError
from imagen_scale.files.pictures import from_uint8
from imagen_scale.runs.folders import inference_path, lowres_samples_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling import redraw as redraw_module
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.redraw import redraw
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.stage import Inputs, Stage
from imagen_scale.training.lowres_samples import (
    check_stage_before,
    draw_samples,
    draws_from_between,
    read_samples,
)
from imagen_scale.training.objective import Objective
from imagen_scale.training.samples import split_samples

STAGE = 2


def picture(side=64, seed=0):
    """Smooth colours with an edge, (3, side, side) uint8."""
    rows, columns = np.mgrid[:side, :side] / side
    red = np.where(columns > 0.4, 0.9, 0.1)
    colours = np.stack([red, rows, (rows + columns) / 2])
    return (255 * np.roll(colours, seed, 2)).round().astype(np.uint8)


def test_equal_seeds_make_a_picture_worse_alike_and_others_otherwise():
    ways = [degraded(picture(), 16, seed) for seed in range(40)]
    assert {way.shape for way in ways} == {(3, 16, 16)} and ways[0].dtype == np.uint8
    assert all(np.array_equal(way, degraded(picture(), 16, i)) for i, way in enumerate(ways))
    assert len({way.tobytes() for way in ways}) > 20
    plain = resize(from_uint8(torch.from_numpy(picture())[None]), 16)[0].numpy() * 127.5 + 127.5
    errors = [np.abs(way - plain).mean() for way in ways]
    assert min(errors) < 1 and 2 < max(errors) < 25  # of 255: from hardly to plainly worse


def test_a_sample_gets_by_its_position_what_the_shares_say():
    drawn = {3: picture(16)}
    inputs = LowresInputs(16, seed=7, degrade=0.3, samples=0.2, drawn=drawn)

    def given(i, **mirrored):
        found = [inputs.of(i, picture(), position, is_mirrored=bool(mirrored))
                 for position in range(2000)]  # fmt: skip
        again = [inputs.of(i, picture(), position, is_mirrored=bool(mirrored))
                 for position in range(0, 2000, 97)]  # fmt: skip
        for one, other in zip(found[::97], again, strict=True):
            assert (one is None) == (other is None) and (one is None or np.array_equal(one, other))
        return found

    found = given(3)
    as_drawn = sum(one is not None and np.array_equal(one, drawn[3]) for one in found)
    assert as_drawn == pytest.approx(400, abs=60)
    assert sum(one is None for one in found) == pytest.approx(1000, abs=80)
    turned = given(3, is_mirrored=True)
    mirrored = sum(one is not None and np.array_equal(one, drawn[3][:, :, ::-1]) for one in turned)
    assert mirrored == as_drawn
    others = given(4)  # which was not drawn
    assert sum(one is None for one in others) == sum(one is None for one in found) + as_drawn


def config(**training):
    return parse_config(json.dumps(TINY | {"training": TINY["training"] | training}))


def few_steps(steps):
    section = {"teacher": "t", "steps": [steps, None], "cond_scale": 2}
    return ("unets.0.pred_type=v", f"distill={json.dumps(section)}")


def test_the_network_is_given_these_pictures_and_learns_what_it_learned_without(tmp_path):
    made = config(lowres_degrade=0.5)
    prepared = prepare(made)
    sequence = split_samples(made, made.stage(STAGE), prepared).train
    batch = sequence.collate([sequence[position] for position in range(8)])
    assert 0 < batch.has_lowres.sum() < 8 and batch.lowres.shape == (8, 3, 16, 16)
    plain = split_samples(config(), config().stage(STAGE), prepared)
    same = plain.train.collate([plain.train[position] for position in range(8)])
    assert same.lowres is None and torch.equal(same.images, batch.images)
    held_out = split_samples(made, made.stage(STAGE), prepared).held_out
    assert held_out is None or held_out.collate([held_out[0]]).lowres is None

    objective = Objective(made.stage(STAGE), torch.device("cpu"))
    draws = objective.draw(batch.positions, batch.images.shape[1:], "train")
    x_0, found = objective._pictures(batch, draws)
    own = shrink_and_enlarge(x_0, 16)
    given = resize(from_uint8(batch.lowres), x_0.shape[-1])
    for row, has in enumerate(batch.has_lowres.tolist()):
        assert torch.equal(found[row], (given if has else own)[row])
        assert torch.equal(found[row], own[row]) != has
    unseen = batch._replace(has_lowres=torch.zeros(8, dtype=torch.bool))
    assert torch.equal(objective._pictures(unseen, draws)[1], own)


def test_a_picture_is_drawn_from_where_so_much_of_it_is_left(tmp_path, monkeypatch):
    """By a denoiser that knows it, it comes out whole."""
    write_stage(tmp_path / "run", 1)
    stage = Stage(read_inference(inference_path(tmp_path / "run", 1)), torch.device("cpu"))
    wanted = from_uint8(torch.from_numpy(np.stack([picture(16), picture(16, 3)])))
    seen = []

    def knows(stage, cond, sides):
        def denoise(x_t, t):
            seen.append((t[0].item(), x_t.clone()))
            return wanted

        return denoise

    monkeypatch.setattr(redraw_module, "denoiser_of", knows)
    width = stage.config.network.text_embed_dim
    text = Text(torch.zeros(2, 1, width), torch.zeros(2, 1, dtype=torch.bool))
    for kept in (0.2, 0.7):
        seen.clear()
        made = redraw(stage, wanted, Inputs(text, [1, 2]), StageSettings(steps=20), kept=kept)
        assert torch.allclose(made, wanted, atol=1e-5)
        abar = stage.schedule.abar
        first, x_t = seen[0]
        assert kept <= abar[first] < kept + 0.2
        noise = (x_t - abar[first].sqrt() * wanted) / (1 - abar[first]).sqrt()
        assert noise.std().item() == pytest.approx(1, abs=0.05)
    seen.clear()
    redraw(stage, wanted, Inputs(text, [1, 2]), StageSettings(steps=3), kept=0.999999)
    assert len(seen) == 1  # the last step at least


def test_pictures_are_drawn_once_for_the_same_weights(tmp_path):
    run, said = tmp_path / "run", []
    write_stage(run, 1)
    made = config(lowres_samples=0.5)
    stage, prepared = made.stage(STAGE), prepare(made)
    train = split_indices(prepared.source.keys, 0)[0]
    draw_samples(stage, run, prepared, train, said.append)
    path = lowres_samples_path(run, STAGE)
    drawn, written = read_samples(stage, run), path.stat().st_mtime_ns
    assert sorted(drawn) == train and drawn[train[0]].shape == (3, 16, 16)
    assert said == [f"U-Net 2: drawing {len(train)} pictures with U-Net 1 to learn from "
                    f"(training.lowres_samples)"]  # fmt: skip
    # Each is its own picture under a hand that has learned nothing: nearer to it than to others.
    real = real_pictures(prepared, train, 16)
    ours = from_uint8(torch.from_numpy(np.stack([drawn[i] for i in train])))
    nearest = torch.cdist(ours.flatten(1), real.flatten(1)).argmin(1)
    assert (nearest == torch.arange(len(train))).float().mean() > 2 / len(train)
    draw_samples(stage, run, prepared, train, said.append)
    assert path.stat().st_mtime_ns == written and len(said) == 1
    whole = path.read_bytes()
    for damaged in (whole[:2000], whole[:50], b"", b"\xff" * len(whole)):
        path.write_bytes(damaged)
        draw_samples(stage, run, prepared, train, said.append)
        again = read_samples(stage, run)
        assert all(np.array_equal(again[i], drawn[i]) for i in drawn)
    assert said == 5 * said[:1]
    write_stage(run, 1, seed=1)  # other weights
    draw_samples(stage, run, prepared, train, said.append)
    assert len(said) == 6
    with safe_open(path, "np") as file:
        assert set(file.metadata()) == {"origin", "pictures"}


def test_how_much_is_left_of_a_picture_is_spread_over_the_pictures(tmp_path, monkeypatch):
    run, kept = tmp_path / "run", []
    write_stage(run, 1)
    made = config(lowres_samples=0.5)
    stage, prepared = made.stage(STAGE), prepare(made)
    train = split_indices(prepared.source.keys, 0)[0]
    seeds = []

    def draws(stage, pictures, inputs, settings, *, kept: float):
        levels.append((kept, len(pictures)))
        seeds.extend(inputs.seeds)
        return pictures

    levels = []
    monkeypatch.setattr("imagen_scale.training.lowres_samples.redraw", draws)
    draw_samples(stage, run, prepared, train, kept.append)
    assert sum(count for _, count in levels) == len(train) and len(levels) > 2
    assert all(0.3 < level < 0.8 for level, _ in levels)
    assert sorted(seeds) == list(range(len(train)))
    drawn, real = read_samples(stage, run), real_pictures(prepared, train, 16)
    for i, picture in zip(train, real, strict=True):  # each under its own number
        assert torch.equal(from_uint8(torch.from_numpy(drawn[i])[None])[0], picture)


@pytest.mark.parametrize(("steps", "whether"), [(1, False), (2, False), (4, True)])
def test_few_steps_may_all_be_from_noise_alone(tmp_path, steps, whether):
    student, ordinary = tmp_path / "student", tmp_path / "ordinary"
    write_stage(student, 1, overrides=few_steps(steps))
    write_stage(ordinary, 1)
    assert draws_from_between(read_inference(inference_path(student, 1))) is whether
    assert draws_from_between(read_inference(inference_path(ordinary, 1)))


@pytest.mark.distributed
def test_a_stage_before_that_was_taken_over_says_itself_how_few_its_steps_are(launch, tmp_path):
    """The run that it was taken into knows it as an ordinary one."""
    teacher, path, run = (tmp_path / name for name in ("teacher", "tiny.json", "run"))
    for number in (1, 2):
        write_stage(teacher, number, overrides=few_steps(1))
    section = {"teacher": str(teacher), "steps": [None, 2], "cond_scale": 1, "teacher_steps": 4}
    made = parse_config(
        json.dumps(TINY),
        overrides=("unets.0.pred_type=v", f"distill={json.dumps(section)}",
                   "training.lowres_samples=0.4", "training.steps=1", "training.warmup_steps=0"),
    )  # fmt: skip
    path.write_text(dump_config(made))
    done = launch(path, run)
    assert "training.lowres_samples is left out: every step of U-Net 1 starts" in done.stdout
    assert not lowres_samples_path(run, 2).exists()


def test_a_stage_before_that_is_not_trained_is_refused_by_name(tmp_path):
    stage = config(lowres_samples=0.5).stage(STAGE)
    with pytest.raises(ConfigError, match=r"samples of U-Net 1, which is not trained.*--unet 1"):
        check_stage_before(stage, tmp_path, [2])
    check_stage_before(stage, tmp_path, [1, 2])  # it is trained first
    check_stage_before(config().stage(STAGE), tmp_path, [2])
    write_stage(tmp_path, 1)
    check_stage_before(stage, tmp_path, [2])


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"lowres_degrade": 0.6, "lowres_samples": 0.6}, "together they may be 1"),
        ({"lowres_samples": 1.5}, "training.lowres_samples"),
    ],
)
def test_shares_that_cannot_be_are_refused(training, said):
    with pytest.raises(ConfigError, match=said):
        config(**training)


def test_one_unet_has_no_low_resolution_picture():
    alone = TINY | {
        "unets": TINY["unets"][:1],
        "training": TINY["training"] | {"lowres_degrade": 1},
    }
    alone["imagen"] = alone["imagen"] | {"image_sizes": [16]}
    with pytest.raises(ConfigError, match=r"training.lowres_degrade: is of super-resolution"):
        parse_config(json.dumps(alone))


@pytest.mark.distributed
def test_each_unet_may_be_trained_by_itself(launch, tmp_path):
    """The second then reads pictures of the first one's size as well."""
    path, run = tmp_path / "tiny.json", tmp_path / "run"
    path.write_text(json.dumps(TINY | {"training": TINY["training"] | {"lowres_samples": 0.4}}))
    launch(path, run, "--unet", "1")
    done = launch(path, run, "--unet", "2")
    assert "pictures with U-Net 1 to learn from" in done.stdout
    assert read_inference(inference_path(run, 2)).is_finished


@pytest.mark.distributed
def test_two_ranks_train_a_cascade_with_both(launch, tmp_path):
    path = tmp_path / "tiny.json"
    training = TINY["training"] | {"lowres_degrade": 0.4, "lowres_samples": 0.4}
    path.write_text(json.dumps(TINY | {"training": training}))
    done = launch(path, tmp_path / "run", processes=2)
    assert done.stdout.count("pictures with U-Net 1 to learn from") == 1
    assert read_inference(inference_path(tmp_path / "run", 2)).is_finished
    lowres_samples_path(tmp_path / "run", 2).unlink()
    done = launch(path, tmp_path / "run", processes=2)  # nothing is left to learn from any
    assert "U-Net 2: already trained" in done.stdout and "to learn from" not in done.stdout
