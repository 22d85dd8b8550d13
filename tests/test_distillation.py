"""Stages that learn few steps: what they learn, how they are trained, what is refused."""

import json
import shutil

import pytest
import torch
from support.runs import assert_same_curve, losses, weights
from support.tiny import TINY, write_stage

from imagen_scale.config import dump_config, load_config, parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.diffusion.guidance import guide
from imagen_scale.diffusion.thresholding import dynamic_threshold
from imagen_scale.errors import ConfigError
from imagen_scale.files.atomic import sha256
from imagen_scale.planning.setup import written_setup
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.runtimes.torch_unet import load_unet
from imagen_scale.training.distillation import DistillationObjective
from imagen_scale.training.objective import Objective
from imagen_scale.training.teacher import Teacher, find_teacher, take_over

CPU = torch.device("cpu")
V = ("unets.0.pred_type=v",)
CORRECTED = (*V, "unets.1.pred_type=x0", "unets.1.lowres_residual=true")


def write_teacher(run, *changes):
    """Both stages, of few steps where the changes say so."""
    for number in (1, 2):
        write_stage(run, number, overrides=(*V, *changes), change=_small)
    return run


def _small(unet):
    """Predictions that a sampler does not throw far out of the range of pictures."""
    unet.final_conv.weight *= 0.3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("runs") / "teacher")


def section(run, steps=4, cond_scale=2.0, **others):
    return f"distill={json.dumps({'teacher': str(run), 'steps': steps, 'cond_scale': cond_scale} | others)}"  # noqa: E501


def configured(run, *changes, **distill):
    return parse_config(json.dumps(TINY), overrides=(*V, section(run, **distill), *changes))


def objective(config, number, precision="fp32"):
    stage = config.stage(number, 384)
    setup = written_setup(stage, 1, on_card=False)._replace(precision=precision)
    file = read_inference(inference_path(config_path(config), number))
    return DistillationObjective(stage, CPU, Teacher(file, stage, setup, CPU, print))


def config_path(config):
    from pathlib import Path

    return Path(config.distill.teacher)


