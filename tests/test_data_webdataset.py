"""Tar shards: what is read, what is left out, and that nothing gets out of them."""

import io
import json
import os
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image
from support.runs import losses
from support.tiny import TINY

from imagen_scale.config import DataConfig, parse_config
from imagen_scale.data.prepared import prepare
from imagen_scale.data.sources.opening import open_source
from imagen_scale.data.sources.screening import usable_source
from imagen_scale.errors import ConfigError, DataError, EnvironmentProblem


def png(level=0, size=(20, 20), form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, form)
    return file.getvalue()


def tar(path, *entries, form=tarfile.PAX_FORMAT):
    """Writes a tar of (name, content) pairs; a TarInfo in place of a pair goes in as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            name, content = entry
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def opened(path, **settings):
    return open_source(DataConfig(source="webdataset", path=str(path), **settings))


def reasons(source):
    return {skip.picture: skip.reason for skip in source.skipped}


# ---------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pictures_and_captions_of_several_shards(tmp_path, form):
    tar(tmp_path / "00001.tar", ("d.webp", png(40, form="WEBP")), ("d.txt", "the last"), form=form)
    tar(
        tmp_path / "00000.tar",
        ("deep/a.jpg", png(10, form="JPEG")), ("deep/a.txt", " two \n words "),
        ("b.json", json.dumps({"text": "from json", "status": "success"})), ("b.png", png(20)),
        ("C.PNG", png(30)), ("C.json", '{"text": "not this"}'), ("C.txt", "the text counts"),
        form=form,
    )  # fmt: skip
    source = opened(tmp_path)
    assert source.captions == ["two words", "from json", "the text counts", "the last"]
    assert source.keys == ["00000.tar/deep/a", "00000.tar/b", "00000.tar/C", "00001.tar/d"]
    levels = [int(source.image(i, 8).mean().round()) for i in range(4)]
    assert levels == pytest.approx([10, 20, 30, 40], abs=1)
    assert source.size(1) == (20, 20) and source.check(1) is None
    assert source.skipped == [] and len(source) == 4


def test_a_single_tar_and_another_caption_key(tmp_path):
    path = tar(tmp_path / "a.tar", ("1.png", png()), ("1.json", '{"caption": "a dog"}'))
    assert opened(path, caption_column="caption").captions == ["a dog"]
    assert "has no 'text' (it has caption); set data.caption_column" in str(reasons(opened(path)))


def test_long_names_and_byte_order_marks(tmp_path):
    name = "deep/" * 40 + "ß" * 120
    path = tar(tmp_path / "a.tar", (f"{name}.png", png(9)), (f"{name}.txt", "\ufeffa dog"))
    source = opened(path)
    assert source.keys == [f"a.tar/{name}"] and source.captions == ["a dog"]
    assert (source.image(0, 8) == 9).all()


def test_other_members_are_not_looked_at(tmp_path):
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    path = tar(
        tmp_path / "a.tar", folder, ("1.png", png()), ("1.txt", "one"), ("1.cls", "7"),
        ("1.mask.png", png()), ("._1.png", b"macOS"), ("README.md", "hello"),
    )  # fmt: skip
    source = opened(path)
    assert source.keys == ["a.tar/1"] and source.skipped == []


def test_max_items_keeps_the_first_and_reads_no_further_shard(tmp_path):
    for shard in ("0", "1"):
        entries = [(f"{i}{end}", data) for i in range(3) for end, data in
                   ((".png", png()), (".txt", f"number {i}"))]  # fmt: skip
        tar(tmp_path / f"{shard}.tar", *entries)
    (tmp_path / "2.tar").write_bytes(b"never read")
    assert opened(tmp_path, max_items=4).keys == ["0.tar/0", "0.tar/1", "0.tar/2", "1.tar/0"]


def test_fingerprint_follows_the_shards(tmp_path):
    path = tar(tmp_path / "a.tar", ("1.png", png()), ("1.txt", "one"))
    before = opened(path).fingerprint
    assert opened(path).fingerprint == before
    os.utime(path, ns=(1, 1))
    assert opened(path).fingerprint != before


# ---------------------------------------------------------------------------- what is left out


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_nothing_leads_outside(tmp_path):
    """Names, links and devices are named and left out; only good.png is used."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(77))
    path = tar(
        tmp_path / "set" / "a.tar",
        ("good.png", png(1)), ("good.txt", "good"),
        ("../secret.png", png(2)), ("../secret.txt", "dots"),
        ("/etc/absolute.png", png(3)), ("x/../../y.png", png(4)),
        special("link.png", tarfile.SYMTYPE, str(secret)), ("link.txt", "link"),
        special("hard.png", tarfile.LNKTYPE, "../secret.png"), ("hard.txt", "hard"),
        special("pipe.png", tarfile.FIFOTYPE), special("device.png", tarfile.CHRTYPE),
    )  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    source = opened(path)
    assert source.keys == ["a.tar/good"] and (source.image(0, 8) == 1).all()
    found = reasons(source)
    for name in ("../secret.png", "/etc/absolute.png", "x/../../y.png"):
        assert "leads outside" in found[f"a.tar/{name}"], name
    for name in ("link.png", "hard.png"):
        assert "is a link" in found[f"a.tar/{name}"], name
    for name in ("pipe.png", "device.png"):
        assert "is no regular file" in found[f"a.tar/{name}"], name
    assert "has no picture" in found["a.tar/link"]  # its caption is left alone
    assert sorted(tmp_path.rglob("*")) == before  # nothing is extracted


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("1.png", png())], "has no caption; put KEY.txt"),
        ([("1.txt", "one")], "has no picture; remove it or add one"),
        ([("1.png", png()), ("1.txt", " \n")], "the caption is empty"),
        ([("1.png", png()), ("1.txt", b"\xff\xfe")], "1.txt is not UTF-8 text"),
        ([("1.png", png()), ("1.txt", "x" * (2**20 + 1))], "holds more than 1,048,576 bytes"),
        ([("1.png", png()), ("1.json", "{")], "1.json is not JSON"),
        ([("1.png", png()), ("1.json", "[" * 100_000)], "1.json is not JSON"),
        ([("1.png", png()), ("1.json", "[1]")], "holds a list"),
        ([("1.png", png()), ("1.json", '{"text": null}')], "the caption is missing"),
        (
            [("1.json", '{"status": "failed_to_download", "error_message": "HTTP Error 404"}')],
            r"has no picture \(failed_to_download: HTTP Error 404\)",
        ),
    ],
)
def test_what_is_left_out_has_its_reason(tmp_path, entries, reason):
    path = tar(tmp_path / "a.tar", ("good.png", png()), ("good.txt", "good"), *entries)
    source = opened(path)
    assert source.keys == ["a.tar/good"]
    (skip,) = source.skipped
    assert skip.picture == "a.tar/1"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(skip.reason)


