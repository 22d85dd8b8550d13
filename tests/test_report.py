"""The page about a run: what it shows, that it holds everything itself, that text stays text."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import write_stage
from PIL import Image

from imagen_scale.cli import main
from imagen_scale.report.chart import Series, line_chart, number, smoothed, thinned, ticks
from imagen_scale.report.pictures import MAX_FRAMES, embedded, frames, spread

VOID = {"meta", "img", "input", "br", "circle", "link"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.tags, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.loaded += [
            given[name] for name in ("src", "srcset", "data", "action") if given.get(name)
        ]
        if tag == "link":
            self.loaded.append(given["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def cli(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def page(run):
    done = cli(run)
    assert done.exit_code == 0, done.output
    return Page((run / "report.html").read_text())


def save_grid(run, name, size=(300, 60)):
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", size, "red").save(run / "samples" / name)


@pytest.fixture
def run(tmp_path):
    """A run with everything that a page shows but exports."""
    folder = tmp_path / "runs" / "faces"
    write_stage(folder, 1)
    write_stage(folder, 2, step=3)
    for number_, steps in ((1, 6), (2, 3)):
        rows = [
            {"step": step, "loss": 1 / step, "lr": 1e-3, "images_per_s": 10.0 + step,
             "peak_memory_gib": 2.5, "grad_norm": None}
            for step in range(1, steps + 1)
        ]  # fmt: skip
        rows[1]["loss"] = math.nan
        rows.append({"step": steps, "val_loss": 0.75})
        text = "".join(json.dumps({"unet": number_} | row) + "\n" for row in rows)
        (folder / f"unet{number_}" / "metrics.jsonl").write_text(text)
    for step in (10, 20, 30):
        save_grid(folder, f"unet1_step_{step:08d}.png")
    save_grid(folder, "grid_00001.png")
    (folder / "data_report.json").write_text(json.dumps({
        "source": "folder", "path": "data/faces", "used": 40,
        "skipped": [{"picture": f"{i}.png", "reason": "too small"} for i in range(2)]
        + [{"picture": "c.png", "reason": "cut short"}],
    }))  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps({
        "captions": 16, "retrieval_chance": 0.0625, "split": "held-out",
        "stages": [
            {"unet": 1, "size": 16, "retrieval_accuracy": 0.5, "colour_mean_drift": -0.1,
             "colour_std_drift": 0.0, "restoration": None, "fid": None},
            {"unet": 2, "size": 32, "retrieval_accuracy": 0.25, "colour_mean_drift": 0.02,
             "colour_std_drift": 0.0, "fid": None,
             "restoration": {"psnr_db": 25.74, "bicubic_psnr_db": 15.88, "ssim": 0.9,
                             "bicubic_ssim": 0.6}},
        ],
    }))  # fmt: skip
    checkpoint = folder / "unet1" / "step_00000006"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({
        "step": 6, "processes": 2, "zero_stage": 2, "optimizer": "adamw",
        "files": {"a": {"bytes": 3 * 2**20, "sha256": ""}}}))  # fmt: skip
    (folder / "unet1" / "step_00000003").mkdir()
    return folder


def test_the_page_shows_everything_there_is(run):
    shown = page(run)
    text = " ".join(" ".join(shown.text).split())
    for expected in (
        "faces", "16 → 32 px", "finished", "half-trained", "6 of 6", "3 of 6",  # stages
        "Loss", "Throughput", "Memory", "Learning rate", "0.75", "2.50 GiB",  # curves
        "50.0%", "25.74", "15.88", "-25.5", "16 captions of held-out pictures",  # evaluation
        "data/faces", "too small", "cut short",  # data
        "unet1/step_00000006", "3.0 MiB", "2 process(es), ZeRO 2", "damaged: no manifest",
        "training.global_batch", '"image_sizes": [',  # configuration
    ):  # fmt: skip
        assert expected in text, expected
    assert "Gradient" not in text  # DeepSpeed told none
    assert "FID" not in text  # not measured
    assert shown.count("figure") == 8
    sliders = [given for tag, given in shown.tags if tag == "input"]
    assert [(one["min"], one["max"], one["value"]) for one in sliders] == [("0", "2", "2")]


def test_only_the_newest_grid_is_shown_before_the_slider_moves(run):
    grids = [given for tag, given in page(run).tags if tag == "img" and "data-step" in given]
    assert [("hidden" in given, given["data-step"]) for given in grids] == [
        (True, "10"), (True, "20"), (False, "30"),
    ]  # fmt: skip


def test_the_page_holds_everything_itself(run):
    shown = page(run)
    assert all(address.startswith("data:image/") for address in shown.loaded)
    text = (run / "report.html").read_text()
    assert not re.search(r"https?:|@import|url\(", text)
    policy = next(given["content"] for tag, given in shown.tags if "http-equiv" in given)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_what_a_run_holds_stays_text(run):
    attack = "<script>alert(1)</script>"
    report = json.loads((run / "data_report.json").read_text())
    report["path"] = attack
    report["skipped"][0]["reason"] = f'"><img src=x onerror=alert(1)>{attack}'
    (run / "data_report.json").write_text(json.dumps(report))
    shown = page(run)
    assert shown.count("script") == 1
    assert "onerror" not in {name for _, given in shown.tags for name in given}
    assert attack in "".join(shown.text)


def test_exports_and_their_verification(exported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported, run)
    text = " ".join(page(run).text)
    assert text.count("onnx-fp32") == 2 and text.count("onnx-fp16") == 2
    assert "20 steps within" in " ".join(text.split())
    assert "other weights" not in text
    write_stage(run, 1, seed=1)  # trained on since
    (run / "export" / "unet2" / "onnx-fp16" / "manifest.json").write_text("{")
    text = " ".join(page(run).text)
    assert text.count("made from other weights") == 2
    assert "problem" in text


def test_a_run_that_has_only_begun(tmp_path):
    write_stage(tmp_path / "run", 1)
    (tmp_path / "run" / "unet1" / "inference.safetensors").unlink()
    text = " ".join(page(tmp_path / "run").text)
    assert text.count("not started") == 2
    assert "Nothing has been reported yet." in text


def test_where_it_is_written(run, tmp_path):
    done = cli(run, "--out", tmp_path / "a.html")
    assert done.exit_code == 0 and (tmp_path / "a.html").is_file()
    for arguments, message in (
        ((tmp_path / "none",), "not a run folder"),
        ((run, "--out", "a.pdf"), "name it a.html"),
    ):
        done = cli(*arguments)
        assert (done.exit_code, message in done.stderr) == (2, True)


# Charts.


def lines(chart):
    return [
        [tuple(map(float, place.split(","))) for place in points.split()]
        for points in re.findall(r'<polyline points="([^"]*)"', chart)
    ]


def test_a_line_goes_through_its_points():
    (line,) = lines(
        line_chart("t", "u", [Series("a", "main", [(0, 0), (5, 2), (10, 4)])], zero=True)
    )
    xs, ys = zip(*line, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)  # up is less in SVG
    assert ys[0] == 230 - 28  # zero lies on the axis


def test_values_that_span_much_get_a_logarithmic_scale():
    points = [(1, 1.0), (2, 0.1), (3, 0.01)]
    chart = line_chart("t", "u", [Series("a", "main", points)])
    (line,) = lines(chart)
    assert "logarithmic" in chart
    assert line[1][1] - line[0][1] == pytest.approx(line[2][1] - line[1][1], abs=0.2)
    assert "logarithmic" not in line_chart("t", "u", [Series("a", "main", [(1, 1.0), (2, 0.5)])])


def test_one_point_equal_points_and_no_point():
    for points in ([(3, 0.5)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (2, 0.0)]):
        for place in lines(line_chart("t", "u", [Series("a", "main", points)]))[0]:
            assert all(math.isfinite(value) for value in place)
    assert line_chart("t", "u", [Series("a", "main", [])]) == ""
    assert line_chart("t", "u", [Series("a", "main", [(1, math.nan)])]) == ""


def test_long_lines_are_thinned_to_means():
    points = [(i, float(i % 2)) for i in range(10_000)]
    short = thinned(points)
    assert len(short) <= 600
    assert short[-1][0] == 9_999
    assert all(y == pytest.approx(0.5, abs=0.05) for _, y in short)


def test_the_running_mean_is_unbiased():
    assert [y for _, y in smoothed([(i, 3.0) for i in range(50)])] == pytest.approx([3.0] * 50)


def test_ticks_and_numbers():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 1234) == pytest.approx([500, 1000])
    assert ticks(7, 7) == [7]
    assert [number(v) for v in (0, 0.04753, 12345.6, 3e-8)] == [
        "0",
        "0.04753",
        "12,346",
        "3.00e-08",
    ]


# Pictures.


def test_at_most_so_many_grids_the_first_and_the_last_among_them(run):
    for step in range(100, 400):
        save_grid(run, f"unet1_step_{step:08d}.png", (8, 8))
    shown, total = frames(run, 1)
    assert (len(shown), total) == (MAX_FRAMES, 303)
    assert (shown[0].step, shown[-1].step) == (10, 399)
    assert spread([1, 2, 3], 3) == [1, 2, 3]


def test_large_pictures_are_shrunk_and_broken_ones_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (400, 4000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    uri = embedded(tmp_path / "large.png")
    assert uri.startswith("data:image/webp;base64,")
    assert len(uri) < 0.2 * (tmp_path / "large.png").stat().st_size
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert embedded(tmp_path / "broken.png") is None
