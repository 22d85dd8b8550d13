"""A super-resolution stage on pictures of any kind, through the command."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from imagen_scale.commands.main import main
from imagen_scale.data.sources.images import load_picture, load_whole_picture


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def picture(size=(37, 21), mode="RGB"):
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    return Image.fromarray(levels, mode)


@pytest.mark.parametrize("options", [(), ("--prompt", "a key"), ("--tile", 24, "--steps", 3)])
def test_any_shape_and_the_facts_beside(run, tmp_path, options):
    picture().save(tmp_path / "in.png")
    done = cli("upscale", tmp_path / "in.png", "--run", run, "--steps", 2, *options)
    assert done.exit_code == 0, done.output
    assert "74 x 42 px" in done.output
    with Image.open(tmp_path / "in_x2.png") as image:
        assert image.size == (74, 42)
    facts = json.loads((tmp_path / "in_x2.json").read_text())
    assert facts["prompt"] == ("a key" if "--prompt" in options else None)
    assert facts["cond_scale"] == 1
    assert facts["unet"] == 2


def test_a_name_that_is_no_text_is_told_as_far_as_it_is(run, tmp_path):
    file = os.fsencode(tmp_path) + b"/in\xe9.png"
    picture().save(tmp_path / "in.png")
    shutil.copy(tmp_path / "in.png", file)
    done = cli("upscale", os.fsdecode(file), "--run", run, "--steps", 1)
    assert done.exit_code == 0, done.output
    (facts,) = tmp_path.glob("*.json")
    assert json.loads(facts.read_text())["file"] == "in\\xe9.png"
    assert facts.with_suffix(".png").is_file()


def test_orientation_and_transparency_are_the_data_loaders(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    square = picture((24, 24))
    square.save(tmp_path / "square.png", exif=turned)
    assert (
        load_whole_picture(tmp_path / "square.png") == load_picture(tmp_path / "square.png", 24)
    ).all()
    picture((30, 10)).save(tmp_path / "wide.png", exif=turned)
    assert load_whole_picture(tmp_path / "wide.png").shape == (3, 30, 10)
    picture((24, 24), "RGBA").save(tmp_path / "clear.png")
    whole = load_whole_picture(tmp_path / "clear.png")
    assert (whole == load_picture(tmp_path / "clear.png", 24)).all()


def test_the_network_sees_the_picture(run, tmp_path):
    """Without the text, the same seed on two pictures gives two results."""
    results = []
    for name, level in (("dark", 10), ("light", 240)):
        Image.new("RGB", (20, 20), (level,) * 3).save(tmp_path / f"{name}.png")
        assert cli("upscale", tmp_path / f"{name}.png", "--run", run, "--steps", 2).exit_code == 0
        with Image.open(tmp_path / f"{name}_x2.png") as image:
            results.append(torch.from_numpy(np.asarray(image).astype(float)))
    assert (results[0] - results[1]).abs().max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("gone.png",), "gone.png: no such file"),
        (("broken.png",), "broken.png: not a picture"),
        (("in.png", "--unet", 1), "--unet 1: U-Net 1 makes pictures from text"),
        (("in.png", "--unet", 0), "--unet 0: this cascade has U-Nets 1 to 2"),
        (("in.png", "--unet", 3), "--unet 3: this cascade has U-Nets 1 to 2"),
        (("in.png", "--out", "there.png"), "there.png: exists already"),
        (("in.png", "--out", "q.png"), "q.json: exists already; name another file with --out"),
        (("in.png", "--out", "x.jpg"), "x.jpg: pictures are written as PNG"),
        (("in.png", "--tile", 31), "--tile 31: U-Net 2 takes tiles in multiples of 2"),
        (("in.png", "--cond-scale", 3), "--cond-scale: guidance follows a text"),
        (("in.png", "--steps", "3,4"), "--steps: 2 values for 1 stage"),
    ],
)
def test_wrong_use_is_one_sentence(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    picture().save("there.png")
    (tmp_path / "broken.png").write_text("no")
    (tmp_path / "q.json").write_text("of the user")
    done = cli("upscale", *options, "--run", run)
    assert done.exit_code == 2
    assert message in done.output
    assert (tmp_path / "q.json").read_text() == "of the user"
    assert "Traceback" not in done.output
