import multiprocessing
import os
import pickle
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.corpus import png_chunk, png_header

from imagen_scale.data.image_store import ImageStore, bytes_of, stored_sizes
from imagen_scale.data.sources import images
from imagen_scale.data.sources.images import load_picture
from imagen_scale.errors import DataError, EnvironmentProblem
from imagen_scale.files.atomic import temporary_path

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def quadrants():
    """Four flat colours, so that every one of the eight orientations looks different."""
    array = np.empty((32, 32, 3), np.uint8)
    array[:16, :16], array[:16, 16:], array[16:, :16], array[16:, 16:] = RED, GREEN, BLUE, WHITE
    return array


# ---------------------------------------------------------------------------- load_picture


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "jpg"])
def test_every_format_gives_its_colours(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    file = save(tmp_path / f"a.{suffix}", np.full((40, 40, 3), RED, np.uint8), **options)
    picture = load_picture(file, 16)
    assert picture.shape == (3, 16, 16) and picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    assert np.abs(picture.astype(int) - np.array(RED)[:, None, None]).max() <= 2


def test_shrinking_averages_instead_of_skipping_pixels(tmp_path):
    checkerboard = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    picture = load_picture(save(tmp_path / "a.png", checkerboard), 32)
    assert abs(picture.astype(int) - 127.5).max() < 3


def test_same_as_resizing_the_whole_picture_and_cutting_the_centre(tmp_path):
    rng = np.random.default_rng(0)
    array = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((90, 60)))
    whole = Image.fromarray(array).resize((48, 32), Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((8, 0, 40, 32))).transpose(2, 0, 1)
    picture = load_picture(save(tmp_path / "a.png", array), 32)
    assert np.abs(picture.astype(int) - expected).max() <= 2


def test_a_long_thin_picture_is_cut_before_it_is_enlarged(tmp_path):
    array = np.zeros((1, 200_000, 3), np.uint8)
    array[:, 100_000 - 50 : 100_000 + 50] = RED
    picture = load_picture(save(tmp_path / "a.png", array), 64)  # as a whole: 64 x 12,800,000
    assert (picture[0] == 255).all() and (picture[1:] == 0).all()


def test_contrast_is_not_stretched(tmp_path):
    array = np.full((20, 20, 3), 100, np.uint8)
    array[:10] = 120
    picture = load_picture(save(tmp_path / "a.png", array), 20)
    assert (picture.min(), picture.max()) == (100, 120)


def test_16_bit_grey_keeps_its_gradient(tmp_path):
    levels = np.arange(256, dtype=np.uint16) * 257  # 0 .. 65535 in 256 even steps
    picture = load_picture(save(tmp_path / "a.png", np.tile(levels, (256, 1))), 256)
    assert (picture == np.arange(256)).all()


def test_transparency_is_laid_over_white(tmp_path):
    array = np.zeros((16, 16, 4), np.uint8)
    array[:, :8, 3] = 255  # left: black; right: transparent black
    picture = load_picture(save(tmp_path / "a.png", array), 16)
    assert (picture[:, :, :8] == 0).all() and (picture[:, :, 8:] == 255).all()
    array[..., 3] = 128
    half = load_picture(save(tmp_path / "b.png", array), 16)
    assert (half == 127).all()


def test_transparent_palette_colour_is_white(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([*GREEN, *BLUE])
    image.paste(1, (0, 0, 8, 16))
    image.save(tmp_path / "a.gif", transparency=0)
    picture = load_picture(tmp_path / "a.gif", 16)
    assert tuple(picture[:, 0, 0]) == BLUE and tuple(picture[:, 0, 15]) == WHITE


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / f"a.{suffix}", quadrants()[:, :24], exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    start = [(side - 24) // 2 for side in expected.shape[:2]]
    expected = expected[start[0] : start[0] + 24, start[1] : start[1] + 24].transpose(2, 0, 1)
    assert np.abs(load_picture(file, 24) - expected).mean() < 3


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert tuple(load_picture(tmp_path / "a.gif", 8)[:, 4, 4]) == RED


def damaged(folder, kind):
    file = folder / "broken.png"
    if kind == "text":
        file.write_text("hello")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        save(file, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        file.write_bytes(file.read_bytes()[:500])
    elif kind == "other format":
        Image.new("RGB", (8, 8)).save(file, format="PPM")
    elif kind == "32 bit":
        save(file, np.zeros((8, 8), np.float32), format="TIFF")
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    return file


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "not a picture in one of the formats JPEG"),
        ("empty", "not a picture in one of the formats JPEG"),
        ("other format", "not a picture in one of the formats JPEG"),
        ("cut", "cannot be read: .*repair it or remove it"),
        ("32 bit", "32-bit levels"),
        ("missing", "cannot be read: No such file"),
        ("folder", "cannot be read: Is a directory"),
        ("pipe", "not a regular file"),
    ],
)
def test_unreadable_picture_gives_the_reason(tmp_path, kind, reason):
    file = damaged(tmp_path, kind)
    with pytest.raises(DataError, match=f"^(the picture )?(has )?{reason}"):
        load_picture(file, 16)


