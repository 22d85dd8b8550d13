"""One sheet over one or two options: each picture is the one that `sample` makes."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from imagen_scale import Cascade
from imagen_scale.commands.main import main
from imagen_scale.errors import UsageError
from imagen_scale.files.pictures import MARGIN, MIN_CELL
from imagen_scale.files.sheets import draw_sheet
from imagen_scale.sampling.sheet import VARIED, plan_sheet, title, values_of


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def values(name, text):
    (facts,) = [facts for facts in VARIED if facts.name == name]
    return values_of(facts, text)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("cond_scale", "0.1, 3,5", [0.1, 3.0, 5.0]),
        ("steps", "25/10,50", [[25, 10], 50]),
        ("sampler", "ddim,heun/ddim", ["ddim", ["heun", "ddim"]]),
        ("negative_prompt", "dark, blurred", ["dark, blurred"]),
    ],
)
def test_commas_are_the_sheets_and_slashes_the_stages(name, text, found):
    assert values(name, text) == found


def test_numbers_are_needed_where_there_are_numbers():
    with pytest.raises(UsageError, match="steps 'many': write numbers"):
        values("steps", "many")


def test_rows_and_columns_and_what_all_have_in_common():
    varied = {"cond_scale": [1.0, 3.0], "steps": [5, 10, [20, 5]], "seed": [7]}
    plan = plan_sheet(["sun"], varied)
    assert plan.rows.captions == ["guidance 1", "guidance 3"]
    assert plan.columns.captions == ["steps 5", "steps 10", "steps 20/5"]
    assert title(plan, varied) == "sun, seed 7"
    for r, scale in enumerate((1.0, 3.0)):
        for c, steps in enumerate((5, 10, (20, 5))):
            options = plan.cells[r][c].options
            assert (options.cond_scale, options.steps, options.seed) == (scale, steps, 7)
    prompts = plan_sheet(["sun", "key"], {"steps": [1, 2]})
    assert prompts.rows.captions == ["sun", "key"] and prompts.columns.name == "steps"
    assert plan_sheet(["sun"], {}).columns.captions == ["sun"]


@pytest.mark.parametrize(
    ("prompts", "varied", "message"),
    [
        (["a", "b"], {"steps": [1, 2], "seed": [1, 2]}, "3 options with several values"),
        (["a"], {"seed": list(range(101))}, "more than 100 pictures"),
        (["a"], {"steps": [1, 0]}, "steps 0: it should be"),
        (["a"], {"runtime": ["torch", "onyx"]}, "runtime 'onyx': it should be"),
    ],
)
def test_what_is_no_sheet_is_said(prompts, varied, message):
    with pytest.raises(UsageError, match=message):
        plan_sheet(prompts, varied)


def test_pictures_stand_where_their_captions_are():
    cells = [[np.full((8, 8, 3), 60 * r + 20 * c, np.uint8) for c in range(3)] for r in range(2)]
    drawn = draw_sheet(cells, columns=["a", "b", "c"], rows=["", ""], title="t")
    top = drawn.shape[0] - 2 * (MIN_CELL + MARGIN)
    for r in range(2):
        for c in range(3):
            y, x = top + r * (MIN_CELL + MARGIN), MARGIN + c * (MIN_CELL + MARGIN)
            assert (drawn[y : y + MIN_CELL, x : x + MIN_CELL] == 60 * r + 20 * c).all()
    labelled = draw_sheet(cells, columns=["a", "b", "c"], rows=["long label", "b"], title="t")
    assert labelled.shape[1] > drawn.shape[1]


def test_the_command_makes_the_pictures_of_sample(run, tmp_path):
    out = tmp_path / "s.png"
    flags = ["--run", run, "--steps", "1,2/1", "--cond-scale", "1,4", "--seed", "5", "--out", out]
    done = cli("sheet", "sun", *flags, "--runtime", "torch")
    assert done.exit_code == 0, done.output
    assert f"4 pictures in {out}" in done.output
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["rows"] == {"name": "steps", "values": [1, [2, 1]]}
    assert facts["columns"]["name"] == "cond_scale"
    assert facts["pictures"][1][1]["stages"][0]["steps"] == 2
    assert facts["pictures"][1][1]["stages"][0]["cond_scale"] == 4
    assert facts["pictures"][0][0]["seed"] == 5
    sheet = np.asarray(Image.open(out))
    (expected,) = Cascade.load(run).sample("sun", steps=[2, 1], cond_scale=4.0, seed=5)
    last = sheet[-MIN_CELL - MARGIN : -MARGIN, -MIN_CELL - MARGIN : -MARGIN]
    enlarged = expected.resize((MIN_CELL, MIN_CELL), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(last, np.asarray(enlarged))
    assert cli("sheet", "sun", *flags).exit_code == 2  # it is there


def test_sheets_are_numbered_with_the_runs_pictures(run, tmp_path):
    for _ in range(2):
        done = cli("sheet", "sun", "key", "--run", run, "--steps", "1", "--unet-limit", "1")
        assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (run / "samples").glob("sheet_*.png"))
    assert names == ["sheet_00001.png", "sheet_00002.png"]


def test_wrong_use_is_one_sentence(run):
    for words, message in (
        ((), "no prompt"),
        (("sun", "--steps", "x"), "--steps 'x': write numbers"),
        (("sun", "--sampler", "ddim,euler"), "--sampler 'euler': it should be"),
        (("sun", "--runtime", "torch,onnx"), "has no onnx export"),
    ):
        done = cli("sheet", *words, "--run", run, "--unet-limit", 1)
        assert done.exit_code in (1, 2) and message in done.output, done.output
        assert "Traceback" not in done.output
