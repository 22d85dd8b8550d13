"""`training.recipe` fills in what is not written, and says so."""

import json

import pytest
from click.testing import CliRunner
from support import ROOT
from support.tiny import TINY

from imagen_scale.commands.main import main
from imagen_scale.config import dump_config, load_config, parse_config, told_of_recipe
from imagen_scale.errors import ConfigError

SEEDS_BLOCK = ROOT / "configs" / "pokemon_64.json"


def test_one_word_changes_the_seeds_block_and_says_what():
    plain = load_config(SEEDS_BLOCK)
    assert told_of_recipe(plain) == ""
    assert (plain.unets[0].pred_type, plain.stage(1).loss_weight) == ("eps", None)
    modern = load_config(SEEDS_BLOCK, ("training.recipe=modern",))
    stage = modern.stage(1)
    assert (stage.unet.pred_type, stage.loss_weight, stage.lr) == ("x0", "v_clipped", 5e-4)
    assert stage.unet.schedule.type == "cosine"
    assert told_of_recipe(modern) == (
        "training.recipe modern: unets.0.pred_type x0, unets.0.schedule cosine, "
        "training.loss_weight v_clipped, training.lr 0.0005; written otherwise and kept: "
        "imagen.dynamic_thresholding_percentile 0.9 (the recipe: null)"
    )


def test_what_is_written_is_kept_and_named():
    training = TINY["training"] | {"recipe": "modern"}
    config = parse_config(json.dumps(TINY | {"training": training}))
    assert config.unets[1].pred_type == "v"  # written there
    assert config.training.lr == 1e-3
    told = told_of_recipe(config)
    assert "imagen.dynamic_thresholding_percentile null" in told
    assert "written otherwise and kept: unets.1.pred_type v (the recipe: x0), " in told
    assert told.endswith("training.lr 0.001 (the recipe: 0.008)")


@pytest.mark.parametrize("written", ["null", '{"shift_from":64}', '{"type":"linear"}'])
def test_a_schedule_that_is_written_is_told_whatever_of_it_is(written):
    config = load_config(SEEDS_BLOCK, ("training.recipe=modern", f"unets.0.schedule={written}"))
    kind = "null" if written == "null" else "linear"
    assert f"unets.0.schedule {kind} (the recipe: cosine)" in told_of_recipe(config)


def test_a_network_that_predicts_noise_keeps_the_plain_loss(modern):
    """Weighed like a picture's, nearly all of its loss would be that of the last times."""
    for written, weights in (
        (("eps", "eps"), (None, None)), (("eps", "x0"), (None, "v_clipped")),
        (("x0", "v"), ("v_clipped", "v_clipped")),
    ):  # fmt: skip
        for unet, pred_type in zip(modern["unets"], written, strict=True):
            unet["pred_type"] = pred_type
        config = parse_config(json.dumps(modern))
        assert tuple(stage.loss_weight for stage in config.stages()) == weights
    modern["unets"][0]["pred_type"] = "eps"
    told = told_of_recipe(parse_config(json.dumps(modern)))
    assert 'training.loss_weight [null, "v_clipped"], ' in told


@pytest.fixture
def modern():
    """Both stages of TINY, with nothing written that the recipe fills in."""
    unets = [{k: v for k, v in unet.items() if k != "pred_type"} for unet in TINY["unets"]]
    training = {k: v for k, v in TINY["training"].items() if k != "lr"} | {"recipe": "modern"}
    return TINY | {"unets": unets, "training": training}


def test_super_resolution_is_a_correction_that_trusts_its_input(modern):
    config = parse_config(json.dumps(modern))
    assert [unet.pred_type for unet in config.unets] == ["x0", "x0"]
    assert [unet.lowres_residual for unet in config.unets] == [False, True]
    assert config.training.lowres_aug_max == 0.2
    assert config.imagen.lowres_sample_noise_level == 0.02


def test_a_runs_own_file_gives_the_same_again(modern):
    config = parse_config(json.dumps(modern))
    again = parse_config(dump_config(config))
    assert again == config
    assert told_of_recipe(again) == told_of_recipe(config)


def test_rates_follow_the_width(modern):
    for dim, lr in ((16, 0.004), (32, 0.002), (128, 0.0005), (256, 0.0003), (512, 0.0001)):
        modern["unets"][0] = modern["unets"][0] | {"dim": dim}
        config = parse_config(json.dumps(modern))
        assert config.stage(1).lr == lr
        assert config.stage(2).lr == 0.008


@pytest.mark.parametrize("unets", [None, [], [3], {}, [{"dim": "wide"}]])
def test_a_wrong_configuration_is_explained_as_without(unets):
    text = json.dumps({"imagen": {"image_sizes": [16]}, "unets": unets,
                       "training": {"recipe": "modern"}})  # fmt: skip
    with pytest.raises(ConfigError, match="unets"):
        parse_config(text)


def test_no_such_recipe():
    with pytest.raises(ConfigError, match='training.recipe: "new" is not allowed'):
        load_config(SEEDS_BLOCK, ("training.recipe=new",))


def test_checking_says_what_it_set():
    done = CliRunner().invoke(
        main, ["config", "check", str(SEEDS_BLOCK), "--set", "training.recipe=modern"]
    )
    assert done.exit_code == 0, done.output
    assert "training.recipe modern: unets.0.pred_type x0" in done.output