def make_batch(size, count=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    text = torch.randn(count, 8, 384, generator=generator)
    mask = torch.ones(count, 8, dtype=torch.bool)
    return Batch(images, text, mask, torch.arange(count), ["x"] * count)


@pytest.mark.parametrize("kind", ["base", "super-resolution", "corrected"])
def test_the_teacher_is_guided_thresholded_and_sees_what_the_student_sees(kind, tmp_path):
    """Of one step it answers with its own prediction; a dropped caption is the null branch."""
    number, changes = (1 if kind == "base" else 2), CORRECTED if kind == "corrected" else V
    run = tmp_path / "teacher"
    write_stage(run, number, overrides=changes, change=_small)
    config = configured(run, *changes, "imagen.cond_drop_prob=0.5", teacher_steps=4)
    found = objective(config, number)
    batch, seen = make_batch(config.stage(number).size), {}
    draws = found.draw(batch.positions, batch.images.shape[1:], "train")
    assert draws.keep_mask.unique().tolist() == [False, True]
    unet = load_unet(read_inference(inference_path(run, number)))

    def network(x_t, t, embeds, mask, keep, *lowres):
        seen.update(x_t=x_t, t=t, lowres=lowres)
        with torch.no_grad():
            pair = [unet(x_t, t, embeds, mask, kept, *lowres) for kept in (keep, keep & False)]
        return guide(*pair, 2.0)

    found.losses(network, batch)
    predicted = found.schedule.predicted_x_0(
        found.pred_type, seen["x_t"], seen["t"],
        network(seen["x_t"], seen["t"], batch.text_embeds, batch.text_mask, draws.keep_mask,
                *seen["lowres"]),
    )  # fmt: skip
    x_0, lowres_img = found._pictures(batch, draws)
    if kind == "corrected":
        wanted = (predicted + lowres_img).clamp(-1, 1)
    else:
        wanted = dynamic_threshold(predicted, 0.9)
    answer, eps = found.learned(batch, draws, x_0, lowres_img, seen["x_t"])
    torch.testing.assert_close(answer, wanted, atol=2e-4, rtol=2e-4)
    again = found.schedule.q_sample(answer, draws.t, eps)
    torch.testing.assert_close(again, seen["x_t"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [1, 2])
def test_who_knows_the_answers_has_no_loss_and_they_are_drawn_as_always(number, teacher):
    config = configured(teacher, teacher_steps=8)
    found, batch = objective(config, number), make_batch(config.stage(number).size)
    ordinary = Objective(parse_config(json.dumps(TINY), overrides=V).stage(number), CPU)
    shape = batch.images.shape[1:]
    ours, theirs = (one.draw(batch.positions, shape, "train") for one in (found, ordinary))
    for name in ("eps", "keep_mask", "lowres_t", "lowres_eps"):
        pair = getattr(ours, name), getattr(theirs, name)
        assert pair == (None, None) or torch.equal(*pair), name
    assert set(ours.t.tolist()) == {99, 74, 49, 24}
    assert torch.equal(ours.t, 99 - 25 * ((99 - theirs.t) * 4 // 100))
    learned = {}

    def network(x_t, t, *rest):
        return learned["target"]

    x_0, lowres_img = found._pictures(batch, ours)
    x_t = found.schedule.q_sample(x_0, ours.t, ours.eps)
    answer, eps = found.learned(batch, ours, x_0, lowres_img, x_t)
    learned["target"] = found.schedule.target("v", answer, ours.t, eps)
    assert found.losses(network, batch).max() == 0
    alone = found.losses(lambda *_: torch.zeros_like(x_t), batch)
    wanted = learned["target"].square().flatten(1).mean(1) * found.factors[ours.t]
    torch.testing.assert_close(alone, wanted)


def test_a_teacher_in_bf16_answers_nearly_the_same_and_neither_learns(teacher):
    config, batch = configured(teacher, teacher_steps=8), make_batch(16)
    answers = []
    for precision in ("fp32", "bf16"):
        found = objective(config, 1, precision)
        parameters = list(found.teacher.runtime.unet.parameters())
        assert not any(parameter.requires_grad for parameter in parameters)
        draws = found.draw(batch.positions, batch.images.shape[1:], "train")
        x_t = found.schedule.q_sample(batch.images, draws.t, draws.eps).requires_grad_()
        answer, _ = found.learned(batch, draws, batch.images, None, x_t)
        assert not answer.requires_grad
        answers.append(answer)
    assert (answers[0] - answers[1]).abs().mean() < 1e-2 * answers[0].abs().mean()


@pytest.mark.parametrize(
    ("changes", "distill", "said"),
    [
        (("unets.0.pred_type=eps",), {}, "unets.0.pred_type: eps, but where the first step"),
        ((), {"steps": [None, None]}, "distill.steps: null for every U-Net"),
        ((), {"steps": [4, 4, 4]}, "distill.steps: 3 values for 2 U-Nets"),
        ((), {"steps": 17}, "distill.steps: 17 for U-Net 1, where .* at most 16"),
        ((), {"steps": 4, "teacher_steps": 10}, "distill.teacher_steps: 10 .* write 12, or null"),
        ((), {"steps": 1, "teacher_steps": 101}, "distill.teacher_steps: 101, .* 100 times"),
        (("training.start_from=runs/x",), {}, "training.start_from: a student starts from its"),
        (("training.loss_weight=min_snr",), {}, 'loss_weight: "min_snr" counts the first step'),
        (
            ("imagen.loss_type=l1", "training.loss_weight=null"),
            {},
            "imagen.loss_type: l1, but a student's loss is one of weighted squared errors",
        ),
        ((), {"cond_scale": 0.0}, "distill.cond_scale: 0.0 is not allowed"),
    ],
)
def test_a_section_that_cannot_be_is_refused_by_name(changes, distill, said, teacher):
    with pytest.raises(ConfigError, match=said):
        configured(teacher, *changes, **distill)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('unets.0.schedule={"type":"cosine"}', "unets.0.schedule: another than that of U-Net 1"),
        ("unets.0.pred_type=x0", "unets.0.pred_type: another than that of U-Net 1"),
        ("imagen.timesteps=200", "imagen.timesteps: another than that of U-Net 1"),
        ("imagen.image_sizes=[32,64]", "imagen.image_sizes: another than"),
        ("unets.0.dim=16", "unets.0.dim: 16, but .* has 8"),
    ],
)
def test_another_stage_than_the_teachers_is_refused(change, said, teacher, tmp_path):
    with pytest.raises(ConfigError, match=said):
        find_teacher(configured(teacher, change), 1, tmp_path)


def test_a_teacher_in_the_home_is_found(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(teacher.parent))
    found = find_teacher(configured(f"~/{teacher.name}"), 1, tmp_path)
    assert found.file.path == inference_path(teacher, 1)


def test_an_unfinished_and_an_eps_teacher_are_refused_with_what_to_do(tmp_path):
    write_stage(tmp_path / "eps", 1)
    with pytest.raises(ConfigError, match="predicts the noise.*start_from=.*unets.0.pred_type=v"):
        find_teacher(configured(tmp_path / "eps"), 1, tmp_path)
    write_stage(tmp_path / "half", 1, step=3, overrides=V)
    with pytest.raises(ConfigError, match="distill.teacher: U-Net 1 of .*half is half-trained"):
        find_teacher(configured(tmp_path / "half"), 1, tmp_path)
    with pytest.raises(ConfigError, match="distill.teacher: .*none has no trained U-Net 1"):
        find_teacher(configured(tmp_path / "none"), 1, tmp_path)


def test_a_teacher_of_more_steps_than_a_segment_has_times_is_refused(teacher, tmp_path):
    find_teacher(configured(teacher, spacing="middle", teacher_steps=16), 1, tmp_path)
    with pytest.raises(ConfigError, match="80 find no times of their own among the 100"):
        find_teacher(configured(teacher, spacing="middle", teacher_steps=80), 1, tmp_path)


def test_a_student_may_teach_fewer_steps_with_the_guidance_it_has(teacher, tmp_path):
    student = write_teacher(tmp_path / "student", section(teacher))
    assert find_teacher(configured(student, steps=2), 1, tmp_path).file.stage.few_steps.steps == 4
    for distill, said in (
        ({"steps": 4}, "distill.steps: 4 for U-Net 1, but its teacher .* takes 4 itself"),
        ({"steps": 8}, "distill.steps: 8 for U-Net 1, but its teacher .* takes 4 itself"),
        ({"steps": 3, "teacher_steps": 3}, "smaller number that divides 4"),
        ({"steps": 2, "teacher_steps": 8}, "distill.teacher_steps: .* takes 4 .*; write null"),
        ({"steps": 2, "spacing": "middle"}, "distill.spacing: middle, .*; write trailing"),
        ({"steps": 2, "cond_scale": 3.0}, "guidance 2 is built into its teacher .*; write 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_teacher(configured(student, **distill), 1, tmp_path)
    found = objective(configured(student, steps=2), 1)
    assert found.teacher.cond_scale == 1  # its guidance is in its weights
    assert found.segments.times.tolist() == [[99, 74], [49, 24]]
    big = found.teacher.threshold(torch.full((1, 3, 2, 2), 4.0))
    assert big.max() == 4  # nor is it thresholded


def test_a_stage_that_is_not_distilled_is_taken_over_byte_for_byte(teacher, tmp_path):
    config = configured(teacher, steps=[4, None])
    origin = find_teacher(config, 2, tmp_path / "run")
    told = []
    take_over(origin, tmp_path / "run", told.append)
    copied = inference_path(tmp_path / "run", 2)
    assert sha256(copied) == sha256(inference_path(teacher, 2))
    assert "U-Net 2: taken over from" in told[0]
    assert load_config_again(config) == config


def load_config_again(config):
    return parse_config(dump_config(config))


@pytest.fixture(scope="module")
def distilled(teacher, launch, tmp_path_factory):
    """(configuration, run, its teacher, what was said) of a training of few steps."""
    folder = tmp_path_factory.mktemp("few")
    own = shutil.copytree(teacher, folder / "teacher")
    config = folder / "few.json"
    config.write_text(dump_config(configured(own, steps=[4, None], teacher_steps=8)))
    return config, folder / "run", own, launch(config, folder / "run").stdout


@pytest.mark.distributed
def test_a_training_of_few_steps_leaves_an_ordinary_run(distilled):
    _, run, teacher, said = distilled
    before = sha256(inference_path(teacher, 1))
    assert f"U-Net 1: learns 4 steps from 8 of {teacher} (step 6), guidance 2" in said
    assert "U-Net 2: taken over from" in said
    assert sha256(inference_path(run, 2)) == sha256(inference_path(teacher, 2))
    file = read_inference(inference_path(run, 1))
    assert (file.is_finished, file.origin_sha256) == (True, before)
    assert file.stage.few_steps[1:3] == (4, 2.0)
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert any(not torch.equal(value, weights(teacher)[name])
               for name, value in weights(run).items())  # fmt: skip
    assert (run / "samples" / "unet1_step_00000006.png").is_file()
    assert "distance_to_teacher" in (run / "unet1" / "metrics.jsonl").read_text()
    assert load_config(run / "config.json").distill.steps == (4, None)


@pytest.mark.distributed
def test_it_continues_as_the_same_run_and_with_the_same_teacher_only(distilled, launch, tmp_path):
    config, run, teacher, _ = distilled
    cut = shutil.copytree(run, tmp_path / "cut")  # as a kill after step 3 leaves it
    shutil.rmtree(cut / "unet1" / "step_00000006")
    inference_path(cut, 1).unlink()
    changed = shutil.copytree(cut, tmp_path / "changed")
    launch(config, cut, "--unet", "1")
    assert losses(cut) == losses(run)
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(cut).items())

    kept = inference_path(teacher, 1).read_bytes()
    write_stage(teacher, 1, seed=1, overrides=V)
    refused = launch(config, changed, "--unet", "1", check=False)
    assert refused.returncode == 1
    assert "learned from a teacher in" in refused.stderr and "changed since" in refused.stderr
    inference_path(teacher, 1).unlink()  # of what is trained to its end it is not needed
    assert "already trained" in launch(config, cut, "--unet", "1").stdout
    inference_path(teacher, 1).write_bytes(kept)


@pytest.mark.distributed
def test_two_ranks_give_the_curve_of_one(distilled, launch, tmp_path):
    zero = 'deepspeed.zero_optimization={"stage":3,"offload_optimizer":{"device":"cpu"}}'
    changes = (zero, "training.micro_batch=2", "--unet", "1")
    launch(distilled[0], tmp_path / "two", *changes, processes=2)
    assert_same_curve(tmp_path / "two", distilled[1], 1)
