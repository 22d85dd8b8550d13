"""Near misses: taken where they can mean one thing only, else the message says what lies there."""

import json
import tarfile

import pytest
from PIL import Image

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.opening import open_source
from imagen_scale.errors import DataError


def pictures(folder, *names):
    for i, name in enumerate(names or ("a.png", "b.png")):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 2 * i, 3 * i)).save(file, "PNG")
    return folder


def opened(folder, source="folder", **settings):
    return open_source(DataConfig(source=source, path=str(folder), **settings))


def captions(source):
    return dict(zip(source.keys, source.captions, strict=True))


def reasons(source):
    return {skipped.picture: skipped.reason for skipped in source.skipped}


BOTH = {"a.png": "1girl, solo", "b.png": "two"}


# ---------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("csv", "file_name;text\na.png;1girl, solo\nb.png;two\n", "separated by semicolons"),
        ("csv", "file_name\ttext\na.png\t1girl, solo\nb.png\ttwo\n", "separated by tabs"),
        ("csv", "file_name|text\na.png|1girl, solo\nb.png|two\n", "separated by vertical bars"),
        ("csv", "sep=;\nfile_name;text\na.png;1girl, solo\nb.png;two\n", "its first line"),
        ("csv", "\ufeffSEP=;\r\nfile_name;text\r\na.png;1girl, solo\r\nb.png;two", "its first"),
        ("csv", 'sep=,\nfile_name,text\na.png,"1girl, solo"\nb.png,two\n', "its first line"),
        ("csv", 'file_name, text\na.png, "1girl, solo"\nb.png, two\n', "blanks before its quotes"),
        ("csv", 'file_name ,text \na.png,"1girl, solo"\nb.png,two\n', "'file_name '"),
        ("csv", 'File Name,TEXT\na.png,"1girl, solo"\nb.png,two\n', "'TEXT' is taken for 'text'"),
        ("csv", 'filename;Text\na.png;"1girl, solo"\nb.png;two\n', "separated by semicolons"),
        ("tsv", "file_name\ttext\na.png\t1girl, solo\nb.png\ttwo\n", "is taken for the list"),
        ("tsv", 'file_name,text\na.png,"1girl, solo"\nb.png,two\n', "separated by commas"),
        ("csv.txt", 'file_name,text\na.png,"1girl, solo"\nb.png,two\n', "is taken for the list"),
    ],
)
def test_tables_of_spreadsheets(tmp_path, name, text, note):
    pictures(tmp_path)
    (tmp_path / f"metadata.{name}").write_text(text)
    source = opened(tmp_path)
    assert captions(source) == BOTH and source.skipped == []
    assert any(note in one for one in source.notes), source.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name;prompt\na.png;x\n", r"'text' \(columns: file_name, prompt\)"),
        ("a.png,a cat\nb.png,two\n", r"'file_name' \(columns: a.png, a cat\); .*first row names"),
        ("image,text\na.png,x\n", r"'file_name' \(columns: image, text\); call the one that names"),
        ("sep=;\nfile_name;text\na.png;one;two\n", "line 3: has 3 cells .* separated by semicol"),
        ("file_name;text\na.png,x\nb.png;two\n", "line 2: has 1 cells"),
    ],
)
def test_tables_that_mean_nothing_are_refused_by_what_they_hold(tmp_path, text, message):
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


# ---------------------------------------------------------------------------- other lists

ROWS = [{"file_name": name, "text": text} for name, text in BOTH.items()]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.json1", LINES),
        ("metadata.JSONL", LINES),
        ("METADATA.jsonl", LINES),
        ("metadata.ndjson", LINES),
        ("metadata.jsonl.txt", LINES),
        ("metadata.json", LINES),
        ("metadata.json", json.dumps(ROWS)),
        ("metadata.json", json.dumps(ROWS, indent=1)),
        ("metadata.jsonl", json.dumps(ROWS, indent=1)),
        ("metadata.json", json.dumps(BOTH)),
        ("metadata.json", json.dumps(BOTH, indent=2)),
        ("metadata.json", json.dumps({name: {"text": text} for name, text in BOTH.items()})),
        ("metadata.json", json.dumps({"a": {"text": BOTH["a.png"]}, "b": {"text": "two"}})),
        ("metadata.json", json.dumps({"file_name": list(BOTH), "text": list(BOTH.values())})),
        ("metadata.json", json.dumps({"file_name": {"0": "a.png", "1": "b.png"},
                                      "text": {"0": BOTH["a.png"], "1": "two"}})),
        ("metadata.jsonl", LINES.replace("file_name", "File_Name")),
        ("METADATA.CSV", 'file_name,text\na.png,"1girl, solo"\nb.png,two\n'),
    ],
)  # fmt: skip
def test_lists_of_nearly_the_right_name_or_form(tmp_path, name, text):
    pictures(tmp_path)
    (tmp_path / name).write_text(text)
    source = opened(tmp_path)
    assert captions(source) == BOTH and source.skipped == [] and source.notes


