"""One sheet over one or two options: each picture is the one that `sample` makes."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from support.tiny import write_checkpoint

from imagen_scale import Cascade
from imagen_scale.commands.main import main
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.files.pictures import MARGIN, MIN_CELL, to_uint8
from imagen_scale.files.sheets import draw_sheet
from imagen_scale.runs.checkpoint_average import averaged_at, kept_steps
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling import prompts
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.sheet import CHECKPOINT, VARIED, plan_sheet, title, values_of
from imagen_scale.sampling.stages import TrainedStages


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
    assert plan_sheet([" red\nsun"], {}).columns.captions == ["red sun"]  # a line of its own


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


def test_a_side_may_compare_with_none(run):
    (facts,) = [facts for facts in VARIED if facts.name == "guidance_interval"]
    assert values_of(facts, "none,0.2:1") == [None, "0.2:1"]
    assert values_of(facts, "none/0:0.5") == [[None, "0:0.5"]]
    done = cli("sheet", "sun", "--threshold", "none,0.9", "--steps", 1, "--run", run)
    assert done.exit_code == 0, done.output


# Over checkpoints -------------------------------------------------------------------------------


@pytest.fixture
def kept(run, tmp_path):
    """A run with checkpoints of both stages."""
    folder = shutil.copytree(run, tmp_path / "kept")
    for number, steps in ((1, (2, 4)), (2, (3,))):
        for step in steps:
            write_checkpoint(folder, number, step)
    return folder


def test_the_average_of_a_checkpoint_is_put_together_from_all_shares(kept):
    trained = read_inference(inference_path(kept, 1))
    expected = write_checkpoint(kept, 1, 5, shares=3)
    assert kept_steps(kept, 1) == [2, 4, 5]
    with averaged_at(kept, trained, 5) as file:
        assert file.step == 5 and read_inference(file.path).average == "checkpoint of step 5"
        found, buffers = load_file(file.path), load_file(trained.path)
    assert found.keys() == buffers.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected.get(name, buffers[name]))
    assert not list(kept.glob(".average*"))


def test_a_damaged_checkpoint_is_named(kept):
    shard = kept / "unet1" / "step_00000002" / "rank_0001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    trained = read_inference(inference_path(kept, 1))
    with pytest.raises(CheckpointError, match="rank_0001"), averaged_at(kept, trained, 2):
        pass


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("500, 1000,last", [500, 1000, "last"]),
        ("all", [2, 4]),
        ("last/all", [["last", 3]]),
        ("4/3,all/last", [[4, 3], [2, "last"], [4, "last"]]),
    ],
)
def test_steps_of_checkpoints_are_written_like_all_values(text, found):
    kept = {1: [2, 4], 2: [3]}
    assert values_of(CHECKPOINT, text, lambda unet: kept[unet]) == found


def test_a_sheet_over_training(kept, tmp_path, monkeypatch):
    encoders = []

    class Counted(prompts.TextEncoder):
        def __init__(self, *arguments):
            encoders.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(prompts, "TextEncoder", Counted)
    out = tmp_path / "s.png"
    flags = ["--run", kept, "--steps", "1", "--out", out]
    done = cli("sheet", "sun", *flags, "--checkpoint", "all,last/3,last")
    assert done.exit_code == 0, done.output
    assert len(encoders) == 1  # for four pictures
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["columns"] == {"name": "checkpoint", "values": [2, 4, ["last", 3], "last"]}
    assert [one["checkpoint"] for one in facts["pictures"][0]] == facts["columns"]["values"]
    assert {name for one in facts["pictures"][0] for name in one["runtimes"]} == {
        "torch fp32 on cpu"
    }
    sheet = np.asarray(Image.open(out))[-MIN_CELL - MARGIN : -MARGIN]
    cells = [sheet[:, MARGIN + c * (MIN_CELL + MARGIN) :][:, :MIN_CELL] for c in range(4)]
    files = TrainedStages.load(kept).files
    with averaged_at(kept, files[0], 4) as base, averaged_at(kept, files[1], 3) as large:
        for column, chosen in ((1, [base, files[1]]), (2, [files[0], large]), (3, files)):
            (made,) = TrainedStages(chosen).sample(["sun"], SamplingOptions.make(steps=1))[1:]
            picture = Image.fromarray(to_uint8(made)[0])
            enlarged = picture.resize((MIN_CELL, MIN_CELL), Image.Resampling.NEAREST)
            np.testing.assert_array_equal(cells[column], np.asarray(enlarged))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "7"], "--checkpoint 7: U-Net 1 of"),
        (["--checkpoint", "7"], "it has those of 2, 4"),
        (["--checkpoint", "newest"], "write steps, all or last"),
        (["--checkpoint", "2/3/1"], "3 values for 2 stage(s)"),
        (["--checkpoint", "2", "--runtime", "onnx"], "an export holds the weights"),
    ],
)
def test_what_was_not_kept_is_said(kept, words, message):
    done = cli("sheet", "sun", "--run", kept, *words)
    assert done.exit_code == 2 and message in done.output, done.output
    none = cli("sheet", "sun", "--run", kept, "--checkpoint", "all,last/last/all")
    assert none.exit_code == 2 and "U-Net 3 has no checkpoint" in none.output


def test_exports_stand_side_by_side(exported, tmp_path):
    out = tmp_path / "s.png"
    flags = ["--run", exported, "--steps", "1", "--out", out]
    done = cli("sheet", "sun", *flags, "--runtime", "torch,onnx")
    assert done.exit_code == 0, done.output
    pictures = json.loads(out.with_suffix(".json").read_text())["pictures"][0]
    assert [one["runtimes"][0].split()[0] for one in pictures] == ["torch", "onnxruntime"]


def test_a_prompt_is_encoded_once_for_all_pictures(run):
    files = TrainedStages.load(run, unet_limit=1).files
    options, remembered = SamplingOptions.make(steps=1), {}
    (first,) = TrainedStages(files, remembered=remembered).sample(["sun"], options)
    # To encode again would be refused.
    strange = [file._replace(text_fingerprint="another") for file in files]
    (again,) = TrainedStages(strange, remembered=remembered).sample(["sun"], options)
    assert (first == again).all()
    with pytest.raises(CheckpointError, match="another version of the text encoder"):
        TrainedStages(strange, remembered=remembered).sample(["key"], options)
