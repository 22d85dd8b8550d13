"""What makes squares of pictures (`data.fit`): the same wherever they are read, and said."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support.tiny import TINY

from imagen_scale.commands.main import main
from imagen_scale.config import parse_config
from imagen_scale.data.loading import batches
from imagen_scale.data.prepared import prepare
from imagen_scale.errors import ConfigError
from imagen_scale.training.samples import split_samples

# Ranks, micro-batch, first step and steps of the same ten steps of 12 samples.
WAYS = [(1, 12, (0, 10)), (2, 3, (0, 10)), (1, 4, (0, 4), (4, 6))]


@pytest.fixture
def config(tmp_path):
    """Twelve pictures, three times as wide as high, that brighten from left to right."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        ramp = np.tile(np.arange(96, dtype=np.uint8) * 2 + i, (32, 1))
        Image.fromarray(np.stack([ramp] * 3, axis=2)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"ramp {i}")

    def make(**data):
        places = {"source": "folder", "path": str(folder), "cache_dir": str(tmp_path / "cache")}
        return parse_config(json.dumps(TINY | {"data": places | data}))

    return make


def samples(config, stage=2):
    stage = config.stage(stage, 384)
    return split_samples(config, stage, prepare(config))


def read(sequence, way):
    """All samples by position, as the ranks of one way get them."""
    ranks, micro_batch, *parts = way
    found = {}
    for start, steps in parts:
        for rank in range(ranks):
            for batch in batches(
                sequence, start_step=start, steps=steps, global_batch=12,
                micro_batch=micro_batch, rank=rank, world_size=ranks, num_workers=0,
            ):  # fmt: skip
                found |= dict(zip(batch.positions.tolist(), batch.images, strict=True))
    return found


def test_crops_depend_on_seed_and_position_alone(config):
    once = read(samples(config(fit="random_crop")).train, WAYS[0])
    assert len(once) == 120
    for way in WAYS[1:]:
        again = read(samples(config(fit="random_crop")).train, way)
        assert again.keys() == once.keys()
        assert all((again[position] == picture).all() for position, picture in once.items())
    left = [int(picture[0, 0, 0]) for picture in once.values()]
    assert min(left) < 12 and max(left) > 116  # from one end to the other
    assert len(set(left)) > 40


def test_what_is_held_out_and_shown_is_the_centre(config):
    there = config(fit="random_crop", val_fraction=0.5)
    plain = config(val_fraction=0.5)
    ours, theirs = samples(there).held_out, samples(plain).held_out
    assert len(ours) == len(theirs) > 0
    for i in range(len(ours)):
        assert (ours[i].image == theirs[i].image).all()
    for size, store in prepare(plain).images.items():
        assert prepare(there).images[size].file == store.file  # prepared once for both


def test_padded_pictures_are_prepared_apart(config):
    cropped = prepare(config()).images[32]
    white = prepare(config(fit="pad")).images[32]
    blue = prepare(config(fit="pad", pad_colour=[0, 0, 255])).images[32]
    assert len({cropped.file, white.file, blue.file}) == 3
    assert (white[0][:, 0, 0] == 255).all() and blue[0][:, 0, 0].tolist() == [0, 0, 255]
    assert (white[0][:, 16] == blue[0][:, 16]).all()
    assert (prepare(config()).images[32][0] == cropped[0]).all()
    decoded = prepare(config(fit="pad", cache_images_gb=0)).images[32]
    assert decoded.file is None and (decoded[3] == white[3]).all()


def test_prepare_says_what_is_cut_away(config, tmp_path):
    file = tmp_path / "config.json"
    for fit, is_said in (("crop", True), ("pad", False), ("random_crop", False)):
        file.write_text(config(fit=fit).model_dump_json(exclude_unset=True))
        done = CliRunner().invoke(main, ["prepare", "--config", str(file)])
        assert done.exit_code == 0, done.output
        said = "12 of 12 lose more than 10% of their area to the centre crop; data.fit pad"
        assert (said in " ".join(done.output.split())) is is_said
    done = CliRunner().invoke(
        main, ["init", str(tmp_path / "pictures"), "--out", str(tmp_path / "new.json")]
    )
    assert "noted: 12 of 12 lose more than 10%" in done.output, done.output


def test_pictures_drawn_once_and_parts_that_change_exclude_each_other(config):
    text = json.dumps(TINY | {"training": TINY["training"] | {"lowres_samples": 0.5}})
    with pytest.raises(ConfigError, match="lowres_samples: draws each picture once"):
        parse_config(text, overrides=["data.fit=random_crop"])
    with pytest.raises(ConfigError, match="pad_colour"):
        parse_config(text, overrides=["data.pad_colour=[0,0,256]"])
