"""A first configuration: what it is made from, and that it can be trained as it is."""

import json
import shlex

import pytest
from click.testing import CliRunner
from PIL import Image
from support import ROOT

from imagen_scale.commands.main import main
from imagen_scale.config import load_config, parse_config
from imagen_scale.data.encoder import encoder_folder
from imagen_scale.planning.sizing import DEMO, LARGE, MIDDLE, Seen, choose, nested

GB = 10**9


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def chosen(seen, card):
    return {choice.key: choice for choice in choose(seen, card)}


@pytest.mark.parametrize(
    ("size", "name"),
    [(DEMO, "emoji_demo"), (MIDDLE, "pokemon_64_256"), (LARGE, "cascade_64_256")],
)
def test_the_networks_are_those_that_are_shipped(size, name):
    shipped = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    for ours, theirs in zip(size.unets, shipped["unets"], strict=True):
        written = {"channels", "channels_out", "cond_dim", "text_embed_dim", "lowres_cond"}
        theirs = {key: value for key, value in theirs.items() if key not in written}
        theirs = {key: theirs[key] for key in ours}
        assert ours == theirs
    assert list(size.sides) == shipped["imagen"]["image_sizes"]


@pytest.mark.parametrize(
    ("pictures", "card", "size"),
    [
        (800, None, DEMO),
        (800, 12 * GB, MIDDLE),
        (80_000, 12 * GB, LARGE),
        (80_000, 8 * GB, MIDDLE),
        (80_000, None, DEMO),
    ],
)
def test_networks_follow_the_card_and_the_number_of_pictures(pictures, card, size):
    found = chosen(Seen(pictures, [512, 600, 700], 10), card)
    assert [unet["dim"] for unet in found["unets"].value] == [unet["dim"] for unet in size.unets]
    assert found["imagen.image_sizes"].value == list(size.sides)
    config = nested(choose(Seen(pictures, [512], 10), card))
    config |= {"data": {"source": "emoji"}}
    config["imagen"]["text_encoder_name"] = "minilm"
    assert parse_config(json.dumps(config)).training.recipe == "modern"


def test_small_pictures_take_the_base_stage_alone():
    found = chosen(Seen(800, [90, 100, 400], 10), 12 * GB)
    assert found["imagen.image_sizes"].value == [64]
    assert "would learn to blur" in found["imagen.image_sizes"].why
    assert len(found["unets"].value) == len(found["training.steps"].value) == 1


@pytest.mark.parametrize(("tokens", "limit"), [(2, 8), (8, 8), (9, 16), (77, 128), (400, 256)])
def test_prompts_are_read_as_far_as_captions_go(tokens, limit):
    unets = chosen(Seen(800, [], tokens), 12 * GB)["unets"].value
    assert [unet["max_text_len"] for unet in unets] == [limit, limit]


@pytest.mark.parametrize(("pictures", "steps"), [(60, 10_000), (400, 50_000), (5000, 100_000)])
def test_small_sets_are_trained_for_fewer_steps(pictures, steps):
    assert chosen(Seen(pictures, [512], 9), 12 * GB)["training.steps"].value == [steps, steps]
    assert chosen(Seen(pictures, [512], 9), 12 * GB)["data.val_fraction"].value > 0
    assert chosen(Seen(30, [512], 9), 12 * GB)["data.val_fraction"].value == 0


def written(folder):
    """A folder of three pictures with captions."""
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (80, 90), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a sun")
    return folder


def test_the_command_looks_writes_and_gives_reasons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "mine")
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes())
    done = cli("init", "mine", "--encoder", "minilm")
    assert done.exit_code == 0, done.output
    for words in (
        "3 pictures with captions", "noted: 1 are left out", "training.steps", "passes over 3",
        "U-Net 1: ", "M parameters", "GB on disk when trained", "written: mine.json",
        "imagen-scale train mine.json",
    ):  # fmt: skip
        assert words in done.output
    config = load_config(tmp_path / "mine.json")
    assert config.data.path == "mine" and config.data.flip
    assert '"dim_mults": [1, 2, 4]' in (tmp_path / "mine.json").read_text()
    again = cli("init", "mine")
    assert again.exit_code == 2 and "mine.json: exists already" in again.output


def test_a_damaged_picture_is_noted_and_the_others_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "mine")
    (folder / "1.png").write_bytes(b"no picture")
    done = cli("init", "mine", "--encoder", "minilm")
    assert done.exit_code == 0, done.output
    assert "noted: 1 of the 3 looked at cannot be read, e.g. 1.png: not a picture" in done.output
    assert (tmp_path / "mine.json").is_file()


def test_pictures_that_are_all_damaged_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for picture in written(tmp_path / "mine").glob("*.png"):
        picture.write_bytes(b"no picture")
    done = cli("init", "mine", "--encoder", "minilm")
    assert done.exit_code == 2
    assert "mine: no picture can be used. 0.png: not a picture" in done.output
    assert not (tmp_path / "mine.json").exists()


def test_a_folder_of_any_name_is_written_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "birds  [ 1,   2 ] 'of mine'"
    written(tmp_path / name)
    done = cli("init", name, "--encoder", "minilm")
    assert done.exit_code == 0, done.output
    assert load_config(tmp_path / f"{name}.json").data.path == name
    following = done.output.partition("next: ")[2].splitlines()
    commands = ("imagen-scale prepare --config", "imagen-scale train")
    for line, words in zip(following, commands, strict=True):
        assert shlex.split(line) == [*words.split(), f"{name}.json"]


@pytest.mark.parametrize(
    ("at", "where", "name"),
    [("mine", ".", "mine.json"), ("mine/deep", "..", "mine.json"), (".", ".hidden", "hidden.json")],
)
def test_the_file_is_named_after_the_folder(tmp_path, monkeypatch, at, where, name):
    for folder in ("mine", ".hidden"):
        written(tmp_path / folder)
    (tmp_path / "mine" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / at)
    done = cli("init", where, "--encoder", "minilm")
    assert done.exit_code == 0, done.output
    assert f"written: {name}" in done.output
    assert load_config(name).data.path == where


def test_an_encoder_of_ones_own_is_written_with_its_width(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(encoder_folder("minilm"))
    done = cli("init", "--encoder", folder)
    assert done.exit_code == 0, done.output
    imagen = load_config("emoji.json").imagen
    assert (imagen.text_encoder_name, imagen.text_embed_dim) == (folder, 384)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "no such folder, and no name on the Hugging Face hub"),
        ("pictures/nowhere", "no such folder, and no name on the Hugging Face hub"),
        ("./a/b", "no such folder"),
        ("~nobody-here/x", "~nobody-here/x: no such folder"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, monkeypatch, where, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    done = cli("init", where)
    assert done.exit_code == 2 and message in done.output


def test_a_folder_without_usable_pictures_is_said(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = cli("init", tmp_path, "--out", tmp_path / "x.json")
    assert done.exit_code == 2
    assert "no picture can be used. a.png: has no caption" in done.output


def test_a_configuration_without_its_pictures_leads_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("prepare", "--config", ROOT / "configs" / "cascade_64_256.json")
    assert done.exit_code == 2
    assert "data.path: 'data/pictures' is not a folder" in done.output
    assert "`imagen-scale init FOLDER` writes a configuration for yours" in done.output
    assert "takes the embedded emoji" in done.output
