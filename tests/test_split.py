"""Pictures that belong together are held out together or not at all (`data.val_group`)."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from PIL import Image
from support.tiny import TINY

from imagen_scale.commands.main import main
from imagen_scale.config import DataConfig, parse_config
from imagen_scale.data.sequence import split_indices
from imagen_scale.data.split import groups, split
from imagen_scale.errors import ConfigError, DataError

KEYS = [f"{folder}/{thing}_{view}.png" for folder in "abcdefgh" for thing in "xyz"
        for view in range(4)]  # fmt: skip
SOURCE = SimpleNamespace(keys=KEYS, captions=[f"a {key[2]}" for key in KEYS])


def sides(group, source=SOURCE):
    return split(DataConfig(val_fraction=0.4, val_group=group), source)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("caption", lambda key: key[2]),
        ("folder", lambda key: key[0]),
        (r"^(.*)_\d+", lambda key: key[:3]),
        (r"[xyz]", lambda key: key[2]),
        (r"(q)?_(\d)", lambda key: key[4]),  # the group took no part: what was found counts
    ],
)
def test_groups_are_never_parted(group, name):
    train, held_out = sides(group)
    assert sorted(train + held_out) == list(range(len(KEYS)))
    assert not {name(KEYS[i]) for i in train} & {name(KEYS[i]) for i in held_out}
    names = groups(DataConfig(val_group=group), SOURCE)
    assert len(set(names)) == len({name(key) for key in KEYS})


def test_each_picture_is_a_group_without_and_where_nothing_is_found():
    assert sides(None) == tuple(split_indices(KEYS, 0.4))
    names = groups(DataConfig(val_group=r"a/(.)_"), SOURCE)
    assert names[12:] == KEYS[12:] and len(set(names[:12])) == 3


def test_what_else_is_there_moves_no_group():
    some = KEYS[::5]
    fewer = SimpleNamespace(keys=some, captions=["a"] * len(some))
    held_out = {KEYS[i] for i in sides(r"^(.*)_").held_out}
    assert {some[i] for i in sides(r"^(.*)_", fewer).held_out} == held_out & set(some)


def test_groups_that_are_none_are_said():
    with pytest.raises(DataError, match="is found in no key; the first is 'a/x_0.png'"):
        sides("nothing")
    flat = SimpleNamespace(keys=["a.png", "b.png"], captions=["a", "b"])
    with pytest.raises(DataError, match="all pictures lie in one folder"):
        sides("folder", flat)
    with pytest.raises(ConfigError, match="is no regular expression"):
        parse_config(json.dumps(TINY), overrides=["data.val_group=("])


def test_prepare_names_the_remedy_and_it_works(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        for view in "ab":
            Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(folder / f"{i}{view}.png")
            (folder / f"{i}{view}.txt").write_text(f"red {i}")
    data = {"source": "folder", "path": str(folder), "val_fraction": 0.5,
            "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"data": data}))

    def prepare(*more):
        done = CliRunner().invoke(main, ["prepare", "--config", str(file), *more])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "keep them together with data.val_group" in " ".join(prepare().split())
    assert json.loads(prepare("--json"))["split_duplicates"] > 0
    grouped = prepare("--set", "data.val_group=caption")
    assert "in 12 groups" in grouped and "both trained on" not in grouped
    assert json.loads(prepare("--set", "data.val_group=caption", "--json"))["split_duplicates"] == 0
