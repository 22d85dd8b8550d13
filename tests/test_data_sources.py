import importlib.util
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.opening import Without, open_source
from imagen_scale.errors import DataError, MissingExtraError

# ---------------------------------------------------------------------------- emoji


def emoji(**settings):
    return open_source(DataConfig(source="emoji", **settings))


def test_emoji_captions_and_keys_belong_together():
    source = emoji()
    keys = dict(zip(source.captions, source.keys, strict=True))
    assert keys["grinning face"] == "1F600"
    assert keys["red heart"] == "2764"  # CLDR writes it with U+FE0F, OpenMoji's file without
    assert keys["keycap 1"] == "0031-FE0F-20E3"
    assert len(keys) == len(source) == len(set(source.keys))
    assert not any("_" in caption or ":" in caption for caption in keys)
    assert "OpenMoji" in source.attribution and "CC BY-SA 4.0" in source.attribution
    assert "https://openmoji.org" in source.attribution


def test_emoji_selection_and_order():
    plain, toned, flags = (
        set(emoji(**s).captions) for s in ({}, {"skin_tones": True}, {"flags": True})
    )
    assert "waving hand" in plain and "waving hand dark skin tone" not in plain
    assert "Norway" not in plain and "Scotland" not in plain and "white flag" in plain
    assert plain < toned and "waving hand dark skin tone" in toned
    assert plain < flags and {"Norway", "Scotland"} <= flags
    assert 1500 < len(plain) < 1800 and len(toned) > 3500 and len(flags) - len(plain) > 250
    keys = emoji().keys
    assert keys == emoji().keys
    code_points = [[int(part, 16) for part in key.split("-")] for key in keys]
    assert code_points == sorted(code_points)


def test_emoji_max_items_keeps_the_first():
    assert emoji(max_items=7).captions == emoji().captions[:7]


def test_emoji_names_are_kept_exactly_in_their_order():
    source = emoji(names=("red heart", "Norway", "grinning face"))
    assert source.captions == ["red heart", "Norway", "grinning face"]
    assert len(source) == 3


def test_emoji_unknown_name_names_the_nearest():
    with pytest.raises(DataError, match="data.names: no emoji is called 'Red hart'.*'red heart'"):
        emoji(names=("Red hart",))
    with pytest.raises(DataError, match="no emoji is called 'qqqqqqqqqqq'; see"):
        emoji(names=("qqqqqqqqqqq",))


def test_emoji_no_names():
    with pytest.raises(DataError, match="data.names: is empty"):
        emoji(names=())


@pytest.mark.parametrize("size", [16, 64, 100])
def test_emoji_drawings_are_on_white(size):
    picture = emoji(names=("red heart",)).image(0, size)
    assert picture.shape == (3, size, size) and picture.dtype == np.uint8
    assert (picture[:, 0, 0] == 255).all()  # transparent in the drawing
    red, green, blue = picture[:, size // 2, size // 2].astype(int)
    assert red > 180 and green < 80 and blue < 80


def test_emoji_fingerprint_follows_the_selection():
    prints = [emoji(max_items=n).fingerprint for n in (3, 4, 3)]
    assert prints[0] == prints[2] != prints[1]
    assert int(prints[0], 16) >= 0


def test_emoji_without_its_packages_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "resvg_py" else find(n))
    with pytest.raises(MissingExtraError, match=r"pip install 'imagen-scale\[emoji\]'"):
        emoji()


# ---------------------------------------------------------------------------- folder


def picture(file, level=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (level,) * 3).save(file)


def folder_source(folder, **settings):
    return open_source(DataConfig(source="folder", path=str(folder), **settings))


