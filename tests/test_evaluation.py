"""The measures against values known in closed form, and the command around them."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from support.tiny import write_stage
from support.tiny_models import write_clip, write_vit

from imagen_scale.commands.main import main
from imagen_scale.config import parse_config
from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.sequence import split_indices
from imagen_scale.errors import DataError, MissingExtraError, ShapeError
from imagen_scale.evaluation.distances import clip_score, frechet_distance, kernel_distance
from imagen_scale.evaluation.features import Clip, open_extractor
from imagen_scale.evaluation.measurement import Evaluation, Known, StageMeasures, evaluate
from imagen_scale.evaluation.report import as_dict, not_finite
from imagen_scale.report.measures import rows
from imagen_scale.runs.records import EvaluationRecord
from imagen_scale.sampling.measures import (
    ColourTally,
    drift,
    lowres_consistency_db,
    nearest_distance,
    psnr_db,
    retrieval_accuracy,
    ssim,
)
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.stages import TrainedStages


def pictures(count, side, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_retrieval_counts_nearest_neighbours():
    real = pictures(10, 16)
    assert retrieval_accuracy(real + 0.05, real, 8) == 1
    assert retrieval_accuracy(real.roll(1, dims=0), real, 8) == 0
    half = real.clone()
    half[:5] = real[5:]
    assert retrieval_accuracy(half, real, 8) == 0.5


def test_psnr_of_a_known_error():
    real = torch.zeros(2, 3, 4, 4)
    # An error of 0.2 on a range of 2 is 20 dB.
    assert psnr_db(real + 0.2, real).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert psnr_db(real, real).isinf().all()


# ---------------------------------------------------------------------------- SSIM


@pytest.mark.parametrize("side", [4, 11, 32])
def test_ssim_of_equal_pictures_is_1(side):
    real = pictures(3, side)
    assert ssim(real, real).tolist() == pytest.approx([1] * 3, abs=1e-6)


def test_ssim_of_two_solid_colours_is_the_luminance_term():
    a, b, c1 = 0.5, 0.75, 0.01**2
    solid = torch.full((1, 3, 16, 16), 2 * a - 1), torch.full((1, 3, 16, 16), 2 * b - 1)
    assert ssim(*solid).item() == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-6)


def test_ssim_of_a_negative_is_minus_its_structure():
    """Around a mean of 1/2 the negative has the same variance and the opposite covariance."""
    checks = (torch.arange(24)[:, None] + torch.arange(24)) % 2 * 1.0 - 0.5
    real = checks.expand(1, 3, 24, 24)
    # Locally the mean is 1/2 and the variance 1/16 (levels 1/4 and 3/4), but for the window's edge.
    c2 = 0.03**2
    expected = (-2 / 16 + c2) / (2 / 16 + c2)
    assert ssim(-real, real).item() == pytest.approx(expected, abs=2e-3)


def test_ssim_is_that_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    real = pictures(4, 32)
    images = (real + 0.3 * pictures(4, 32, seed=1)).clamp(-1, 1)
    _, places = structural_similarity_index_measure(
        (images + 1) / 2, (real + 1) / 2, data_range=1.0, return_full_image=True
    )
    inside = places[:, :, 5:-5, 5:-5]  # theirs goes on over a mirrored margin
    assert torch.allclose(ssim(images, real), inside.flatten(1).mean(1), atol=1e-5)


# ---------------------------------------------------------------------------- colours, consistency


def test_colour_is_mean_and_spread_over_all_pixels():
    tally = ColourTally()
    real = pictures(6, 8)
    for part in real.split(4):
        tally.add(part)
    levels = ((real + 1) / 2).transpose(0, 1).flatten(1)
    assert tally.colour().mean == pytest.approx(levels.mean(1).tolist(), abs=1e-6)
    assert tally.colour().std == pytest.approx(levels.std(1, correction=0).tolist(), abs=1e-6)


def test_drift_is_that_of_the_colour_furthest_off():
    assert drift([0.5, 0.2, 0.4], [0.4, 0.5, 0.4]) == pytest.approx(-0.3)
    assert drift([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) == 0


def test_consistency_sees_a_shift_of_brightness_and_no_fine_detail():
    lowres = 0.5 * pictures(2, 8)
    enlarged = lowres.repeat_interleave(4, -1).repeat_interleave(4, -2)
    same = lowres_consistency_db(enlarged, lowres)
    shifted = lowres_consistency_db(enlarged + 0.2, lowres)
    assert (same > shifted).all() and (shifted < 21).all()
    # One grey shrinks to itself: a shift of 0.2 on a range of 2 is 20 dB.
    grey = torch.zeros(1, 3, 8, 8)
    assert lowres_consistency_db(torch.full((1, 3, 32, 32), 0.2), grey).item() == pytest.approx(20)


# ---------------------------------------------------------------------------- FID, KID, CLIP score


def gaussian(count, mean, scale, seed):
    """Features whose sample mean and covariance are exactly `mean` and diag(scale²)."""
    dims = len(mean)
    draws = torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)).double()
    draws -= draws.mean(0)
    draws = draws @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(draws.T))).T
    return draws * torch.tensor(scale).double() + torch.tensor(mean).double()


def test_fid_of_two_known_gaussians():
    """Of diagonal covariances: |m1 - m2|² + sum (s1 - s2)²."""
    one = gaussian(200, [0, 0, 0], [1, 2, 3], seed=0)
    two = gaussian(300, [1, 0, 2], [2, 2, 1], seed=1)
    assert frechet_distance(one, two) == pytest.approx((1 + 4) + (1 + 0 + 4), rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_estimator():
    """Gretton et al. 2012, equation 3, written out in loops."""
    generated, real = torch.randn(5, 4).double(), torch.randn(7, 4).double()[:5] + 0.5

    def kernel(x, y):
        return ((x @ y) / 4 + 1) ** 3

    n = 5
    within = sum(
        kernel(s[i], s[j])
        for s in (generated, real) for i in range(n) for j in range(n) if i != j
    )  # fmt: skip
    between = sum(kernel(x, y) for x in generated for y in real)
    expected = within / (n * (n - 1)) - 2 * between / n**2
    assert kernel_distance(generated, real) == pytest.approx(expected.item(), rel=1e-6)


def test_kid_draws_the_same_subsets_every_time(monkeypatch):
    monkeypatch.setattr("imagen_scale.evaluation.distances.KID_SUBSET_SIZE", 20)
    sets = torch.randn(50, 4), torch.randn(50, 4) + 1
    state = torch.random.get_rng_state()
    assert kernel_distance(*sets) == kernel_distance(*sets)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_distances_need_two_pictures():
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ShapeError, match="1 picture has no covariance.*num"):
            distance(torch.randn(1, 4), torch.randn(5, 4))


def test_clip_score_is_the_mean_cosine_and_never_below_0():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, -1.0], [5.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx((100 + 0 + 100 / 2**0.5) / 3)


# ---------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_clip(folder / "clip"), write_vit(folder / "vit")


def test_networks_give_one_vector_for_each_picture_whatever_the_batch(models, monkeypatch):
    images = pictures(5, 32)
    for folder, width in zip(models, (8, 16), strict=True):
        extractor = open_extractor(str(folder))
        features = extractor(images)
        assert features.shape == (5, width) and features.dtype == torch.float32
        monkeypatch.setattr("imagen_scale.evaluation.features.AT_ONCE", 2)
        assert torch.allclose(extractor(images), features, atol=1e-5)
        monkeypatch.undo()


def test_a_network_comes_without_a_download(monkeypatch):
    extractor = open_extractor("efficientnet-lite0")
    images = pictures(5, 32)
    features = extractor(images)
    assert features.shape == (5, 1280) and features.dtype == torch.float32
    monkeypatch.setattr("imagen_scale.evaluation.features.AT_ONCE", 2)
    assert torch.allclose(extractor(images), features, atol=1e-5)
    # Trained: what is hardly changed is near, another picture is far.
    near = (extractor((images + 0.02).clamp(-1, 1)) - features).norm(dim=1)
    assert near.max() < 0.5 * (features[1:] - features[:-1]).norm(dim=1).min()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtraError, match=r"packages are missing.*imagen-scale\[evaluate\]"):
        open_extractor("efficientnet-lite0")


def test_clip_encodes_captions_of_any_length(models):
    clip = Clip(str(models[0]))
    features = clip.encode(["red heart", "a" * 1000])
    assert features.shape == (2, 8) and not torch.equal(features[0], features[1])


def test_networks_that_are_not_to_be_had(models, tmp_path):
    vit = models[1]
    with pytest.raises(DataError, match=r"features 'no/such': is no folder.*give its folder"):
        open_extractor("no/such")
    with pytest.raises(DataError, match=r"clip 'no/such': is no folder"):
        Clip("no/such")
    with pytest.raises(DataError, match="holds a vit model, which knows no captions"):
        Clip(str(vit))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be loaded.*\*\.safetensors"):
        open_extractor(str(tmp_path))
    with pytest.raises(DataError, match=r"features weights.pth: no such file"):
        open_extractor("weights.pth")


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match=r"needs torch-fidelity.*pip install"):
        open_extractor("inception")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(MissingExtraError, match=r"torchmetrics.*imagen-scale\[evaluate\]"):
        frechet_distance(torch.randn(5, 2), torch.randn(5, 2))


# ---------------------------------------------------------------------------- a cascade


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A cascade of random weights whose data set holds pictures out."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for number in (1, 2):
        write_stage(folder, number, overrides=("data.val_fraction=0.5",))
    return folder


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_groups_and_stages_add_up_to_the_same_measures(run, monkeypatch):
    cascade = TrainedStages.load(run)
    prepared = prepare(cascade.files[0].config)
    train = split_indices(prepared.source.keys, 0.5)[0]
    whole = evaluate(cascade, prepared, range(5), train, options=SamplingOptions(steps=2))
    monkeypatch.setattr("imagen_scale.evaluation.measurement.GROUP", 2)
    parts = evaluate(cascade, prepared, range(5), train, options=SamplingOptions(steps=2))
    for one, other in zip(whole.stages, parts.stages, strict=True):
        assert one.retrieval_accuracy == other.retrieval_accuracy
        assert one.generated_colour.mean == pytest.approx(other.generated_colour.mean, abs=1e-5)
    assert whole.stages[1].restoration == pytest.approx(parts.stages[1].restoration, abs=1e-3)
    assert whole.stages[0].restoration is None and whole.stages[0].fid is None


def test_where_nothing_was_trained_on_no_nearest_picture_is_looked_for(run):
    cascade = TrainedStages.load(run)
    prepared = prepare(cascade.files[0].config)
    found = evaluate(cascade, prepared, range(1), [], options=SamplingOptions(steps=1), num_seeds=2)
    assert found.known == 0 and found.stages[0].nearest_train is None
    assert found.stages[0].diversity.other_captions is None  # of one caption
    facts = as_dict(found) | {"split": "held-out"}
    names = [row.name for row in rows(EvaluationRecord.model_validate(facts))]
    assert "difference between seeds, of 255" in names and "  between captions" not in names
    assert not any("nearest training picture" in name for name in names)


def test_of_many_training_pictures_as_many_as_said_are_looked_at(run, monkeypatch):
    prepared = prepare(TrainedStages.load(run).files[0].config)
    every = list(range(len(prepared.source)))
    monkeypatch.setattr("imagen_scale.evaluation.measurement.MOST_KNOWN", len(every) - 1)
    assert Known(prepared, every, [], 16).looked_at == len(every) - 1


def test_pictures_drawn_again_are_found(run):
    prepared = prepare(TrainedStages.load(run).files[0].config)
    train, held_out = split_indices(prepared.source.keys, 0.5)
    known = Known(prepared, train, held_out, 16)
    again, new = (real_pictures(prepared, some, 32) for some in (train[:3], held_out))
    small = real_pictures(prepared, train[:3], 16)
    assert known.are_others and known.nearest(small).max() < 1e-6
    assert known.nearest(again).max() < 0.03 < known.nearest(new).min()  # at any size
    assert not Known(prepared, train, train[:1], 16).are_others
    # By hand: all values off by 0.3, which is 0.15 of the levels; and the nearer of two.
    one, other = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    distances = nearest_distance(torch.cat((one + 0.3, other - 0.1)), torch.cat((one, other)))
    assert distances.tolist() == pytest.approx([0.15, 0.05], abs=1e-5)


def test_few_training_pictures_are_decoded_to_find_the_nearest_and_it_is_said(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr("imagen_scale.evaluation.measurement.MOST_DECODED", 2)
    config = TrainedStages.load(run).files[0].config
    decoding = parse_config(config.model_dump_json(), overrides=["data.cache_images_gb=0"])
    prepared = prepare(decoding)
    reads = []
    read = prepared.source.image

    def counted(i, size):
        reads.append(i)
        return read(i, size)

    monkeypatch.setattr(prepared.source, "image", counted)
    everything = range(len(prepared.source.keys))
    known = Known(prepared, everything, [], 16)
    assert known.looked_at == len(reads) == 2 < len(everything)
    assert Known(prepare(config), everything, [], 16).looked_at == len(everything)
    monkeypatch.setattr("imagen_scale.evaluation.measurement.MOST_KNOWN", 2)
    write_stage(tmp_path / "all", 1)  # which holds nothing out
    done = cli("evaluate", "--run", tmp_path / "all", "--steps", 1, "--num", 1, "--unet-limit", 1,
               "--json")  # fmt: skip
    assert json.loads(done.stdout)["known"] == 2, done.output
    assert "the nearest training picture is looked for among 2 of 6" in done.stderr


def test_command_writes_and_prints_every_measure(run, models):
    clip, vit = models
    done = cli("evaluate", "--run", run, "--steps", 2, "--features", vit, "--clip", clip,
               "--seed", 3, "--seeds", 2, "--allow-unfinished")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((run / "evaluation.json").read_text())
    config = parse_config((run / "config.json").read_text())
    held_out = split_indices(prepare(config).source.keys, 0.5)[1]
    assert report["split"] == "held-out" and report["captions"] == len(held_out) >= 2
    assert report["seed"] == 3 and [one["steps"] for one in report["settings"]] == [2, 2]
    for stage in report["stages"]:
        for name in (
            "retrieval_accuracy",
            "nearest_train",
            "real_nearest_train",
            "fid",
            "kid",
            "clip_score",
            "real_clip_score",
        ):
            assert isinstance(stage[name], float), name
    base, large = report["stages"]
    assert base["restoration"] is None and base["lowres_consistency_db"] is None
    assert base["diversity"]["seeds"] == 2 and base["diversity"]["same_caption"] > 0
    assert large["diversity"] is None
    assert set(large["restoration"]) == {"psnr_db", "bicubic_psnr_db", "ssim", "bicubic_ssim"}
    for row in ("retrieval (chance", "colour drift", "low-resolution input", "SSIM", "FID", "KID",
                "CLIP score", "held-out pictures", "difference between seeds"):  # fmt: skip
        assert row in done.output, row


def test_command_prints_json_and_leaves_out_what_was_not_asked_for(run):
    done = cli("evaluate", "--run", run, "--steps", 1, "--split", "train", "--num", 1, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["split"] == "train" and report["captions"] == 1
    assert report["stages"][0]["real_nearest_train"] is None
    assert report["stages"][0]["fid"] is None and report["stages"][1]["clip_score"] is None


def test_command_says_when_nothing_was_held_out(tmp_path):
    for number in (1, 2):
        write_stage(tmp_path / "run", number)
    done = cli("evaluate", "--run", tmp_path / "run", "--steps", 1, "--num", 2)
    assert done.exit_code == 0 and "measured on pictures that it was trained on" in done.stderr
    done = cli("evaluate", "--run", tmp_path / "run", "--split", "held-out")
    assert done.exit_code == 2 and "--split held-out: no picture is in it" in done.output


def test_command_refuses_wrong_use_before_the_work(run, models):
    done = cli("evaluate", "--run", run, "--features", "no/such")
    assert done.exit_code == 2 and "--features 'no/such'" in done.output
    done = cli("evaluate", "--run", run, "--features", models[1], "--num", 1)
    assert done.exit_code == 2 and "1 picture has no FID" in done.output


def test_command_measures_the_stages_there_are(tmp_path):
    write_stage(tmp_path / "run", 1)
    done = cli("evaluate", "--run", tmp_path / "run", "--steps", 1, "--num", 2)
    assert done.exit_code == 1 and "--unet-limit 1" in done.output
    done = cli("evaluate", "--run", tmp_path / "run", "--steps", 1, "--num", 2, "--unet-limit", 1)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [stage["unet"] for stage in report["stages"]] == [1]


def test_what_is_no_finite_number_is_left_out_and_named():
    stage = StageMeasures._make([None] * len(StageMeasures._fields))._replace(
        unet=1, size=16, x_0_error=float("inf"), kid=0.5
    )
    result = Evaluation._make([None] * len(Evaluation._fields))._replace(stages=[stage])
    assert not_finite(result) == ["x_0_error of U-Net 1"]
    facts = as_dict(result)["stages"][0]
    assert (facts["x_0_error"], facts["kid"]) == (None, 0.5)
