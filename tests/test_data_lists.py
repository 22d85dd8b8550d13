"""Lists of captions: what fits its header is read whole, all else is refused by its line."""

import gc
import json
import tarfile

import pytest
from PIL import Image

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.opening import open_source
from imagen_scale.errors import DataError


def pictures(folder, *names):
    """Small pictures that differ, at these places of a folder."""
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 2 * i, 3 * i)).save(file)
    return folder


def opened(folder, source="folder", **settings):
    return open_source(DataConfig(source=source, path=str(folder), **settings))


def captions(source):
    return dict(zip(source.keys, source.captions, strict=True))


# ---------------------------------------------------------------------------- rows and headers


@pytest.mark.parametrize(
    ("rows", "line", "cells"),
    [
        ("a.png,1girl, solo\n", 2, 3),
        ("a.png,fine\nb.png,1girl, solo, red\n", 3, 4),
        ("a.png,fine\n\n\nb.png,one,two\n", 5, 3),
        ('a.png,"one\nline"\nb.png,one,two\n', 4, 3),
        ("a.png,a cat\non a mat\n", 3, 1),  # a caption whose line break is not quoted
        ("a.png\nb.png,fine\n", 2, 1),
        ('a.png, "a cat", asleep\n', 2, 3),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_refused_with_its_line(tmp_path, rows, line, cells):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows)
    with pytest.raises(DataError, match=rf"metadata.csv, line {line}: has {cells} cells and its "
                       r"header 2 \(file_name, text\), separated by commas; put "):  # fmt: skip
        opened(tmp_path)


def test_a_quoted_caption_is_read_whole(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text,width\na.png,"1girl, solo, ""red""",4\nb.png,"two\nlines",5\n'
    )
    assert captions(opened(tmp_path)) == {"a.png": '1girl, solo, "red"', "b.png": "two lines"}


def test_what_spreadsheets_add_is_no_misfit(tmp_path):
    """Empty cells beyond the last column, rows of nothing but separators."""
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,,\na.png,one,,\n,,,\nb.png,two\n\n,\n")
    source = opened(tmp_path)
    assert captions(source) == {"a.png": "one", "b.png": "two"} and source.skipped == []
    (tmp_path / "metadata.csv").write_text("file_name,text,,\na.png,one, more,\n")
    with pytest.raises(DataError, match="line 2: has 4 cells and its header 2"):
        opened(tmp_path)


def test_an_open_quote_is_named_by_the_line_where_it_opens(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"fine\nb.png,two\n')
    with pytest.raises(DataError, match="metadata.csv, line 2: not a CSV row"):
        opened(tmp_path)


@pytest.mark.parametrize("header", ["file_name,text,text", "file_name,file_name,text"])
def test_a_column_that_stands_twice_is_refused(tmp_path, header):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(header + "\na.png,b,c\n")
    with pytest.raises(DataError, match=r"metadata.csv: the column '\w+' stands twice"):
        opened(tmp_path)


def test_a_key_that_stands_twice_in_a_line_is_refused(tmp_path):
    pictures(tmp_path, "a.png")
    good, twice = '{"file_name": "a.png", "text": "x"}', '{"file_name": "a", "text": 1, "text": 2}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{twice}\n")
    with pytest.raises(DataError, match="line 2: not JSON: the key 'text' stands twice"):
        opened(tmp_path)


def test_a_key_that_stands_twice_in_a_tar_is_named(tmp_path):
    pictures(tmp_path, "1.png")
    (tmp_path / "1.json").write_text('{"text": "one", "text": "two"}')
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("1.png", "1.json"):
            archive.add(tmp_path / name, name)
    (skipped,) = opened(tmp_path / "a.tar", "webdataset").skipped
    assert skipped.picture == "a.tar/1" and "the key 'text' stands twice" in skipped.reason


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its open files
def test_tables_that_datasets_would_read_are_looked_at_first(tmp_path, monkeypatch):
    """pandas takes the first cells of a row that is too long for an index, without a word."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = pictures(tmp_path / "set", "a.png", "b.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,1girl, solo\nb.png,1girl, red\n")
    with pytest.raises(DataError, match="metadata.csv, line 2: has 3 cells and its header 2"):
        opened(folder, "huggingface")
    (folder / "metadata.csv").write_text('file_name,text\na.png,"1girl, solo"\nb.png,"1girl, r"\n')
    assert opened(folder, "huggingface").captions == ["1girl, solo", "1girl, r"]
    rows = [{"file_name": f"{name}.png", "text": "1girl, solo"} for name in "ab"]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert opened(folder, "huggingface").captions == ["1girl, solo"] * 2
    gc.collect()
