"""What `prepare` tells of a data set, its estimate and its contact sheet."""

import json
import random
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import ExifTags, Image
from support.kept import OTHER_JSON
from support.tiny import TINY

from imagen_scale.commands.main import main
from imagen_scale.data.sequence import split_indices
from imagen_scale.data.sources.images import picture_size
from imagen_scale.files.pictures import save_grid

# Width, height; the second is stored lying on its side.
SIZES = [(64, 64), (40, 80), (90, 60), (20, 24), (300, 100), (100, 300)]


@pytest.fixture
def config(tmp_path):
    """A folder of six pictures, a copy of the first and a broken one; stages of 16 and 32 px."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows, draw = [], np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        if i == 1:
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[ExifTags.Base.Orientation] = 6
        image.save(folder / f"{i}.png", exif=exif)
        rows.append({"file_name": f"{i}.png", "text": f"noise number {i}"})
    rows[2]["text"] = "a caption that is far longer than the eight tokens of the network"
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    rows += [{"file_name": f"{name}.png", "text": name} for name in ("copy", "broken")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "folder", "path": str(folder), "max_bad_fraction": 0.2,
            "val_fraction": 0.5, "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY | {"data": data}))
    return path


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.filterwarnings("ignore:1 of 8 pictures")
def test_sizes_of_another_shape_are_found_again(config, tmp_path):
    def found():
        report = json.loads(cli("prepare", "--config", config, "--json").stdout)
        return {name: value for name, value in report.items() if name != "seconds"}

    first = found()
    [sizes] = tmp_path.rglob("sizes.json")
    for text in OTHER_JSON:
        sizes.write_text(text)
        assert found() == first


@pytest.mark.filterwarnings("ignore:1 of 8 pictures")
def test_the_survey_counts_what_is_there(config, tmp_path):
    done = cli("prepare", "--config", config, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    keys = [f"{i}.png" for i in range(6)] + ["copy.png"]
    train, held_out = split_indices(keys, 0.5)
    assert found["pictures"] == 7
    assert found["cut"] == sum(1 - min(size) / max(size) > 0.1 for size in SIZES) == 5
    assert (found["trained_on"], found["held_out"]) == (len(train), len(held_out))
    assert [skip["picture"] for skip in found["skipped"]] == ["broken.png"]
    assert found["distinct_captions"] == 7 and found["cut_captions"] == 1
    assert found["caption_tokens"][0] == 3 and found["caption_tokens"][2] > 8  # with end marks
    assert found["shorter_sides"] == [20, 64, 100]
    assert found["shapes"] == {"taller than 1:2": 1, "portrait": 2, "square": 2, "landscape": 1,
                               "wider than 2:1": 1}  # fmt: skip
    assert found["enlarged"] == {"16": 0, "32": 1}
    assert found["duplicates"] == [["0.png", "copy.png"]]
    assert found["groups"] == 7
    is_split = (0 in held_out) != (6 in held_out)
    assert found["split_duplicates"] == is_split
    stored = {file.name.rpartition("_")[2]: file.stat().st_size
              for file in (tmp_path / "cache" / "images").glob("*.npy")}  # fmt: skip
    assert found["picture_bytes"] == {"16": stored["16.npy"], "32": stored["32.npy"]}
    store = next((tmp_path / "cache" / "text").rglob("*.npy"))
    assert abs(found["text_bytes"] + 128 - store.stat().st_size) < 3 * 384 * 2 * 2  # sample_prompts


@pytest.mark.filterwarnings("ignore:1 of 8 pictures")
def test_the_table_names_everything(config, tmp_path):
    sheet = tmp_path / "sheets" / "sheet.png"
    done = cli("prepare", "--config", config, "--sheet", sheet)
    assert done.exit_code == 0, done.output
    for part in ("7 usable", "20 to 100 px (median 64)", "1 wider than 2:1", "enlarged to 32 px",
                 "0.png = copy.png", "broken.png: ", "disk, 32 px", str(sheet),
                 "data_report.json"):  # fmt: skip
        assert part in done.output, part
    with Image.open(sheet) as image:
        # Seven pictures of 128 px with three lines of caption.
        assert image.size == (6 + 7 * 134, 3 * 16 + 6 + 134)


@pytest.mark.filterwarnings("ignore:1 of 8 pictures", "ignore:data.path. 2 pictures are not used")
def test_letters_that_the_sheet_cannot_show_are_said(config, tmp_path):
    found = json.loads(cli("prepare", "--config", config, "--json").stdout)
    assert found["unwritten"] == []
    (tmp_path / "pictures" / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{i}.png", "text": "\U0001e800 one"}) + "\n"
                for i in range(6))  # Mende Kikakui: no font at hand
    )  # fmt: skip
    done = cli("prepare", "--config", config, "--set", "data.max_bad_fraction=0.9")
    assert "no font here has the letters of MENDE" in " ".join(done.output.split()), done.output


@pytest.mark.filterwarnings("ignore:1 of 8 pictures")
def test_the_estimate_prepares_nothing_and_foretells_the_disk(config, tmp_path):
    done = cli("prepare", "--config", config, "--estimate", "--json")
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    assert not list((tmp_path / "cache").rglob("*.npy"))
    found = json.loads(cli("prepare", "--config", config, "--json").stdout)
    assert planned["pictures"] == 7 and planned["seconds"] > 0
    for size in ("16", "32"):
        assert found["picture_bytes"][size] == planned["picture_bytes"][size] + 128  # npy header
    assert planned["text_bytes"] == found["text_bytes"]
    printed = cli("prepare", "--config", config, "--estimate").output
    assert "7 pictures and 7 distinct captions: about" in printed


@pytest.mark.filterwarnings("ignore:1 of 8 pictures")
def test_pictures_that_are_not_stored_are_not_searched_for_duplicates(config):
    done = cli("prepare", "--config", config, "--set", "data.cache_images_gb=0")
    assert done.exit_code == 0, done.output
    assert "not looked for" in done.output and "decoded at every read" in done.output


def test_drawings_have_no_size(tiny_config, tmp_path):
    done = cli("prepare", "--config", tiny_config, "--set", f"data.cache_dir={tmp_path}")
    assert "drawings, rendered at any size" in done.output and "OpenMoji" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sheet", "sheet.jpg"), "name it sheet.png"),
        (("--sheet", "mine.png"), "--sheet mine.png: exists already; name another file"),
        (("--sheet", "new.png", "--estimate"), "--estimate prepares nothing to be shown"),
    ],
)
def test_wrong_use(tiny_config, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_bytes(b"a picture of the user's")
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    done = cli("prepare", "--config", tiny_config, "--set", cache, *words)
    assert done.exit_code == 2 and message in done.output
    assert (tmp_path / "mine.png").read_bytes() == b"a picture of the user's"
    assert not (tmp_path / "cache").exists()  # said before there is work


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_shown(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert picture_size(tmp_path / "a.jpg") == ((30, 20) if orientation < 5 else (20, 30))


@pytest.mark.parametrize("label", ["", "x" * 300, "many words " * 30, "日本語 " * 40])
def test_captions_of_any_length_fit_their_column(tmp_path, label):
    picture = np.zeros((16, 16, 3), np.uint8)
    for lines in (1, 3):
        save_grid(tmp_path / "grid.png", [[picture, picture]], [label, ""], lines=lines)
        with Image.open(tmp_path / "grid.png") as image:
            right = np.asarray(image)[1 : lines * 16, 6 + 134 : 6 + 134 + 128]  # in the frame
        assert (right == 255).all()  # nothing reaches into the next column


def test_the_sheet_shows_pictures_from_all_over_the_set(tmp_path, tiny_config):
    names = random.Random(0).sample(range(1000), 100)
    folder = tmp_path / "many"
    folder.mkdir()
    for i, level in enumerate(names):
        Image.new("RGB", (20, 20), (level % 256, level // 256 * 60, i)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"number {i}")
    sheet = tmp_path / "sheet.png"
    done = cli(
        "prepare", "--config", tiny_config, "--sheet", sheet, "--set", "data.source=folder",
        "--set", f"data.path={folder}", "--set", "data.names=null",
        "--set", f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    blue = {int(value) for value in np.unique(pixels[80::10, 10::134, 2])}
    assert 98 in blue  # the 64th and last shown is picture 98 of 0 to 99