def listed(folder, rows, name="metadata.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_folder_with_jsonl(tmp_path):
    picture(tmp_path / "b.png", 10)
    picture(tmp_path / "deep" / "a.png", 20)
    listed(
        tmp_path,
        [
            {"file_name": "b.png", "text": " two \n words "},
            {"file_name": "deep/a.png", "text": "a"},
        ],
    )
    source = folder_source(tmp_path)
    assert source.captions == ["two words", "a"] and source.keys == ["b.png", "deep/a.png"]
    assert (source.image(0, 8) == 10).all() and (source.image(1, 8) == 20).all()
    assert source.attribution is None and len(source) == 2
    assert folder_source(tmp_path, max_items=1).keys == ["b.png"]


def test_folder_with_csv_and_other_caption_column(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(
        b'\xef\xbb\xbffile_name,prompt\r\na.png,"a ""red"", round\r\nball"\r\n'
    )
    source = folder_source(tmp_path, caption_column="prompt")
    assert source.captions == ['a "red", round ball']


def test_folder_with_jsonl_from_windows(tmp_path):
    picture(tmp_path / "a.png")
    row = json.dumps({"file_name": "a.png", "text": "größe\u2028x"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n")
    assert folder_source(tmp_path).captions == ["größe x"]


def test_folder_with_metadata_in_a_subfolder(tmp_path):
    picture(tmp_path / "train" / "a.png")
    listed(tmp_path / "train", [{"file_name": "a.png", "text": "a"}])
    assert folder_source(tmp_path).keys == ["train/a.png"]


def test_folder_with_sidecars(tmp_path):
    for name in ("b.JPG", "a.webp", "sub/c.gif"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_bytes(f"\ufeffa {name}\r\n".encode())
    (tmp_path / "._a.jpg").write_bytes(b"what macOS leaves on other disks")
    source = folder_source(tmp_path)
    assert source.keys == ["a.webp", "b.JPG", "sub/c.gif"]
    assert source.captions == ["a a.webp", "a b.JPG", "a sub/c.gif"]


def test_folder_tells_of_pictures_that_no_list_names(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    listed(tmp_path, [{"file_name": "a.png", "text": "a"}])
    source = folder_source(tmp_path)
    assert len(source) == 1 and source.notes == [
        "1 picture is not used because no metadata file lists it: b.png."
    ]
    (tmp_path / "b.png").unlink()
    assert folder_source(tmp_path).notes == []


def test_folder_fingerprint_follows_the_pictures_only(tmp_path):
    picture(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", ns=(10**18, 10**18))
    listed(tmp_path, [{"file_name": "a.png", "text": "a"}])
    first = folder_source(tmp_path).fingerprint
    listed(tmp_path, [{"file_name": "a.png", "text": "another caption"}])
    assert folder_source(tmp_path).fingerprint == first
    os.utime(tmp_path / "a.png", ns=(10**18, 10**18 + 1))
    assert folder_source(tmp_path).fingerprint != first


def test_folder_missing(tmp_path):
    with pytest.raises(DataError, match="data.path: .*nowhere.* is not a folder"):
        folder_source(tmp_path / "nowhere")


def test_folder_empty(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match="no pictures found; put files ending in .jpg"):
        folder_source(tmp_path)


def reasons(source):
    return [f"{skipped.picture}: {skipped.reason}" for skipped in source.skipped]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"file_name": "gone.png", "text": "x"}', "gone.png: the file cannot be found: No such"),
        ('{"file_name": "a.png", "text": "  "}', "a.png: the caption is empty"),
        ('{"file_name": "a.png", "text": null}', "a.png: the caption is missing"),
        ('{"file_name": "a.png"}', "a.png: the caption is missing"),
        ('{"file_name": "a.png", "text": ["x"]}', "a.png: the caption is a list, not text"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "a.png: the caption holds a broken char"),
        ('{"image": "a.png", "text": "x"}', ": file_name is None"),
        ('{"file_name": 3, "text": "x"}', "file_name is 3"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', r"a\\x00.png: the file cannot be found"),
        ('{"file_name": "' + "a" * 300 + '", "text": "x"}', "the file cannot be found: File name"),
        ('{"file_name": "../secret.png", "text": "x"}', "../secret.png: file_name leads outside"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "/etc/passwd: file_name leads outside"),
        ('{"file_name": "link.png", "text": "x"}', "link.png: is reached through a symbolic link"),
        ('{"file_name": "sub/secret.png", "text": "x"}', "sub/secret.png: is reached through a"),
        ('{"file_name": "inside.png", "text": "x"}', "inside.png: is reached through a symbolic"),
        ('{"file_name": "folder.png", "text": "x"}', "folder.png: is a folder"),
        ('{"file_name": "pipe.png", "text": "x"}', "pipe.png: is no regular file"),
        ('{"file_name": "ok.png", "text": "x"}', "ok.png: was listed before"),
        ('{"file_name": "./ok.png", "text": "x"}', "ok.png: was listed before"),
    ],
)
def test_folder_wrong_row_is_left_out_and_named(tmp_path, row, reason):
    folder, outside = tmp_path / "set", tmp_path / "out"
    for file in (folder / "ok.png", folder / "a.png", tmp_path / "secret.png",
                 outside / "secret.png"):  # fmt: skip
        picture(file)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to("a.png")
    (folder / "sub").symlink_to(outside)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    listed(folder, [{"file_name": "ok.png", "text": "fine"}])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(row + "\n")
    source = folder_source(folder)
    assert source.keys == ["ok.png"] and source.captions == ["fine"]
    assert len(source.skipped) == 1
    assert re.search(f"^metadata.jsonl, line 2.*{reason}", reasons(source)[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text": "x"', "not JSON: .*correct the line"),
        ("[" * 100_000, "not JSON"),
        ('["a.png", "x"]', "holds a list; write an object"),
    ],
)
def test_folder_list_that_cannot_be_read_is_refused(tmp_path, line, message):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(DataError, match=f"metadata.jsonl, line 2: {message}"):
        folder_source(tmp_path)


def test_folder_caption_column_that_no_row_has(tmp_path):
    picture(tmp_path / "a.png")
    listed(tmp_path, [{"file_name": "a.png", "caption": "x"}])
    with pytest.raises(
        DataError, match="no row has the column 'text' .*file_name, caption.*data.caption_column"
    ):
        folder_source(tmp_path)


def test_folder_follows_links_when_told_to(tmp_path):
    folder, outside = tmp_path / "set", tmp_path / "out"
    picture(outside / "b.png", 20)
    (outside / "b.txt").write_text("b")
    (outside / "back").symlink_to(outside)
    picture(tmp_path / "a.png", 10)
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "a.png")
    (folder / "a.txt").write_text("a")
    (folder / "sub").symlink_to(outside)
    source = folder_source(folder, follow_symlinks=True)
    assert source.keys == ["a.png", "sub/b.png"] and source.skipped == []
    assert (source.image(1, 4) == 20).all()
    source = folder_source(folder)
    assert source.keys == []
    assert [skipped.picture for skipped in source.skipped] == ["a.png", "sub"]
    assert all("symbolic link" in skipped.reason for skipped in source.skipped)


def test_folder_reached_through_a_link_is_the_users_choice(tmp_path):
    picture(tmp_path / "set" / "a.png", 10)
    listed(tmp_path / "set", [{"file_name": "a.png", "text": "a"}])
    (tmp_path / "link").symlink_to("set")
    assert folder_source(tmp_path / "link").keys == ["a.png"]


def test_folder_file_names_that_are_not_text(tmp_path):
    name = os.fsdecode(b"\xff.png")
    picture(tmp_path / name)
    with pytest.raises(UnicodeEncodeError):
        name.encode()
    assert reasons(folder_source(tmp_path))[0].startswith("\\xdcff.png: has no caption")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a")
    source = folder_source(tmp_path)
    assert source.check(0) is None and int(source.fingerprint, 16)


def test_folder_with_empty_list(tmp_path):
    picture(tmp_path / "a.png")
    listed(tmp_path, [])
    with pytest.raises(DataError, match="metadata.jsonl: lists no pictures; write one row"):
        folder_source(tmp_path)


def test_folder_with_two_lists(tmp_path):
    listed(tmp_path, [])
    listed(tmp_path, [], name="metadata.csv")
    with pytest.raises(DataError, match="both metadata.jsonl and metadata.csv; keep one"):
        folder_source(tmp_path)


def test_folder_text_that_is_not_utf8(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="metadata.jsonl: is not UTF-8 text"):
        folder_source(tmp_path)


def test_folder_picture_without_sidecar(tmp_path):
    picture(tmp_path / "a.png")
    (reason,) = reasons(folder_source(tmp_path))
    assert reason.startswith("a.png: has no caption; write it into a.txt beside it")


@pytest.mark.parametrize("name", ["a.png", "a.txt"])
def test_folder_sidecar_mode_does_not_follow_links_out(tmp_path, name):
    folder = tmp_path / "set"
    folder.mkdir()
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("secret")
    for other in {"a.png", "a.txt"} - {name}:
        (folder / other).write_bytes((tmp_path / other).read_bytes())
    (folder / name).symlink_to(tmp_path / name)
    (reason,) = reasons(folder_source(folder))
    assert "is reached through a symbolic link" in reason and name in reason


def test_folder_file_that_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    listed(tmp_path, [{"file_name": "a.png", "text": "a"}])
    source = folder_source(tmp_path)
    assert source.check(0).startswith("not a picture in one of the formats")
    with pytest.raises(DataError, match="^a.png: not a picture"):
        source.image(0, 8)


def test_a_source_without_some_pictures_keeps_the_others_as_they_are(tmp_path):
    for i, name in enumerate("abc"):
        picture(tmp_path / f"{name}.png", i)
        (tmp_path / f"{name}.txt").write_text(name)
    whole = folder_source(tmp_path)
    fewer = Without(whole, {1})
    assert fewer.keys == ["a.png", "c.png"] and fewer.captions == ["a", "c"] and len(fewer) == 2
    assert (fewer.image(1, 4) == 2).all() and fewer.check(1) is None
    assert len({whole.fingerprint, fewer.fingerprint, Without(whole, {2}).fingerprint}) == 3


# ---------------------------------------------------------------------------- huggingface


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A data set of four rows, built like the ones on the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(captions=("a", "b", "c", "d"), **columns):
        rows = {
            "image": [Image.new("RGB", (12, 10), (i, i, i)) for i in range(len(captions))],
            "text": list(captions),
            **columns,
        }
        dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        return dataset, folder

    return save


def hub_source(path, **settings):
    return open_source(DataConfig(source="huggingface", path=str(path), **settings))


def test_huggingface_split_saved_alone(saved):
    dataset, folder = saved()
    dataset.save_to_disk(folder)
    source = hub_source(folder)
    assert source.captions == ["a", "b", "c", "d"] and source.keys == ["0", "1", "2", "3"]
    assert source.image(3, 6).shape == (3, 6, 6) and (source.image(3, 6) == 3).all()
    assert source.check(0) is None
    assert hub_source(folder).fingerprint == source.fingerprint
    first = hub_source(folder, max_items=2)
    assert first.captions == ["a", "b"] and first.fingerprint != source.fingerprint


def test_huggingface_splits(saved):
    import datasets

    dataset, folder = saved()
    datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(folder)
    assert hub_source(folder, split="test").captions == ["c"]
    with pytest.raises(DataError, match="data.split: .* no split 'val'; it has train, test"):
        hub_source(folder, split="val")


def test_huggingface_folder_of_parquet(saved):
    dataset, folder = saved()
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    source = hub_source(folder)
    assert source.captions == ["a", "b", "c", "d"] and (source.image(2, 6) == 2).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_column": "label"}, "data.caption_column: .*no column 'label'; .*image, text"),
        ({"image_column": "picture"}, "data.image_column: .*no column 'picture'; .*image, text"),
        ({"image_column": "text"}, "data.image_column: .*'text' .* holds string, not pictures"),
    ],
)
def test_huggingface_wrong_columns(saved, settings, message):
    dataset, folder = saved()
    dataset.save_to_disk(folder)
    with pytest.raises(DataError, match=message):
        hub_source(folder, **settings)


@pytest.mark.parametrize(
    ("captions", "row", "reason"),
    [
        (["a", " ", "c"], "1", "the caption is empty"),
        (["a", "b", None], "2", "the caption is missing"),
    ],
)
def test_huggingface_wrong_rows_are_left_out_and_named(saved, captions, row, reason):
    dataset, folder = saved(captions)
    dataset.save_to_disk(folder)
    source = hub_source(folder)
    (skipped,) = source.skipped
    assert skipped.picture == row and skipped.reason.startswith(reason)
    kept = [i for i in range(3) if str(i) != row]
    assert source.keys == [str(i) for i in kept] and len(source) == 2
    assert [source.image(place, 4)[0, 0, 0] for place in range(2)] == kept


def test_huggingface_captions_that_are_no_text(saved):
    dataset, folder = saved([["a"], ["b"]])
    dataset.save_to_disk(folder)
    reasons = [skipped.reason for skipped in hub_source(folder).skipped]
    assert all(reason.startswith("the caption is a list") for reason in reasons)


def test_huggingface_files_outside_the_data_set_are_not_read(saved, tmp_path):
    import pyarrow
    from pyarrow import parquet

    picture(tmp_path / "secret.png", 7)
    dataset, folder = saved(["a"])
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    table = parquet.read_table(folder / "train.parquet")
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    foreign = pyarrow.array(cells, table.schema.field("image").type)
    parquet.write_table(table.set_column(0, table.schema.field("image"), foreign),
                        folder / "train.parquet")  # fmt: skip
    source = hub_source(folder)
    assert "secret.png lies outside the data set" in source.check(0)
    with pytest.raises(DataError, match="row 0: its file .* lies outside the data set"):
        source.image(0, 8)


def test_huggingface_folder_of_pictures(saved, tmp_path):
    folder = tmp_path / "pictures"
    picture(folder / "a.png", 7)
    picture(tmp_path / "secret.png", 9)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    listed(folder, [{"file_name": name, "text": name} for name in ("a.png", "link.png")])
    source = hub_source(folder)
    verdicts = dict(zip(source.captions, map(source.check, range(2)), strict=True))
    assert verdicts["a.png"] is None and "outside the data set" in verdicts["link.png"]
    assert hub_source(folder, follow_symlinks=True).check(1) is None


def test_huggingface_split_without_rows(saved, monkeypatch):
    dataset, _ = saved()
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: dataset.select([]))
    with pytest.raises(DataError, match="some/set has no rows; choose another data.split"):
        hub_source("some/set")


def test_huggingface_row_without_picture(saved):
    dataset, folder = saved(["a"], image=[None])
    dataset.save_to_disk(folder)
    source = hub_source(folder)
    assert source.check(0) == "has no picture; remove the row."


def test_huggingface_not_to_be_had(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match="'some/set' .*cannot be loaded: Couldn't reach.*HF_TOKEN.*save_to_disk"
    ) as caught:
        hub_source("some/set")
    assert "\n" not in str(caught.value)
