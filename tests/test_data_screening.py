"""Malformed pictures are left out, named and counted; too many of them stop the run."""

import json
import shutil

import numpy as np
import pytest
from support.corpus import mutant, photo, write_corpus
from support.kept import OTHER_JSON
from support.runs import losses
from support.tiny import TINY

from imagen_scale.config import DataConfig
from imagen_scale.data.sequence import split_indices
from imagen_scale.data.sources import screening
from imagen_scale.data.sources.images import load_picture
from imagen_scale.data.sources.screening import usable_source
from imagen_scale.errors import DataError


def listed(folder, names):
    rows = (json.dumps({"file_name": name, "text": f"a {name}"}) + "\n" for name in names)
    (folder / "metadata.jsonl").write_text("".join(rows))


def photos(folder, count):
    """A set of good pictures."""
    folder.mkdir()
    for i in range(count):
        photo().save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"number {i}")
    return folder


def screened(folder, cache, **settings):
    config = DataConfig(source="folder", path=str(folder), **settings)
    return usable_source(config, cache)


def read(report):
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "set"
    usable = write_corpus(folder)
    listed(folder, usable)
    return folder, usable


def test_the_corpus_has_61_entries_and_none_gets_past_its_verdict(corpus, tmp_path):
    folder, usable = corpus
    assert len(usable) == 61
    with pytest.warns(UserWarning, match=r"of 61 pictures \(.*%\) cannot be used and are left out"):
        source, report = screened(folder, tmp_path, max_bad_fraction=0.9)
    skipped = {entry["picture"].rpartition(": ")[2] for entry in read(report)["skipped"]}
    assert skipped.isdisjoint(source.keys) and skipped | set(source.keys) == set(usable)
    for name, is_usable in usable.items():
        assert is_usable in (None, name in source.keys), name
    assert read(report)["used"] == len(source) == 61 - len(skipped)
    assert all(entry["reason"] for entry in read(report)["skipped"])
    for i in range(len(source)):
        picture = source.image(i, 16)
        assert picture.shape == (3, 16, 16) and picture.dtype == np.uint8


def test_too_many_bad_pictures_stop_the_run_with_the_first_ones(corpus, tmp_path):
    folder, _ = corpus
    with pytest.raises(DataError, match=r"4 of 61 pictures \(6.6%\) .* \(none was decoded yet\)"):
        screened(folder, tmp_path)
    with pytest.raises(DataError) as caught:
        screened(folder, tmp_path, max_bad_fraction=0.1)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("data.path: ") and "more than data.max_bad_fraction 0.1" in lines[0]
    assert lines[1].startswith("  ") and len(lines) == 1 + screening.FIRST + 1
    report = lines[-1].partition("all of them in ")[2]
    assert len(read(tmp_path / report)["skipped"]) > screening.FIRST


@pytest.mark.parametrize(("bad", "refused"), [(1, False), (2, True)])
def test_the_limit_is_a_share_of_all(tmp_path, bad, refused):
    folder = photos(tmp_path / "set", 20)
    for i in range(bad):
        (folder / f"{i:03d}.png").write_text("broken")
    if refused:
        with pytest.raises(DataError, match=r"2 of 20 pictures \(10.0%\)"):
            screened(folder, tmp_path)
    else:
        with pytest.warns(UserWarning, match=r"1 of 20 pictures \(5.0%\) cannot be used"):
            assert len(screened(folder, tmp_path)[0]) == 19


def test_captions_and_pictures_count_together(tmp_path):
    folder = photos(tmp_path / "set", 20)
    (folder / "000.txt").write_text(" ")
    (folder / "001.png").write_text("broken")
    with pytest.raises(DataError, match=r"2 of 20 (.|\n)*000.png: the caption(.|\n)*001.png: not"):
        screened(folder, tmp_path)


def test_a_good_set_is_reported_too(tmp_path):
    source, report = screened(photos(tmp_path / "set", 3), tmp_path)
    assert read(report) == {
        "source": "folder", "path": str(tmp_path / "set"), "used": 3, "skipped": [],
        "notes": [],
    }  # fmt: skip
    assert len(source) == 3


@pytest.mark.filterwarnings("ignore:.*cannot be used:UserWarning")
def test_the_split_of_the_others_stays_when_a_picture_turns_bad(tmp_path):
    folder = photos(tmp_path / "set", 60)

    def held_out():
        source, _ = screened(folder, tmp_path)
        return {source.keys[i] for i in split_indices(source.keys, 0.3)[1]}, set(source.keys)

    before, everything = held_out()
    gone = sorted(before)[0]
    (folder / gone).write_text("broken")
    after, rest = held_out()
    assert rest == everything - {gone} and after == before - {gone}


@pytest.mark.filterwarnings("ignore:.*cannot be used:UserWarning")
def test_pictures_are_decoded_once_until_they_change(tmp_path):
    folder = photos(tmp_path / "set", 30)
    (folder / "007.png").write_text("broken")
    calls = []
    first = screened(folder, tmp_path)
    config = DataConfig(source="folder", path=str(folder))
    again = usable_source(config, tmp_path, lambda *call: calls.append(call))
    assert calls == [] and again[1] == first[1] and again[0].keys == first[0].keys
    assert again[0].fingerprint == first[0].fingerprint
    photo().save(folder / "007.png")  # repaired
    whole, report = usable_source(config, tmp_path, lambda *call: calls.append(call))
    assert calls[-1] == ("checking pictures", 30, 30) and len(whole) == 30
    assert read(report)["skipped"] == []


@pytest.mark.filterwarnings("ignore:.*cannot be used:UserWarning")
@pytest.mark.parametrize("text", OTHER_JSON)
def test_damaged_verdicts_are_found_again(tmp_path, text):
    folder = photos(tmp_path / "set", 30)
    (folder / "007.png").write_text("broken")
    _, report = screened(folder, tmp_path)
    (report.parent / "unreadable.json").write_text(text)
    assert len(screened(folder, tmp_path)[0]) == 29


def test_pictures_may_move_with_their_verdicts(tmp_path):
    screened(photos(tmp_path / "set", 3), tmp_path)
    shutil.move(tmp_path / "set", tmp_path / "moved")
    calls = []
    config = DataConfig(source="folder", path=str(tmp_path / "moved"))
    usable_source(config, tmp_path, lambda *call: calls.append(call))
    assert calls == []


def test_a_run_trains_on_the_others_and_says_so(tmp_path, launch):
    folder = photos(tmp_path / "set", 20)
    (folder / "007.png").write_text("broken")
    config = TINY | {
        "data": {"source": "folder", "path": str(folder), "cache_dir": str(tmp_path / "cache")},
        "training": TINY["training"] | {"steps": 3, "warmup_steps": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = launch(tmp_path / "config.json", tmp_path / "run", "--unet", "1", plain=True)
    assert "16 px, 19 pictures" in done.stdout
    assert "1 of 20 pictures (5.0%) cannot be used and are left out; see " in done.stderr
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("seed", range(40))
def test_mutants_are_read_or_refused_with_a_reason(tmp_path, seed):
    (tmp_path / "mutant").write_bytes(mutant(seed))
    try:
        picture = load_picture(tmp_path / "mutant", 16)
    except DataError as reason:
        assert str(reason).endswith(".")
    else:
        assert picture.shape == (3, 16, 16) and picture.dtype == np.uint8
