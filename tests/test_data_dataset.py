import multiprocessing
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT
from support.sequences import CAPTIONS, COUNT, EMBEDDINGS, SIZE, loaded, sequence

from imagen_scale.config import parse_config
from imagen_scale.data.prepared import cache_dir, prepare
from imagen_scale.data.seeds import seeded
from imagen_scale.data.sequence import split_indices
from imagen_scale.errors import ConfigError, DataError, EnvironmentProblem
from imagen_scale.files.pictures import from_uint8


def captions_at(dataset, positions):
    return [dataset[position].caption for position in positions]


# ---------------------------------------------------------------------------- seeded and split


def test_seeded_is_fixed_and_spread():
    assert seeded("flip", 0, 1) == seeded("flip", 0, 1)
    draws = [seeded("x", i) for i in range(4000)]
    assert all(0 <= draw < 2**63 for draw in draws)
    assert abs(np.mean(draws) / 2**63 - 0.5) < 0.03
    assert len({seeded(1, 23), seeded(12, 3), seeded("1", 23), seeded("123")}) == 4


def test_seeded_does_not_change_between_versions():
    # A changed value would silently change the data order of every run that is resumed.
    assert seeded("epoch", 0, 0) == SEEDED_EPOCH_0_0


SEEDED_EPOCH_0_0 = 7689492316549715787


def test_split_shares_out_every_picture():
    keys = [f"{i}.png" for i in range(5000)]
    train, val = split_indices(keys, 0.1)
    assert sorted(train + val) == list(range(5000)) and train == sorted(train)
    assert 400 < len(val) < 600
    assert split_indices(keys, 0.0) == (list(range(5000)), [])


def test_split_of_a_picture_does_not_depend_on_the_others():
    keys = [f"{i}.png" for i in range(200)]
    held_out = {keys[i] for i in split_indices(keys, 0.2)[1]}
    fewer = keys[::-3]
    assert {fewer[i] for i in split_indices(fewer, 0.2)[1]} == held_out & set(fewer)
    assert held_out <= {keys[i] for i in split_indices(keys, 0.4)[1]}


# ---------------------------------------------------------------------------- the sequence


