"""Whatever looks like a picture, or has a caption of its name, is used, or counted and named."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from imagen_scale.config import DataConfig
from imagen_scale.data.sources import formats
from imagen_scale.data.sources.images import load_picture
from imagen_scale.data.sources.opening import open_source
from imagen_scale.errors import DataError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)
JXL = b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(300)


def data(level=0, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (level, 0, 255 - level)).save(file, form)
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar(file, files):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def opened(path, source="folder", **settings):
    return open_source(DataConfig(source=source, path=str(path), **settings))


def reasons(source):
    return {skipped.picture: skipped.reason for skipped in source.skipped}


def captions(source):
    return dict(zip(source.keys, source.captions, strict=True))


# ---------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("ending", "form"),
    [("jfif", "JPEG"), ("jpe", "JPEG"), ("pjpeg", "JPEG"), ("JFIF", "JPEG"), ("mpo", "JPEG"),
     ("avif", "AVIF"), ("AVIF", "AVIF"), ("apng", "PNG"), ("dib", "BMP")],
)  # fmt: skip
def test_other_endings_of_what_is_read(tmp_path, ending, form):
    write(tmp_path, {f"a.{ending}": data(40, form), "a.txt": "one"})
    source = opened(tmp_path)
    assert captions(source) == {f"a.{ending}": "one"} and source.skipped == source.notes == []
    assert abs(source.image(0, 8)[:, 4, 4].astype(int) - [40, 0, 215]).max() <= 6
    packed = opened(tar(tmp_path / "a.tar", {f"0.{ending}": data(40, form), "0.txt": "one"}),
                    "webdataset")  # fmt: skip
    assert captions(packed) == {"a.tar/0": "one"}


def test_avif_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:12] = 255  # the upper half, which a turn by 270 degrees brings to the right
    Image.fromarray(pixels).save(tmp_path / "a.avif", exif=exif, quality=100)
    picture = load_picture(tmp_path / "a.avif", 16).astype(int)
    assert picture[:, :, :6].mean() < 30 and picture[:, :, -6:].mean() > 225


@pytest.mark.parametrize(("ending", "content", "package"), [
    ("heic", HEIC, "pillow-heif"), ("HEIF", HEIC, "pillow-heif"), ("hif", HEIC, "pillow-heif"),
    ("jxl", JXL, "pillow-jxl-plugin"), ("jxl", b"\xff\x0a" + bytes(90), "pillow-jxl-plugin"),
    ("jpg", HEIC, "pillow-heif"),
])  # fmt: skip
def test_formats_of_plugins_name_the_package(tmp_path, ending, content, package, monkeypatch):
    monkeypatch.setattr(formats, "plugin_formats", lambda: ())  # as without them
    write(tmp_path / "set", {f"p.{ending}": content, "p.txt": "one"})
    source = opened(tmp_path / "set")
    reason = source.check(0) if len(source) else reasons(source)[f"p.{ending}"]
    assert f"needs the package {package}; run pip install {package}, or convert it." in reason
    packed = opened(tar(tmp_path / "a.tar", {f"0.{ending}": content, "0.txt": "x"}), "webdataset")
    assert package in (packed.check(0) if len(packed) else reasons(packed)["a.tar/0"])
    alone = opened(tar(tmp_path / "b.tar", {f"0.{ending}": content}), "webdataset")
    assert len(alone.skipped) == 1


@pytest.mark.parametrize(("module", "form", "ending"), [
    ("pillow_heif", "HEIF", "heic"), ("pillow_jxl", "JXL", "jxl"),
])  # fmt: skip
def test_plugins_are_used_where_they_are_installed(tmp_path, module, form, ending):
    pytest.importorskip(module)
    assert form in formats.readable_formats()
    write(tmp_path, {f"a.{ending}": data(40, form), "a.txt": "one"})
    source = opened(tmp_path)
    assert abs(source.image(0, 8)[:, 4, 4].astype(int) - [40, 0, 215]).max() <= 6
    packed = tar(tmp_path / "a.tar", {f"0.{ending}": data(40, form), "0.txt": "one"})
    assert captions(opened(packed, "webdataset")) == {"a.tar/0": "one"}


@pytest.mark.parametrize("ending", ["psd", "svg", "tga", "jp2", "ppm", "CR2", "ico"])
def test_pictures_of_other_kinds_are_counted_and_named(tmp_path, ending):
    write(tmp_path / "set", {"a.png": data(), "a.txt": "one", f"b.{ending}": b"?" * 99})
    source = opened(tmp_path / "set")
    assert captions(source) == {"a.png": "one"}
    assert f"of the kind .{ending.lower()}; the formats" in reasons(source)[f"b.{ending}"]
    packed = opened(
        tar(tmp_path / "a.tar", {"a.png": data(), "a.txt": "one", f"b.{ending}": b"?" * 99}),
        "webdataset",
    )
    assert f".{ending.lower()}; the formats" in reasons(packed)[f"a.tar/b.{ending}"]


def test_a_picture_is_told_by_content_whatever_its_name(tmp_path):
    """iPhones send JPEG called .HEIC; downloads lose their endings."""
    files = {"a.HEIC": data(1, "JPEG"), "a.txt": "one", "b": data(2), "b.txt": "two",
             "c.jpg_large": data(3, "JPEG"), "c.txt": "three"}  # fmt: skip
    assert captions(opened(write(tmp_path / "set", files))) == {
        "a.HEIC": "one", "b": "two", "c.jpg_large": "three",
    }  # fmt: skip
    packed = opened(tar(tmp_path / "a.tar", files), "webdataset")
    assert captions(packed) == {"a.tar/a": "one", "a.tar/b": "two", "a.tar/c": "three"}


def test_what_has_a_caption_but_is_no_picture_is_named(tmp_path):
    files = {"a.png": data(), "a.txt": "one", "b.mp4": b"film" * 9, "b.txt": "two"}
    source = opened(write(tmp_path / "set", files))
    assert reasons(source) == {"b.mp4": "has the caption b.txt, and is no picture."}
    packed = opened(tar(tmp_path / "a.tar", files), "webdataset")
    assert "has no picture (b.mp4 is none)" in reasons(packed)["a.tar/b"]


def test_files_beside_a_picture_of_the_same_name_are_told_and_do_no_harm(tmp_path):
    files = {
        "a.png": data(),
        "a.txt": "one",
        "a.psd": b"8BPS" + bytes(60),
        "a.npz": b"latents",
        "x": data(5),
        "b.txt": "of no picture",
        "more.zip": b"PK",
        "a.png.bak": data(7),
    }
    source = opened(write(tmp_path, files))
    assert captions(source) == {"a.png": "one"} and source.skipped == []
    assert source.notes == [
        "3 other pictures are not used: a.png.bak, a.psd, x.",
        "1 caption file is not used: b.txt.",
        "1 packed file is not looked into: more.zip.",
    ]


@pytest.mark.parametrize(("name", "hint"), [
    ("0.tar", 'data.source "webdataset" reads .tar'), ("x.zip", "unpack them"),
    ("x.parquet", 'data.source "huggingface" reads them'),
])  # fmt: skip
def test_a_folder_without_pictures_says_what_lies_there(tmp_path, name, hint):
    write(tmp_path, {name: b"?"})
    with pytest.raises(DataError, match=f"no pictures found; .*1 {name[1:]} lie there: {hint}"):
        opened(tmp_path)


def test_pictures_that_no_list_names_are_told_whatever_they_are(tmp_path):
    write(
        tmp_path,
        {
            "a.png": data(),
            "b.avif": data(form="AVIF"),
            "c.psd": b"8BPS",
            "d": data(),
            "metadata.jsonl": '{"file_name": "a.png", "text": "one"}',
            "a.txt": "1",
        },
    )
    source = opened(tmp_path)
    assert captions(source) == {"a.png": "one"} and source.skipped == []
    assert source.notes == [
        "3 pictures are not used because no metadata file lists them: b.avif, c.psd, d.",
        "1 caption file is not used: a.txt.",
    ]


# ---------------------------------------------------------------------------- keys of tars


@pytest.mark.parametrize("name", [
    "0. photo v1.2", "22.05", "a.b.c", "v1.2.", "deep.er/v1.0", "photo.jpg v2", "2024.01.02 10.30",
])  # fmt: skip
def test_names_with_dots_keep_their_picture_and_caption(tmp_path, name):
    path = tar(
        tmp_path / "a.tar",
        {
            "k.jpg": data(1, "JPEG"),
            "k.txt": "plain",
            f"{name}.png": data(2),
            f"{name}.txt": "dotted",
            f"{name} 2.png": data(3),
            f"{name} 2.json": '{"text": "2"}',
        },
    )
    source = opened(path, "webdataset")
    assert captions(source) == {
        "a.tar/k": "plain", f"a.tar/{name}": "dotted", f"a.tar/{name} 2": "2",
    }  # fmt: skip
    assert source.skipped == source.notes == []
    assert [source.image(i, 4)[0, 0, 0] for i in (1, 2)] == [2, 3]


def test_two_pictures_with_one_caption_are_named(tmp_path):
    path = tar(tmp_path / "a.tar", {"0.left.jpg": data(), "0.right.jpg": data(), "0.txt": "one"})
    source = opened(path, "webdataset")
    assert reasons(source) == {
        "a.tar/0": "has one caption for 0.left.jpg and 0.right.jpg; call one of them 0.jpg."
    }


@pytest.mark.parametrize(("picture", "caption", "note"), [
    ("0.image.png", "0.txt", "picture is called KEY.image.png"),
    ("0.png", "0.caption", "caption is called KEY.caption"),
    ("0.png", "0.png.txt", "caption is called KEY.png.txt"),
    ("0.png", "0.prompt.txt", "caption is called KEY.prompt.txt"),
    ("0.image.png", "0.caption.txt", "picture is called KEY.image.png"),
    ("0.PNG", "0.meta.json", "caption is called KEY.meta.json"),
])  # fmt: skip
def test_near_names_in_tars_are_taken_where_they_mean_one_thing(tmp_path, picture, caption, note):
    text = '{"text": "one"}' if caption.endswith("json") else "one"
    source = opened(tar(tmp_path / "a.tar", {picture: data(), caption: text}), "webdataset")
    assert captions(source) == {"a.tar/0": "one"} and source.skipped == []
    assert note in source.notes[0] and source.notes[0].startswith("1 ")


def test_further_pictures_of_a_key_are_told(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        {
            "0.png": data(1),
            "0.mask.png": data(2),
            "0.txt": "one",
            "1.jpg": data(1, "JPEG"),
            "1.heic": HEIC,
            "1.txt": "two",
            "blob": data(3),
            "README.md": "hello",
        },
    )
    source = opened(path, "webdataset")
    assert captions(source) == {"a.tar/0": "one", "a.tar/1": "two"} and source.skipped == []
    (note,) = source.notes
    assert note.startswith("3 other pictures are not used: ")
    assert set(note.rpartition(": ")[2].strip(".").split(", ")) == {
        "a.tar/0.mask.png", "a.tar/1.heic", "a.tar/blob",
    }  # fmt: skip


def test_what_lies_beside_shards_is_told(tmp_path):
    for name in ("a.tar", "B.TAR", "deep/c.tar"):
        tar(tmp_path / name, {"0.png": data(), "0.txt": name})
    write(tmp_path, {"d.tar.gz": b"\x1f\x8b", "e.tgz": b"\x1f\x8b", "loose.png": data()})
    source = opened(tmp_path, "webdataset")
    assert captions(source) == {"B.TAR/0": "B.TAR", "a.tar/0": "a.tar"}
    assert source.notes == [
        "2 packed files are not read: d.tar.gz, e.tgz; decompress them.",
        "1 tar is not read: deep/c.tar; subfolders are not looked into.",
        "1 picture is not used: loose.png; only those in tars are.",
    ]
