"""Colour profiles: converted to sRGB where they say otherwise, bit-identical where they do not."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageCms
from support import icc

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.images import load_picture, load_whole_picture, profile_use
from imagen_scale.data.sources.opening import open_source
from imagen_scale.data.sources.screening import usable_source

COLOURS = [(60, 140, 60), (200, 30, 40), (10, 20, 200), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
ADOBE = icc.matrix_profile(icc.ADOBE, 563 / 256)
P3 = icc.matrix_profile(icc.P3)
SRGBS = {
    "built by lcms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "parametric": icc.matrix_profile(icc.SRGB),
    "rounded primaries": icc.matrix_profile(np.round(icc.SRGB, 4)),
}
BROKEN = {
    "text": b"no profile",
    "cut short": ADOBE[:200],
    "no curves": icc.profile(b"RGB ", {}),
    "of grey": icc.grey_profile(1.0),
    "of inks": icc.cmyk_profile(),
    "spoiled": ADOBE[:132] + bytes(len(ADOBE) - 132),
}


def saved(file, colour, profile, mode="RGB", size=(20, 20), **options):
    Image.new(mode, size, colour).save(file, icc_profile=profile, **options)
    return file


def middle(picture):
    return picture[:, picture.shape[1] // 2, picture.shape[2] // 2].astype(int)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize(("profile", "matrix", "gamma"), [
    (ADOBE, icc.ADOBE, 563 / 256), (P3, icc.P3, None),
    (icc.matrix_profile(icc.SRGB, 1.0), icc.SRGB, 1),
], ids=["Adobe RGB", "Display P3", "linear sRGB"])  # fmt: skip
def test_colours_are_those_that_were_meant(tmp_path, colour, profile, matrix, gamma):
    file = saved(tmp_path / "a.png", colour, profile)
    want = icc.expected(colour, matrix, gamma)
    for picture in (load_picture(file, 8), load_whole_picture(file)):
        assert np.abs(middle(picture) - want).max() <= 3, (middle(picture), want)


def test_the_green_of_the_report(tmp_path):
    found = middle(load_picture(saved(tmp_path / "a.png", (60, 140, 60), ADOBE), 8))
    assert np.abs(found - [0, 141, 50]).max() <= 3
    assert np.abs(found - [60, 140, 60]).max() > 50


@pytest.mark.parametrize(("name", "options"), [
    ("a.jpg", {"quality": 100, "subsampling": 0}), ("a.webp", {"lossless": True}), ("a.tiff", {}),
    ("a.avif", {"quality": 100, "subsampling": "4:4:4"}), ("a.png", {}),
])  # fmt: skip
def test_in_every_format(tmp_path, name, options):
    file = saved(tmp_path / name, (60, 140, 60), ADOBE, **options)
    assert profile_use(file) == "converted"
    assert np.abs(middle(load_picture(file, 8)) - [0, 141, 50]).max() <= 6


@pytest.mark.parametrize("profile", SRGBS.values(), ids=SRGBS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profiles_of_srgb_leave_pixels_as_they_are(tmp_path, profile, mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8))
    noise = noise.convert(mode) if mode != "P" else noise.convert("RGB").quantize(64)
    noise.save(tmp_path / "plain.png")
    noise.save(tmp_path / "profile.png", icc_profile=profile)
    for load in (lambda file: load_picture(file, 16), load_whole_picture):
        assert np.array_equal(load(tmp_path / "plain.png"), load(tmp_path / "profile.png"))
    assert profile_use(tmp_path / "profile.png") is None


@pytest.mark.parametrize("profile", BROKEN.values(), ids=BROKEN)
def test_broken_profiles_and_those_of_other_pictures_are_ignored(tmp_path, profile):
    file = saved(tmp_path / "a.png", (60, 140, 60), profile)
    assert profile_use(file) == "ignored"
    assert middle(load_picture(file, 8)).tolist() == [60, 140, 60]


def test_transparency_and_palettes_stay(tmp_path):
    image = Image.new("RGBA", (20, 20), (60, 140, 60, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 20))
    image.save(tmp_path / "a.png", icc_profile=ADOBE)
    picture = load_whole_picture(tmp_path / "a.png").astype(int)
    assert (picture[:, :, 3] == 255).all()
    assert np.abs(picture[:, 5, 15] - [0, 141, 50]).max() <= 3
    image.convert("RGB").quantize(4).save(tmp_path / "b.png", icc_profile=ADOBE)
    found = load_picture(tmp_path / "b.png", 20).astype(int)[:, 10, 17]
    assert np.abs(found - [0, 141, 50]).max() <= 3


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_is_converted_by_profiles_of_grey_alone(tmp_path, mode):
    level = {"LA": (100, 255), "1": 1, "I;16": 100 * 257}.get(mode, 100)
    shown = 255 if mode == "1" else 100
    want = int(icc.expected((shown,) * 3, icc.SRGB, 1.0)[0])  # linear grey is shown brighter
    for profile, expected in ((icc.grey_profile(1.0), want), (ADOBE, shown)):
        file = saved(tmp_path / "a.png", level, profile, mode)
        for picture in (load_picture(file, 8), load_whole_picture(file)):
            assert np.abs(middle(picture) - expected).max() <= 2


def test_16_bit_grey_keeps_its_gradient_under_a_profile(tmp_path):
    levels = np.linspace(0, 255, 64).round()
    ramp = np.tile((levels * 257).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "a.tiff", icc_profile=icc.grey_profile(1.8))
    picture = load_picture(tmp_path / "a.tiff", 64)[0, 30].astype(int)
    want = [icc.expected((level,) * 3, icc.SRGB, 1.8)[0] for level in levels]
    assert np.abs(picture - want).max() <= 3


def test_inks_are_converted_by_their_profile(tmp_path):
    """Of this profile one ink alone is black; without it cyan is cyan."""
    file = saved(tmp_path / "a.jpg", (255, 0, 0, 0), icc.cmyk_profile(), "CMYK", quality=100)
    assert profile_use(file) == "converted" and middle(load_picture(file, 8)).max() <= 3
    white = saved(tmp_path / "b.jpg", (0, 0, 0, 0), icc.cmyk_profile(), "CMYK", quality=100)
    assert middle(load_picture(white, 8)).min() >= 250
    plain = saved(tmp_path / "c.jpg", (255, 0, 0, 0), None, "CMYK", quality=100)
    assert np.abs(middle(load_picture(plain, 8)) - [0, 255, 255]).max() <= 3


def test_large_pictures_are_converted_strip_by_strip(tmp_path):
    file = saved(tmp_path / "a.png", (60, 140, 60), ADOBE, size=(4200, 4200), compress_level=1)
    picture = load_picture(file, 16).astype(int)
    assert np.abs(picture - np.array([0, 141, 50])[:, None, None]).max() <= 3


# ---------------------------------------------------------------------------- sets of pictures


def test_what_is_done_is_counted_and_caches_are_not_reused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i, profile in enumerate((ADOBE, P3, None, SRGBS["parametric"], b"broken")):
        saved(folder / f"{i}.png", (60, 140, 60), profile)
        (folder / f"{i}.txt").write_text(f"number {i}")
    config = DataConfig(source="folder", path=str(folder))
    with pytest.warns(UserWarning, match="1 picture has a colour profile that is broken .*: 4.png"):
        source, report = usable_source(config, tmp_path / "cache")
    assert json.loads(report.read_text())["notes"] == [
        "1 picture has a colour profile that is broken or not of its kind, and is read as sRGB: "
        "4.png.",
        "2 with a colour profile other than sRGB: converted to sRGB.",
    ]
    assert np.abs(middle(source.image(0, 8)) - [0, 141, 50]).max() <= 3
    with pytest.warns(UserWarning):  # and from what is known already
        assert usable_source(config, tmp_path / "cache")[1].read_text() == report.read_text()
    # The name under which the numbers as they lie there were cached before.
    stats = [(file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_mode)
             for file in sorted(folder.glob("*.png"))]  # fmt: skip
    before = ["folder", [f"{i}.png" for i in range(5)], stats]
    old = hashlib.sha256(json.dumps([3, *before]).encode()).hexdigest()[:16]
    assert source.fingerprint != old


def test_tars_and_data_sets_go_the_same_way(tmp_path, monkeypatch):
    file = saved(tmp_path / "0.png", (60, 140, 60), ADOBE)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(file, "0.png")
        info = tarfile.TarInfo("0.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    sources = [open_source(DataConfig(source="webdataset", path=str(tmp_path / "a.tar")))]
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [{"bytes": file.read_bytes(), "path": None}], "text": ["one"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(
        tmp_path / "set"
    )
    sources.append(open_source(DataConfig(source="huggingface", path=str(tmp_path / "set"))))
    for source in sources:
        assert source.profile(0) == "converted"
        assert np.abs(middle(source.image(0, 8)) - [0, 141, 50]).max() <= 3


def test_the_embedded_drawings_stay_bit_by_bit():
    source = open_source(DataConfig(source="emoji", names=("red heart", "pizza", "key")))
    assert [source.profile(i) for i in range(3)] == [None] * 3
    digest = hashlib.sha256(b"".join(source.image(i, 64).tobytes() for i in range(3)))
    assert digest.hexdigest()[:16] == "c213be5c70c71c5d"