def test_every_epoch_shows_every_picture_once_in_another_order():
    dataset = sequence()
    assert len(dataset) == COUNT
    epochs = [captions_at(dataset, range(e * COUNT, (e + 1) * COUNT)) for e in range(5)]
    assert all(sorted(epoch) == sorted(CAPTIONS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert captions_at(sequence(seed=1), range(COUNT)) != epochs[0]
    assert captions_at(sequence(), range(COUNT)) == epochs[0]  # and not of what was asked before


def test_order_of_epochs_does_not_change_between_versions():
    assert [int(c.split()[1]) for c in captions_at(sequence(), range(COUNT))] == EPOCH_0


EPOCH_0 = [9, 6, 5, 0, 4, 8, 3, 2, 7, 1]


def test_only_the_given_pictures_take_part():
    assert set(captions_at(sequence([2, 5, 7]), range(9))) == {"number 2", "number 5", "number 7"}


def test_without_shuffling_the_order_is_the_given_one():
    dataset = sequence([3, 1, 2], shuffle=False)
    assert captions_at(dataset, range(6)) == ["number 3", "number 1", "number 2"] * 2


def test_no_pictures():
    with pytest.raises(DataError, match="data.val_fraction: of 10 pictures none falls"):
        sequence([])


def test_caption_picture_and_text_belong_together():
    dataset = sequence()
    for position in range(COUNT):
        sample = dataset[position]
        i = CAPTIONS.index(sample.caption)
        assert sample.image[0, 0, 0] == i and sample.text_embeds.shape == (i + 1, 2)
        assert sample.position == position


def test_half_of_the_samples_are_mirrored_as_the_position_says():
    dataset = sequence(flip=True)
    flipped = [bool(dataset[g].image[0, 0, 0] >= 100) for g in range(400)]
    assert 150 < sum(flipped) < 250
    assert flipped == [bool(sequence(flip=True)[g].image[0, 0, 0] >= 100) for g in range(400)]
    other = sequence(flip=True, seed=1)
    assert flipped != [bool(other[g].image[0, 0, 0] >= 100) for g in range(400)]
    assert not any(sequence()[g].image[0, 0, 0] >= 100 for g in range(50))


def test_collate():
    dataset = sequence(flip=True, max_text_len=6)
    batch = dataset.collate([dataset[g] for g in range(20, 28)])
    assert batch.images.shape == (8, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    pictures = np.stack([dataset[g].image for g in range(20, 28)])
    np.testing.assert_array_equal(batch.images, pictures)
    lengths = [min(6, len(EMBEDDINGS[caption])) for caption in batch.captions]
    assert batch.text_mask.sum(1).tolist() == lengths
    assert batch.text_embeds.shape == (8, 6, 2) and batch.text_embeds.dtype == torch.float16
    assert batch.positions.tolist() == list(range(20, 28))
    assert batch.positions.dtype == torch.int64


def test_black_and_white_are_minus_one_and_one():
    assert from_uint8(torch.tensor([0, 255, 0], dtype=torch.uint8)).tolist() == [-1, 1, -1]


# ---------------------------------------------------------------------------- batches


def positions(iterator):
    return [batch.positions.tolist() for batch in iterator]


def test_micro_batches_of_one_rank():
    assert positions(loaded(start_step=5, steps=2, global_batch=4, micro_batch=2)) == [
        [20, 21], [22, 23], [24, 25], [26, 27],
    ]  # fmt: skip


def test_micro_batches_of_two_ranks():
    ranks = [positions(loaded(steps=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert ranks == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world_size):
    seen = Counter()
    for rank in range(world_size):
        for batch in loaded(rank=rank, world_size=world_size):
            seen.update(zip(batch.positions.tolist(), batch.captions, strict=True))
    alone = sequence(flip=True)
    assert seen == Counter((g, alone[g].caption) for g in range(36))


def test_resuming_is_continuing():
    whole = list(loaded(steps=6))
    per_step = 4
    resumed = list(loaded(start_step=2, steps=4))
    assert len(resumed) == len(whole) - 2 * per_step
    for a, b in zip(whole[2 * per_step :], resumed, strict=True):
        assert a.captions == b.captions and torch.equal(a.images, b.images)
        assert torch.equal(a.text_embeds, b.text_embeds)


def test_workers_change_nothing():
    for a, b in zip(loaded(), loaded(num_workers=2), strict=True):
        assert torch.equal(a.images, b.images) and a.captions == b.captions
        assert torch.equal(a.text_mask, b.text_mask)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(num_workers):
    before = torch.get_rng_state()
    next(loaded(num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_without_end_is_not_listed_in_memory():
    first = next(islice(loaded(steps=10**12), 1))
    assert first.positions.tolist() == [0, 1, 2]


def test_ranks_that_cannot_share_the_batch():
    with pytest.raises(ConfigError, match="12 is not a multiple of micro_batch 3 x 3 ranks"):
        loaded(world_size=3)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [DataError, EnvironmentProblem])
def test_error_in_a_worker_stays_one_sentence(kind, num_workers):
    dataset = sequence()
    dataset._images.trouble = kind
    others = set(multiprocessing.active_children())
    with pytest.raises(kind) as caught:
        next(loaded(dataset, num_workers=num_workers))
    assert set(multiprocessing.active_children()) <= others
    assert str(caught.value) == "a.png: the picture cannot be read: it is gone; repair it."


AT_WORK = "next(sys.kept)"
STUCK = "assert pictures.is_asked.wait(60)"


@pytest.mark.parametrize("pictures, state", [("Pictures", AT_WORK), ("Stuck", STUCK)])
@pytest.mark.parametrize("end", ["", "del sys.kept"])
def test_a_process_ends_whatever_its_workers_do(pictures, state, end):
    """At exit Python asks its daemons to stop by a signal that they ignore, and waits."""
    script = f"""
import multiprocessing, sys
from support.sequences import *
dataset, pictures = sequence(), {pictures}()
dataset._images = pictures
sys.kept = loaded(dataset, num_workers=1)
{state}
print(len(multiprocessing.active_children()), flush=True)
{end}
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


# ---------------------------------------------------------------------------- prepare


def config(folder, gigabytes=8.0):
    return parse_config(
        f"""{{
        "imagen": {{"image_sizes": [8, 16], "text_encoder_name": "minilm"}},
        "unets": [{{"dim": 8}}, {{"dim": 8}}],
        "data": {{"names": ["red heart", "dog"], "cache_dir": {folder},
                  "cache_images_gb": {gigabytes}}},
        "training": {{"precision": "fp32"}}
        }}"""
    )


def test_prepare_serves_every_stage(tmp_path):
    reports = []
    prepared = prepare(config(f'"{tmp_path}"'), lambda *report: reports.append(report))
    assert prepared.source.captions == ["red heart", "dog"]
    assert {size: store[0].shape for size, store in prepared.images.items()} == {
        8: (3, 8, 8),
        16: (3, 16, 16),
    }
    assert prepared.report.is_file()
    assert prepared.embeddings["dog"].shape == (3, 384) and prepared.embeddings.dim == 384
    assert [what for what, done, total in reports if done == total] == [
        "checking pictures",
        "preparing pictures (8 px)",
        "preparing pictures (16 px)",
        "encoding captions",
    ]
    assert list(prepare(config(f'"{tmp_path}"'), only=[16]).images) == [16]


def test_limit_of_the_cache_counts_all_sizes(tmp_path):
    small, large = (2 * 3 * size**2 for size in (8, 16))
    both = config(f'"{tmp_path}"', (small + large) / 1e9)
    too_little = config(f'"{tmp_path}"', (small + large - 1) / 1e9)
    prepare(too_little)
    assert [file.name[-6:] for file in tmp_path.rglob("images/*.npy")] == ["_8.npy"]
    prepare(too_little, only=[16])
    assert not list(tmp_path.rglob("*_16.npy"))
    prepare(both, only=[16])
    assert list(tmp_path.rglob("*_16.npy"))


def test_cache_dir(monkeypatch, tmp_path):
    assert cache_dir(config('"~/x"')) == Path.home() / "x"
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    assert cache_dir(config("null")) == tmp_path
    assert cache_dir(config('"/y"')) == Path("/y")
    monkeypatch.delenv("IMAGEN_SCALE_CACHE")
    assert cache_dir(config("null")) == Path.home() / ".cache" / "imagen-scale"