def test_trouble_of_the_disk_is_not_the_pictures_fault():
    # The first page of a process's memory: the one file at hand whose reading ends in EIO.
    with pytest.raises(EnvironmentProblem, match="/proc/self/mem: Input/output error; look after"):
        load_picture(Path("/proc/self/mem"), 16)


@pytest.mark.parametrize(
    ("suffix", "options", "limits"),
    [
        ("png", {}, {"MAX_PIXELS": 1600}),
        ("jpg", {"progressive": True}, {"MAX_PIXELS": 1600}),
        ("jpg", {}, {"MAX_PIXELS_OF": {"plain JPEG": 1600}}),
        ("webp", {}, {"MAX_PIXELS_OF": {"WEBP": 1600}}),
    ],
)
def test_too_many_pixels_are_refused(tmp_path, monkeypatch, suffix, options, limits):
    for name, limit in limits.items():
        monkeypatch.setattr(images, name, limit)
    file = save(tmp_path / f"a.{suffix}", np.zeros((40, 40), np.uint8), **options)
    assert load_picture(file, 8).shape == (3, 8, 8)
    file = save(tmp_path / f"b.{suffix}", np.zeros((40, 41), np.uint8), **options)
    with pytest.raises(
        DataError, match=r"too large: 41 x 40 pixels, and of a .* at most 1,600 .*scale it"
    ):
        load_picture(file, 8)


def test_too_many_bytes_are_refused(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(images, "MAX_FILE_BYTES", file.stat().st_size)
    assert load_picture(file, 8).shape == (3, 8, 8)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", file.stat().st_size - 1)
    with pytest.raises(DataError, match="too large: the file has .* bytes and at most .* are read"):
        load_picture(file, 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_large_pictures_are_reduced_strip_by_strip_to_the_same_picture(tmp_path, mode):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    image = coarse.resize((5011, 4101), Image.Resampling.BICUBIC).convert(mode)
    image.save(tmp_path / "a.png", compress_level=1)
    picture = load_picture(tmp_path / "a.png", 32).astype(int)
    square = image.convert("RGB").crop((455, 0, 4556, 4101))
    whole = np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.abs(picture - whole).max() <= 2


@pytest.mark.parametrize("side", [12_000, 30_000])  # Pillow only warns of the first
def test_header_of_a_decompression_bomb_is_enough(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side) + png_chunk(b"IDAT", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="too large"):
            load_picture(tmp_path / "bomb.png", 16)


# ---------------------------------------------------------------------------- data.fit


def stripes(width, height):
    """Red left of the middle third, green in it, blue right of it; or from the top on."""
    picture = np.zeros((height, width, 3), np.uint8)
    along = np.arange(max(width, height)) * 3 // max(width, height)
    picture[np.arange(height)[:, None], np.arange(width), along if width > height else
            along[:, None]] = 255  # fmt: skip
    return picture


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300)])
def test_a_padded_picture_is_whole_and_the_rest_has_the_colour(tmp_path, width, height):
    file = save(tmp_path / "a.png", stripes(width, height))
    picture = load_picture(file, 30, pad=(1, 2, 3))
    if height > width:
        picture = picture.transpose(0, 2, 1)
    assert (picture[:, :10] == [[[1]], [[2]], [[3]]]).all()
    assert (picture[:, 20:] == [[[1]], [[2]], [[3]]]).all()
    assert picture[:, 15, [2, 14, 27]].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1), (5000, 3), (7, 5), (64, 64)])
def test_any_shape_is_padded_and_a_square_is_as_it_is_cropped(tmp_path, shape):
    file = save(tmp_path / "a.png", np.full((*shape, 3), 90, np.uint8))
    picture = load_picture(file, 64, pad=(0, 0, 0))
    assert picture.shape == (3, 64, 64) and picture.max() == 90
    if shape[0] == shape[1]:
        assert (picture == load_picture(file, 64)).all()


def test_a_place_lies_between_the_ends_of_the_longer_side(tmp_path):
    for width, height in ((300, 100), (100, 300)):
        file = save(tmp_path / f"{width}.png", stripes(width, height))
        for place, colour in ((0.0, 0), (0.5, 1), (1 - 2**-53, 2)):
            picture = load_picture(file, 10, place=place)
            assert (picture.argmax(axis=0) == colour).all() and picture.max() == 255
        assert (load_picture(file, 10) == load_picture(file, 10, place=0.5)).all()


# ---------------------------------------------------------------------------- ImageStore


class CountingSource:
    """Numbered flat pictures; notes in a file each one that is decoded or checked."""

    def __init__(self, log: Path, length: int = 5, broken: int | None = None) -> None:
        self.captions = [f"number {i}" for i in range(length)]
        self.keys = [str(i) for i in range(length)]
        self.fingerprint = "abc123"
        self.skipped = []
        self.attribution = None
        self._log = log
        self._broken = broken

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int, size: int) -> np.ndarray:
        self._note("image", i)
        return np.full((3, size, size), i, np.uint8)

    def check(self, i: int) -> str | None:
        return None

    def _note(self, what: str, i: int) -> None:
        if i == self._broken:
            raise DataError(f"picture {i}: broken")
        with self._log.open("a") as log:
            log.write(f"{what} {i}\n")

    def notes(self) -> list[str]:
        return self._log.read_text().split("\n")[:-1] if self._log.exists() else []