def test_a_list_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures(tmp_path)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "metadata.parquet")
    assert captions(opened(tmp_path)) == BOTH
    (tmp_path / "metadata.parquet").write_bytes(b"none")
    with pytest.raises(DataError, match="metadata.parquet: no Parquet"):
        opened(tmp_path)


def test_two_near_lists_are_refused_and_caption_files_come_before_them(tmp_path):
    pictures(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps(ROWS))
    (tmp_path / "METADATA.CSV").write_text("file_name,text\na.png,x\n")
    with pytest.raises(DataError, match=r"both metadata.json and METADATA.CSV; keep one"):
        opened(tmp_path)
    for name in BOTH:
        (tmp_path / name).with_suffix(".txt").write_text(name)
    source = opened(tmp_path)
    assert captions(source) == {name: name for name in BOTH}
    assert source.notes == ["2 lists are not read: METADATA.CSV, metadata.json."]


@pytest.mark.parametrize("name", ["captions.csv", "meta_cap.json", "train.jsonl", "list.tsv"])
def test_a_list_of_another_name_is_named(tmp_path, name):
    pictures(tmp_path)
    (tmp_path / name).write_text("{}")
    assert all(f"({name} lies there)" in reason for reason in reasons(opened(tmp_path)).values())


# ---------------------------------------------------------------------------- caption files


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (".caption", "one"), (".TXT", "one"), (".cap", "one"), (".tags", "one"),
        (".json", '{"text": "one", "score": 3}'), (".json", '{"Text": "one"}'),
        (".png.txt", "one"), (".png.caption", "one"), (".png.json", '{"text": "one"}'),
    ],
)  # fmt: skip
def test_caption_files_of_other_names(tmp_path, ending, text):
    pictures(tmp_path, "a.png", "sub/b.png")
    for stem in ("a", "sub/b"):
        (tmp_path / f"{stem}{ending}").write_text(text)
    source = opened(tmp_path)
    assert captions(source) == {"a.png": "one", "sub/b.png": "one"} and source.skipped == []
    assert source.notes == [f"2 captions are taken from files that end in {ending}."]


def test_caption_files_that_could_mean_several_things_are_named(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.caption").write_text("one")
    (tmp_path / "a.tags").write_text("two")
    (tmp_path / "b.json").write_text('{"prompt": "x"}')
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "c.txt").write_text("three")
    found = reasons(opened(tmp_path))
    assert "a.caption and a.tags lie beside it; keep one of them" in found["a.png"]
    assert "b.json: has no 'text' (it has prompt); set data.caption_column." in found["b.png"]
    assert found["c.png"].endswith("(texts/c.txt lies there).")
    assert found["d.png"].endswith("metadata.jsonl.")


def test_a_txt_beside_a_picture_counts_and_the_others_are_told(tmp_path):
    pictures(tmp_path, "a.png")
    for ending in ("txt", "caption"):
        (tmp_path / f"a.{ending}").write_text(ending)
    source = opened(tmp_path)
    assert captions(source) == {"a.png": "txt"}
    assert source.notes == ["1 caption file is not used: a.caption."]


# ---------------------------------------------------------------------------- names in lists