def test_a_picture_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    caption, big = tarfile.TarInfo("1.txt"), tarfile.TarInfo("1.png")
    caption.size, big.size = 3, 200_000_001
    with path.open("wb") as file:
        file.write(caption.tobuf() + b"one".ljust(512, b"\0") + big.tobuf())
        file.truncate(file.tell() + -(-big.size // 512) * 512 + 1024)  # sparse
    source = opened(path)
    assert len(source) == 0 and "at most 200,000,000 are read" in reasons(source)["a.tar/1"]


def test_two_pictures_of_one_key(tmp_path):
    path = tar(tmp_path / "a.tar", ("1.png", png(1)), ("1.jpg", png(2)), ("1.txt", "one"))
    source = opened(path)
    assert (source.image(0, 8) == 1).all()
    assert reasons(source) == {"a.tar/1.jpg": "1 has a picture already; keep one."}


def test_pictures_go_through_the_same_screening(tmp_path):
    entries = [(f"{i}{end}", data) for i in range(30) for end, data in
               ((".png", png(i)), (".txt", f"number {i}"))]  # fmt: skip
    path = tar(tmp_path / "a.tar", *entries, ("bad.png", b"no picture"), ("bad.txt", "bad"))
    config = DataConfig(source="webdataset", path=str(path))
    with pytest.warns(UserWarning, match="1 of 31 pictures"):
        source, report = usable_source(config, tmp_path / "cache")
    assert len(source) == 30
    (skip,) = json.loads(report.read_text())["skipped"]
    assert skip["picture"] == "a.tar/bad" and "not a picture" in skip["reason"]


# ---------------------------------------------------------------------------- what is refused


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    whole = tar(
        tmp_path / "whole.tar", ("1.png", png()), ("1.txt", "one"), ("2.png", png()),
        ("2.txt", "two"), form=tarfile.USTAR_FORMAT,
    ).read_bytes()  # fmt: skip
    content = whole.rstrip(b"\0")
    last = -(-len(content) // 512) * 512  # the end mark follows
    cut = tmp_path / "cut.tar"
    for length in [0, 1, 511, 512, 600, 1024, 1536, 2048, last - 512, last - 1, last, last + 511]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar: .*(cut short|damaged).*again"):
            opened(cut)
    cut.write_bytes(whole[: last + 512])
    assert len(opened(cut)) == 2


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = tar(tmp_path / "a.tar", ("1.png", png()), ("1.txt", "one"), ("2.png", png()),
               ("2.txt", "two"), form=tarfile.USTAR_FORMAT)  # fmt: skip
    content = bytearray(path.read_bytes())
    content[512 + 512 + 3] ^= 1  # in the name of the second member
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged or cut short"):
        opened(path)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_named_as_such(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{kind}") as archive:
        info = tarfile.TarInfo("1.png")
        archive.addfile(info)
    with pytest.raises(DataError, match="is compressed; decompress it"):
        opened(path)


def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.type = kind
    buffer = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = size
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    return bytes(buffer)


@pytest.mark.parametrize(
    "content",
    [
        header("1.png", b"\xff" * 12) * 3 + bytes(1024),  # -1
        header("1.png", b"\x80" + b"\xff" * 11) + bytes(1024),
        header("1.png", b"77777777777\0", b"x") + bytes(1024),  # an extended header of 8 GB
        header("1.png", b"77777777777\0", b"L") + bytes(1024),  # a name of 8 GB
        header("1.png", b"\xff" * 12, b"x") + bytes(1024),
        header("x", b"00000000000\0", b"x") * 5000 + bytes(1024),
        b"not a tar at all" * 100,
    ],
    ids=["negative", "astronomic", "long pax", "long name", "negative pax", "chain", "text"],
)
def test_hostile_headers_are_refused_in_bounded_memory(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with path.open("ab") as file:
        file.truncate(9 * 10**9)  # sparse: what a header announces is there
    with pytest.raises(DataError, match=r"a\.tar"):
        opened(path)


def test_random_changes_never_end_in_a_traceback(tmp_path):
    whole = tar(tmp_path / "a.tar", *[(f"{i}{end}", data) for i in range(4) for end, data in
                ((".png", png(i)), (".txt", f"number {i}"))]).read_bytes()  # fmt: skip
    path = tmp_path / "b.tar"
    draw = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        for place in draw.integers(0, len(whole) - 9000, 5):
            content[place] = draw.integers(256)
        path.write_bytes(content)
        try:
            source = opened(path)
        except DataError:
            continue
        for i in range(len(source)):
            assert source.check(i) is None or isinstance(source.check(i), str)


def test_shards_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="neither a .tar nor a folder with .tar files"):
        opened(tmp_path)
    with pytest.raises(DataError, match="neither a .tar nor a folder"):
        opened(tmp_path / "none.tar")
    with pytest.raises(DataError, match="hold no pictures; put KEY.jpg"):
        opened(tar(tmp_path / "a.tar", ("README.md", "hello")))


def test_shards_behind_links_and_pipes(tmp_path):
    outside = tar(tmp_path / "a.tar", ("1.png", png()), ("1.txt", "one"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "b.tar").symlink_to(outside)
    with pytest.raises(DataError, match="is a symbolic link"):
        opened(folder)
    assert len(opened(folder, follow_symlinks=True)) == 1
    (folder / "b.tar").unlink()
    os.mkfifo(folder / "b.tar")
    with pytest.raises(DataError, match="is no regular file"):  # and never waits
        opened(folder)


def test_a_shard_that_becomes_shorter_or_goes_away(tmp_path):
    path = tar(tmp_path / "a.tar", ("1.png", png()), ("1.txt", "one"))
    source = opened(path)
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(DataError, match=r"a\.tar/1: the tar was changed"):
        source.image(0, 8)
    path.unlink()
    with pytest.raises(EnvironmentProblem, match=r"a\.tar: No such file"):
        source.image(0, 8)


# ---------------------------------------------------------------------------- img2dataset, runs


def test_img2datasets_failures_are_told(tmp_path):
    tar(tmp_path / "00000.tar", ("000000000.jpg", png(form="JPEG")), ("000000000.txt", "one"))
    stats = {"count": 10, "successes": 1, "failed_to_download": 9, "failed_to_resize": 0,
             "status_dict": {"success": 1, "HTTP Error 404: Not Found": 9}}  # fmt: skip
    (tmp_path / "00000_stats.json").write_text(json.dumps(stats))
    (tmp_path / "00000.parquet").write_bytes(b"not looked at")
    with pytest.warns(UserWarning, match=r"could not download 9 of 10 addresses.*404: Not Found"):
        assert len(opened(tmp_path)) == 1
    for broken in ("{", "[]", '{"count": "many", "successes": 1}'):
        (tmp_path / "00000_stats.json").write_text(broken)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(opened(tmp_path)) == 1


def test_the_configuration_knows_the_source():
    data = {"source": "webdataset"}
    with pytest.raises(ConfigError, match="data.path: required for source 'webdataset'"):
        parse_config(json.dumps(TINY | {"data": data}))
    with pytest.raises(ConfigError, match="webdataset"):
        parse_config(json.dumps(TINY | {"data": {"source": "webdatasets"}}))


@pytest.fixture
def shards(tmp_path):
    """Two shards of six pictures, and the configuration of a run on them."""
    draw = np.random.default_rng(0)
    for shard in range(2):
        entries = []
        for i in range(6):
            file = io.BytesIO()
            noise = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file, "PNG")
            entries += [(f"{i}.png", file.getvalue()), (f"{i}.txt", f"noise {shard} {i}")]
        tar(tmp_path / "shards" / f"{shard:05d}.tar", *entries)
    config = TINY | {"data": {"source": "webdataset", "path": str(tmp_path / "shards")}}
    path = tmp_path / "shards.json"
    path.write_text(json.dumps(config))
    return path


def test_prepared_pictures_are_those_of_the_tars(shards, tmp_path):
    overrides = (f'data.cache_dir="{tmp_path / "cache"}"',)
    config = parse_config(shards.read_text(), overrides=overrides)
    prepared = prepare(config)
    source = open_source(config.data)
    for size in config.imagen.image_sizes:
        for i in (0, 5, 6, 11):
            assert np.array_equal(prepared.images[size][i], source.image(i, size))


@pytest.mark.distributed
def test_two_processes_and_worker_processes_read_the_tars_as_one_does(shards, tmp_path, launch):
    """Nothing stored: every rank reads its pictures out of the tars, in any order."""
    options = ("--unet", "1", "data.cache_images_gb=0", "training.sample_every=null")
    launch(shards, tmp_path / "one", *options)
    launch(shards, tmp_path / "two", *options, "data.num_workers=1", processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-4)