def test_pictures_are_prepared_once(tmp_path):
    source = CountingSource(tmp_path / "log")
    reports = []
    store = ImageStore.open(
        source,
        4,
        tmp_path,
        stored=True,
        progress=lambda *report: reports.append(report),
    )
    assert len(store) == 5
    assert reports[0] == ("preparing pictures (4 px)", 1, 5) and reports[-1][1:] == (5, 5)
    again = ImageStore.open(source, 4, tmp_path, stored=True)
    for i in range(5):
        assert (again[i] == i).all() and again[i].shape == (3, 4, 4)
    assert source.notes() == [f"image {i}" for i in range(5)]
    assert (tmp_path / "images" / "abc123_4.npy").is_file()


def test_each_size_has_its_own_file(tmp_path):
    source = CountingSource(tmp_path / "log")
    for size in (4, 8):
        assert ImageStore.open(source, size, tmp_path, stored=True)[0].shape == (3, size, size)


def test_what_is_read_may_be_changed(tmp_path):
    store = ImageStore.open(CountingSource(tmp_path / "log"), 4, tmp_path, stored=True)
    store[1][:] = 99
    assert (store[1] == 1).all()


def test_beyond_the_limit_pictures_are_decoded_at_every_read(tmp_path):
    source = CountingSource(tmp_path / "log")
    assert stored_sizes([4], 5, 5 * 3 * 4 * 4 - 1) == set()
    assert stored_sizes([4], 5, 5 * 3 * 4 * 4) == {4}
    store = ImageStore.open(source, 4, tmp_path, stored=False)
    assert source.notes() == []
    assert (store[3] == 3).all() and source.notes() == ["image 3"]
    assert not list(tmp_path.rglob("*.npy"))


def test_the_limit_counts_for_all_sizes_and_the_small_ones_come_first():
    small, large = 5 * bytes_of(4), 5 * bytes_of(8)
    assert stored_sizes([4, 8], 5, small + large) == {4, 8}
    assert stored_sizes([4, 8], 5, small + large - 1) == {4}
    assert stored_sizes([8, 4], 5, small) == {4}  # one that is too large takes nothing


def test_nothing_half_written_remains_after_an_error(tmp_path):
    with pytest.raises(DataError, match="picture 2"):
        ImageStore.open(CountingSource(tmp_path / "log", broken=2), 4, tmp_path, stored=True)
    assert [file.suffix for file in (tmp_path / "images").iterdir()] in ([], [".lock"])
    assert (
        ImageStore.open(CountingSource(tmp_path / "log"), 4, tmp_path, stored=True)[2] == 2
    ).all()


def test_leftovers_and_cut_files_are_built_again(tmp_path):
    source = CountingSource(tmp_path / "log")
    ImageStore.open(source, 4, tmp_path, stored=True)
    file = tmp_path / "images" / "abc123_4.npy"
    file.write_bytes(file.read_bytes()[:-10])
    left = temporary_path(file).name.replace(f"-{os.getpid()}.", "-4194305.")  # no such number
    file.with_name(left).write_bytes(b"of a killed process")
    assert (ImageStore.open(source, 4, tmp_path, stored=True)[4] == 4).all()
    assert sorted(f.suffix for f in file.parent.iterdir()) in ([".npy"], [".lock", ".npy"])


def test_full_disk_is_reported(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left on device; free disk space"):
        ImageStore.open(CountingSource(tmp_path / "log"), 4, tmp_path, stored=True)
    assert not list(tmp_path.rglob("*.npy*"))


def test_unusable_cache_folder_is_reported(tmp_path):
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(EnvironmentProblem, match="images: cannot be written: .*data.cache_dir"):
        ImageStore.open(CountingSource(tmp_path / "log"), 4, tmp_path, stored=True)


def test_pickled_store_is_small_and_works(tmp_path):
    store = ImageStore.open(CountingSource(tmp_path / "log", 200), 32, tmp_path, stored=True)
    assert (store[7] == 7).all()  # the map is open now
    pickled = pickle.dumps(store)
    assert len(pickled) < 2000
    assert (pickle.loads(pickled)[7] == 7).all()


class SlowSource(CountingSource):
    def image(self, i: int, size: int) -> np.ndarray:
        time.sleep(0.05)
        return super().image(i, size)


def _open_together(folder: Path, barrier, results) -> None:
    source = SlowSource(folder / "log")
    barrier.wait()
    store = ImageStore.open(source, 4, folder, stored=True)
    results.put([int(store[i].mean()) for i in range(len(store))])


def test_processes_that_open_at_once_build_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=_open_together, args=(tmp_path, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[0, 1, 2, 3, 4]] * 2
    for process in processes:
        process.join()
    assert CountingSource(tmp_path / "log").notes() == [f"image {i}" for i in range(5)]