@pytest.mark.parametrize(
    ("files", "place", "listed", "how"),
    [
        (("sub/a.png", "sub/b.png"), ".", "sub\\{}.png", "backslashes for slashes"),
        (("sub/a.png", "sub/b.png"), ".", ".\\sub\\{}.png", "backslashes for slashes"),
        (("sub/a.png", "sub/b.png"), ".", "C:\\data\\sub\\{}.png", "the folders before them"),
        (("sub/a.png", "sub/b.png"), ".", "/home/me/sub/{}.png", "the folders before them"),
        (("a.png", "b.png"), ".", "images/{}.png", "the folders before them"),
        (("images/a.png", "images/b.png"), ".", "{}.png", "the folders before them"),
        (("train/a.png", "train/b.png"), "train", "train/{}.png", "the folder of the set before"),
        (("a.png", "b.png"), ".", "{}", "no ending"),
        (("a.png", "b.png"), ".", " {}.png ", "case, accents or blanks"),
        (("A.PNG", "B.PNG"), ".", "{}.png", "case, accents or blanks"),
        (("e\u0301a.png", "e\u0301b.png"), ".", "\u00e9{}.png", "case, accents or blanks"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_that_differ_a_little(tmp_path, files, place, listed, how, kind):
    pictures(tmp_path, *files)
    rows = [{"file_name": listed.format(name), "text": name} for name in "ab"]
    text = "\n".join(map(json.dumps, rows))
    if kind == "csv":
        text = "file_name,text\n" + "\n".join(",".join(row.values()) for row in rows)
    (tmp_path / place / f"metadata.{kind}").write_text(text)
    source = opened(tmp_path)
    assert captions(source) == dict(zip(files, "ab", strict=True)) and source.skipped == []
    (note,) = source.notes
    assert note.startswith("2 names in ") and how in note


@pytest.mark.parametrize(
    ("files", "listed", "there"),
    [
        (("x/a.png", "y/a.png"), ["a.png"], "x/a.png and y/a.png lies there"),
        (("a.png", "b.png"), ["cats/a.png", "dogs/b.png"], "a.png lies there"),
        (("a.png",), ["a.jpg"], "a.png lies there"),
        (("a.png", "A.PNG"), ["a.Png"], "lies there"),
    ],
)
def test_names_that_could_mean_several_files_are_named(tmp_path, files, listed, there):
    pictures(tmp_path, *files)
    rows = [{"file_name": name, "text": "x"} for name in listed]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert captions(source) == {} and len(source.skipped) == len(listed)
    assert there in source.skipped[0].reason


def test_one_file_is_never_meant_twice(tmp_path):
    pictures(tmp_path, "a.png")
    rows = [{"file_name": name, "text": name} for name in ("a.png", "A.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert captions(source) == {"a.png": "a.png"}
    assert [skipped.reason for skipped in source.skipped] == [
        "was listed before; keep one row per picture."
    ]


# ---------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Writes a Parquet file of two pictures, encoded and named as `form` says."""
    datasets = pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(form, name="image", caption="text", captions=("one", "two")):
        folder = pictures(tmp_path / "files")
        content = [(folder / file).read_bytes() for file in BOTH]
        cells = {
            "bytes": content,
            "struct": [{"bytes": one, "path": "x.png"} for one in content],
            "only bytes": [{"bytes": one} for one in content],
            "path": ["a.png", "b.png"],
            "number": [1, 2],
        }[form]
        file = tmp_path / "set" / "train.parquet"
        file.parent.mkdir()
        parquet.write_table(pa.table({name: cells, caption: list(captions)}), file)
        return file

    return save


@pytest.mark.parametrize("form", ["bytes", "struct", "only bytes"])
@pytest.mark.parametrize("single", [True, False])
def test_pictures_as_bytes(parquet, form, single):
    file = parquet(form)
    source = opened(file if single else file.parent, "huggingface")
    assert captions(source) == {"0": "one", "1": "two"}
    assert source.image(1, 4)[:, 0, 0].tolist() == [1, 2, 3] and source.check(0) is None
    assert source.notes == ["the bytes in the column 'image' are taken for pictures."]


def test_columns_of_img2dataset(parquet):
    source = opened(parquet("bytes", "jpg", "caption"), "huggingface",
                    image_column="jpg", caption_column="caption")  # fmt: skip
    assert captions(source) == {"0": "one", "1": "two"}


def test_columns_that_are_nearly_called_so(parquet):
    source = opened(parquet("bytes", "Image", " Text"), "huggingface")
    assert captions(source) == {"0": "one", "1": "two"}
    assert "its column ' Text' is taken for 'text'." in source.notes


@pytest.mark.parametrize(("form", "message"), [
    ("path", "holds string, not pictures, such as 'a.png'; none of its columns holds any"),
    ("number", "holds int64, not pictures; none of its columns"),
])  # fmt: skip
def test_columns_that_hold_no_pictures(parquet, form, message):
    with pytest.raises(DataError, match=message):
        opened(parquet(form), "huggingface")


@pytest.mark.parametrize(("name", "source"), [("a.tar", "webdataset"), ("a.csv", "folder")])
def test_single_files_of_other_kinds(tmp_path, name, source):
    pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(DataError, match=f'is a .{name[2:]}; give a .parquet.*"{source}"'):
        opened(tmp_path / name, "huggingface")
    (tmp_path / "broken.parquet").write_bytes(b"?")
    with pytest.raises(DataError, match="broken.parquet cannot be read"):
        opened(tmp_path / "broken.parquet", "huggingface")


def test_names_of_labels_are_captions(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(3)], "label": [1, 0, None]}
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    source = opened(tmp_path / "set", "huggingface", caption_column="label")
    assert captions(source) == {"0": "dog", "1": "cat"}
    assert reasons(source) == {"2": "the caption is missing; write one or remove the picture."}
    assert source.notes == ["the names of the labels in 'label' are taken for captions."]


# ---------------------------------------------------------------------------- further near misses


def test_lines_of_json_that_end_in_commas(tmp_path):
    pictures(tmp_path)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in BOTH.items()]
    (tmp_path / "metadata.jsonl").write_text(",\n".join(lines) + ",\n")
    source = opened(tmp_path)
    assert captions(source) == BOTH
    assert source.notes == ["metadata.jsonl: its lines end in commas."]


@pytest.mark.parametrize(
    ("listed", "how"),
    [("a%20b.png", "characters written as in addresses"), (7, "no ending")],
)
def test_names_as_other_programs_write_them(tmp_path, listed, how):
    name = "a b.png" if isinstance(listed, str) else "7.png"
    pictures(tmp_path, name, "c.png")
    rows = [{"file_name": listed, "text": "one"}, {"file_name": "c.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert captions(source) == {name: "one", "c.png": "two"}
    assert source.notes == [f"1 name in metadata.jsonl differs from the files' by {how}."]


def test_a_name_that_is_there_is_taken_as_it_is(tmp_path):
    pictures(tmp_path, "a%20b.png", "a b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na%20b.png,one\na b.png,two\n")
    assert captions(opened(tmp_path)) == {"a%20b.png": "one", "a b.png": "two"}


def test_a_table_in_a_text_file(tmp_path):
    pictures(tmp_path)
    (tmp_path / "metadata.txt").write_text("file_name\ttext\na.png\t1girl, solo\nb.png\ttwo\n")
    assert captions(opened(tmp_path)) == BOTH
    # ... but not where it is the caption of a picture.
    pictures(tmp_path, "metadata.png")
    source = opened(tmp_path, max_bad_fraction=0.9)
    assert list(source.keys) == ["metadata.png"]


@pytest.mark.parametrize(
    "name", ["captions.txt", "results.token", "metadata.xlsx", "labels.xml", "list.yaml"]
)
def test_lists_that_are_not_read_are_named_where_captions_are_missing(tmp_path, name):
    pictures(tmp_path)
    (tmp_path / name).write_text("a.png one")
    source = opened(tmp_path)
    assert all(f"({name} lies there)" in reason for reason in reasons(source).values())
    (note,) = source.notes
    assert note.endswith(f"not {'used' if name.endswith('txt') else 'read'}: {name}.")


def test_what_other_programs_keep_beside_each_picture_is_no_list(tmp_path):
    pictures(tmp_path)
    for name, text in BOTH.items():
        (tmp_path / name).with_suffix(".txt").write_text(text)
        (tmp_path / name).with_suffix(".xml").write_text("<box/>")
    source = opened(tmp_path)
    assert captions(source) == BOTH and source.notes == []


def test_shards_and_tables_of_odd_names_are_pointed_at(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "0.tar").touch()
    with pytest.raises(DataError, match=rf"{tmp_path}/deep holds some: give that"):
        opened(tmp_path, "webdataset")
    (tmp_path / "T.PARQUET").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"T\.PARQUET lies there: call it T\.parquet"):
        opened(tmp_path, "huggingface")


def test_what_lies_beside_a_picture_without_caption_in_a_tar(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.cls").write_text("3")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a.png", "a.cls"):
            archive.add(tmp_path / name, name)
    assert "(a.cls lies there)" in reasons(opened(tmp_path, "webdataset"))["s.tar/a"]
