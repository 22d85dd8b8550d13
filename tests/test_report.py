"""The page about a run: what it shows, what it withstands, and that it is one file."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from imagen_scale_export.staging import staged
from support import ROOT
from support.tiny import TINY, write_run

from imagen_scale.commands.main import main
from imagen_scale.config import parse_config
from imagen_scale.data.sources import skipped
from imagen_scale.data.sources.screening import usable_source
from imagen_scale.evaluation import measurement
from imagen_scale.files.atomic import sha256
from imagen_scale.files.picture_files import save_sample
from imagen_scale.files.pictures import save_grid
from imagen_scale.planning import setup
from imagen_scale.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw,
    thin,
    tick_texts,
)
from imagen_scale.report.embedding import MOST_GRIDS, embed, read_grids
from imagen_scale.report.page import OTHERS, QUARTERS, SAMPLES
from imagen_scale.runs import records
from imagen_scale.runs.checkpoint import commit, staging_folder
from imagen_scale.runs.folders import export_dir, inference_path
from imagen_scale.runs.records import read_metrics
from imagen_scale.sampling.runtimes import manifest
from imagen_scale.training.telemetry import Telemetry

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"
VERIFICATION = {
    "runtime": "onnxruntime 1.0", "passed": True, "max_relative_error": 2e-6,
    "min_cosine": 1.0, "loop_max_levels": 0.1, "loop_psnr_db": 138.7, "note": "",
}  # fmt: skip
EVALUATION = {
    "captions": 48, "split": "held-out", "retrieval_chance": 0.02, "seed": 0,
    "stages": [
        {"unet": 1, "size": 16, "retrieval_accuracy": 0.75, "colour_mean_drift": -0.02,
         "colour_std_drift": 0.01, "lowres_consistency_db": None, "restoration": None},
        {"unet": 2, "size": 32, "retrieval_accuracy": 1.0, "colour_mean_drift": 0.0,
         "colour_std_drift": 0.0, "lowres_consistency_db": 29.72, "kid": 0.00125,
         "restoration": {"psnr_db": 25.74, "bicubic_psnr_db": 15.88, "ssim": 0.9232,
                         "bicubic_ssim": 0.5797}},
    ],
}  # fmt: skip


class Page(HTMLParser):
    """Elements and text of a page; every element that opens is closed in its order."""

    VOID = ("meta", "img", "input", "line", "path", "circle")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.parts = [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag  # a browser closes those of SVG too

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.parts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def report(run, *options):
    done = CliRunner().invoke(main, ["report", str(run), *options])
    assert done.exit_code == 0, done.output
    return Page((run / "report.html").read_text(encoding="utf-8")), done


def picture(level, side=16):
    return np.full((side, side, 3), level, np.uint8)


def write_everything(run, prompt="red heart"):
    """A run with all that a report can show; its second stage is half-way."""
    write_run(run)
    inference_path(run, 2).unlink()
    for number, last in ((1, 6), (2, 3)):
        folder = run / f"unet{number}"
        rows = [{"unet": number, "step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": None,
                 "images_per_s": 10.0 * step, "peak_memory_gib": 0.5}
                for step in range(1, last + 1)]  # fmt: skip
        rows += [{"unet": number, "step": 3, "val_loss": 0.4321}]
        rows += [{"unet": number, "step": step, "skipped": 1} for step in range(1, number)]
        (folder / "metrics.jsonl").parent.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        setup = {"ranks": 2, "micro_batch": 4, "accumulation": 3, "precision": "bf16",
                 "optimizer": "adamw_8bit", "zero": {"stage": 2}}  # fmt: skip
        (folder / "setup.json").write_text(json.dumps({"asked": {}, "setup": setup}))
        staging = staging_folder(folder, 3)
        (staging / "shard.bin").write_bytes(b"x" * 1500)
        commit(staging, 3, {})
        for step in range(1, last + 1):
            save_grid(run / "samples" / f"unet{number}_step_{step:08d}.png",
                      [[picture(40 * step)]], ["sun"])  # fmt: skip
    save_sample(run / "samples", 1, picture(9), {"prompt": prompt, "seed": 11})
    skipped = [{"picture": prompt, "reason": f"is cut short: {prompt}"}]
    (run / "data_report.json").write_text(
        json.dumps({"source": "folder", "path": prompt, "used": 994, "skipped": skipped})
    )
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    write_export(run, sha256(inference_path(run, 1)))


def write_export(run, checkpoint_sha256, verification=VERIFICATION):
    folder = run / "export" / "unet1" / "onnx-fp32"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"schema_version": 1, "format": "onnx", "precision": "fp32", "unet_number": 1,
                "checkpoint_sha256": checkpoint_sha256, "checkpoint_step": 6,
                "files": {"denoiser.onnx": {"bytes": 2_500_000, "sha256": "0"}},
                "verification": verification}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "tiny run"
    write_everything(folder)
    return folder


def test_a_report_shows_every_part_of_a_run(run):
    page, done = report(run)
    assert f"written to {run / 'report.html'}" in done.output
    assert "damaged" not in done.output + page.text
    for shown in (
        "tiny run", "16 → 32 px", "text encoder minilm", "data emoji",
        "U-Net 1 16 px finished steps 6 of 6 loss 0.167 validation loss 0.432",
        "U-Net 2 32 px under way steps 3 of 6 steps left out, not finite 1 loss",
        "pictures per step 24 = micro-batch 4 × 3 × 2 processes",
        "optimizer adamw_8bit, bf16, ZeRO-2",
        "Prompts: red heart", "Rows: low-resolution input, this stage, original picture.",
        "red heart seed 11",
        "994 pictures of source folder red heart ; 1 left out.", "is cut short",
        "U-Net 1 step_00000003 1.6 kB", "verified",
        "48 captions, held-out pictures.", "retrieval (chance 2.0%) 75.0% 100.0% higher",
        "colour drift of the mean, of 255 -5.1 +0.0 0", "PSNR in dB 25.74 higher",
        "KID x 1000 1.25 lower",
        "export/unet1/onnx-fp32 2.5 MB 6 yes passed on onnxruntime 1.0 2.0e-06 138.7 dB",
        '"image_sizes": [',
    ):  # fmt: skip
        assert shown in page.text, shown
    assert "FID" not in page.text  # not measured
    assert len(page.all("svg")) == 8  # four curves of two stages
    frame = {(line["x1"], line["x2"]) for line in page.all("line") if line["class"] == "grid"}
    assert frame == {(str(LEFT), str(WIDTH - RIGHT))}
    assert {svg["viewbox"] for svg in page.all("svg")} == {f"0 0 {WIDTH} {HEIGHT}"}
    assert [image["data-step"] for image in page.all("img") if "data-step" in image] == [
        *"123456", *"123"
    ]  # fmt: skip
    ranges = [field for field in page.all("input") if field["type"] == "range"]
    assert [field["max"] for field in ranges] == ["5", "2"]


def test_grids_of_few_steps_are_said_to_have_the_teachers_row(run):
    section = {"teacher": "t", "steps": [4, 2], "cond_scale": 2}
    write_run(run, overrides=("unets.0.pred_type=v", f"distill={json.dumps(section)}"))
    page, _ = report(run)
    assert "Prompts: red heart Rows: its teacher, this stage." in page.text
    assert "Rows: low-resolution input, its teacher, this stage, original picture." in page.text


def test_a_report_is_one_file_that_fetches_nothing(run):
    page, _ = report(run)
    assert not page.all("link") and not page.all("iframe")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert all("src" not in script for script in page.all("script"))
    text = (run / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    (policy,) = [tag["content"] for tag in page.all("meta") if "http-equiv" in tag]
    assert "default-src 'none'" in policy
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert all(link["href"][1:] in targets for link in page.all("a"))


def test_nothing_from_files_becomes_markup(tmp_path):
    run = tmp_path / EVIL.replace("/", "")
    write_everything(run, prompt=EVIL)
    config = json.loads((run / "config.json").read_text())
    config["training"]["sample_prompts"] = [EVIL]
    config["data"]["path"] = EVIL
    (run / "config.json").write_text(json.dumps(config))
    evaluation = EVALUATION | {"split": EVIL}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    write_export(run, "0", VERIFICATION | {"runtime": EVIL, "note": EVIL})
    (run / "unet1" / "setup.json").write_text(json.dumps(
        {"setup": {"ranks": 1, "micro_batch": 1, "accumulation": 1, "precision": EVIL,
                   "optimizer": EVIL}}))  # fmt: skip
    manifest = run / "unet1" / "step_00000003" / "manifest.json"
    manifest.write_text(json.dumps({"files": {EVIL: {"bytes": 1, "sha256": ""}}}))
    page, _ = report(run)
    assert len(page.all("script")) == 1
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not any(name.startswith("on") for _, tag in page.elements for name in tag)
    assert page.text.count("<script>alert(1)</script>") >= 8  # as text
    assert "{{ 7 * 7 }}" in page.text and "49&" not in page.text
    template = (ROOT / "imagen_scale" / "report" / "page.html").read_text()
    assert re.findall(r"(\w+) \| safe", template) == ["style", "script"]  # our own two files


def test_a_run_that_has_only_begun_says_what_there_is_not_yet(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    page, done = report(tmp_path)
    assert "damaged" not in done.output + page.text
    assert page.text.count("not started steps 0 of 6") == 2
    for absent in ("No pictures yet", "No metrics yet: unet1/metrics.jsonl", "No data_report.json",
                   "No checkpoint yet", "Not measured yet: imagen-scale evaluate",
                   "No export yet: imagen-scale export"):  # fmt: skip
        assert absent in page.text, absent


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b"null"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "data_report.json", "evaluation.json", "unet1/setup.json",
     "unet1/inference.safetensors", "unet1/step_00000003/manifest.json",
     "export/unet1/onnx-fp32/manifest.json", "samples/unet1_step_00000002.png", "sample.json",
     "sample.png"],
)  # fmt: skip
def test_what_is_damaged_is_named_and_the_rest_is_shown(run, name, content):
    if name.startswith("sample."):
        (path,) = (run / "samples").glob(f"00001_*.{name[7:]}")
    else:
        path = run / name
    path.write_bytes(content)
    page, done = report(run)
    assert str(path) in done.output and str(path) in page.text
    assert "Missing or damaged" in page.text
    assert "U-Net 2" in page.text and len(page.all("svg")) == 8
    assert "Traceback" not in done.output


def test_a_sample_without_its_facts_is_named(run):
    (facts,) = (run / "samples").glob("00001_*.json")
    facts.unlink()
    page, _ = report(run)
    assert f"{facts.name} is missing, so its prompt is not known." in page.text


def test_a_half_written_last_line_is_training_at_work_and_other_damage_is_counted(tmp_path):
    path, problems = tmp_path / "metrics.jsonl", []
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_metrics(path, problems).values == {"loss": [(1, 2.0)]}
    assert not problems
    path.write_text(
        '{"step": 1, "loss": NaN}\nnonsense\n{"step": true, "loss": 1}\n{"step": -1}\n'
        '{"step": 4, "loss": 1e999, "lr": null}\n{"step": 3, "loss": 0.5, "x": "y"}\n'
        f'{{"step": 2, "loss": {"9" * 400}}}\n{{"step": 2, "loss": 1}}\n'
    )
    metrics = read_metrics(path, problems)
    assert metrics.values == {"loss": [(2, 1.0), (3, 0.5)]}
    assert (metrics.last_step, metrics.last("loss"), metrics.last("lr")) == (4, 0.5, None)
    assert problems == [
        f"{path}: 3 of 8 lines are damaged and left out.",
        f"{path}: 3 values are not finite and left out.",
    ]


def test_checkpoints_are_verified_unless_told_otherwise(run):
    shard = run / "unet2" / "step_00000003" / "shard.bin"
    shard.write_bytes(b"y" * 1500)
    page, done = report(run)
    assert f"{shard}: its content changed since it was saved." in done.output
    assert "shard.bin: its content changed since it was saved." in page.text
    page, done = report(run, "--no-verify")
    assert "damaged" not in done.output and "verified" not in page.text
    assert page.text.count("not checked") == 3  # two checkpoints and whose weights were exported


def test_an_export_of_earlier_weights_or_one_that_failed_is_shown_as_such(run):
    write_export(run, "0" * 64, VERIFICATION | {"passed": False})
    page, _ = report(run)
    assert "no: trained on since; export again failed on onnxruntime 1.0 2.0e-06" in page.text
    write_export(run, "0" * 64, None)
    assert "not compared yet" in report(run)[0].text
    inference_path(run, 1).unlink()
    assert "the weights it was made from are not here" in report(run)[0].text


def test_what_exporting_leaves_beside_an_export_is_no_damage(run):
    with staged(export_dir(run, 1, "onnx-fp16"), force=False) as folder:
        page, done = report(run)  # while it is made
        assert "damaged" not in done.output + page.text
        shutil.copy(export_dir(run, 1, "onnx-fp32") / "manifest.json", folder)
    assert (folder.parent / ".lock").is_file()
    (folder.parent / "notes.txt").touch()  # the user's own
    page, done = report(run)
    assert "damaged" not in done.output + page.text
    assert page.text.count("export/unet1/onnx-fp16 2.5 MB") == 1


def test_the_page_goes_where_it_is_asked_to_and_replaces_an_earlier_one(run, tmp_path):
    out = tmp_path / "deep" / "page.htm"
    for _ in range(2):
        assert CliRunner().invoke(main, ["report", str(run), "--out", str(out)]).exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["page.htm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: not a run folder"),
        (["{run}", "--out", "{run}/config.json"], "config.json: the page is an HTML file; name it"),
        (["{run}", "--out", "{run}"], "the page is an HTML file"),
    ],
)
def test_wrong_use_ends_in_one_sentence_and_exit_code_2(run, arguments, message):
    before = (run / "config.json").read_bytes()
    done = CliRunner().invoke(main, ["report", *(one.format(run=run) for one in arguments)])
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
    assert (run / "config.json").read_bytes() == before


def test_names_that_are_no_text_do_not_stop_a_report(tmp_path):
    run = tmp_path / os.fsdecode(b"caf\xe9")
    run.mkdir()
    (run / "config.json").write_text(json.dumps(TINY))
    out = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", str(run), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "caf\\udce9" in out.read_text(encoding="utf-8")


def test_many_grids_are_thinned_evenly_and_large_ones_are_compressed(tmp_path):
    problems = []
    for step in range(1, 102):
        save_grid(tmp_path / "samples" / f"unet1_step_{step:08d}.png", [[picture(step)]], ["x"])
    grids, total = read_grids(tmp_path, 1, problems)
    steps = [grid.step for grid in grids]
    assert total == 101 and len(steps) == MOST_GRIDS and (steps[0], steps[-1]) == (1, 101)
    assert {after - before for before, after in pairwise(steps)} <= {2, 3}
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    save_grid(tmp_path / "large.png", [[noise]], ["x"])
    large = embed(tmp_path / "large.png")
    assert large.startswith("data:image/webp;base64,")
    assert len(large) < (tmp_path / "large.png").stat().st_size
    assert not problems


def test_the_records_are_those_that_the_program_writes(tmp_path):
    """A key renamed where it is written would empty a part of the page."""

    def fields(kind):
        return set(getattr(kind, "_fields", None) or kind.model_fields)

    for record, writer in [
        (records.SetupRecord, setup.Setup),
        (records.RestorationRecord, measurement.Restoration),
        (records.MeasuresRecord, measurement.StageMeasures),
        (records.ExportManifest, manifest.Manifest),
        (records.VerificationRecord, manifest.Verification),
        (records.ExportedFile, manifest.FileRecord),
        (records.Skip, skipped.Skipped),
    ]:
        assert fields(record) <= fields(writer), record
    config = parse_config(json.dumps(TINY))
    _, path = usable_source(config.data, tmp_path)
    problems = []
    assert records.read_record(path, records.DataReport, problems).used == 6
    with Telemetry(tmp_path, config, 1, 0, 6) as telemetry:
        telemetry.train(
            1, loss=0.5, lr=1e-3, grad_norm=None, loss_scale=None, images=8,
            quarters=dict.fromkeys(QUARTERS.values(), 0.5),
        )  # fmt: skip
        telemetry.write(1, val_loss=0.25, val_x_0_error=0.1)
        telemetry.write(1, **{key: 1.0 for _, curves in SAMPLES for key in curves.values()})
    metrics = read_metrics(telemetry.path, problems)
    assert set(metrics.values) == {
        "loss", "val_loss", "val_x_0_error", "lr", *QUARTERS.values(), *(key for _, key in OTHERS),
        *(key for _, curves in SAMPLES for key in curves.values()),
    }  # fmt: skip
    assert not problems


# Curves -----------------------------------------------------------------------------------------


def test_a_straight_line_runs_from_corner_to_corner():
    chart = draw("x", {"x": [(0, 0.0), (5, 0.5), (10, 1.0)]})
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    assert chart.lines[0].dots == [(LEFT, HEIGHT - BOTTOM), middle, (WIDTH - RIGHT, TOP)]
    assert [tick.label for tick in chart.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert chart.newest == "step 10: 1" and not chart.note


def test_values_that_spread_get_a_logarithmic_axis_with_equal_decades():
    chart = draw("x", {"a": [(0, 1.0), (1, 0.1), (2, 0.01)], "b": [(2, 0.02)]})
    (_, top), (_, middle), (_, bottom) = chart.lines[0].dots
    assert chart.note == "logarithmic"
    assert middle - top == pytest.approx(bottom - middle, abs=0.2)
    assert chart.newest == "step 2: a 0.01, b 0.02"


def test_many_decades_have_few_ticks():
    ticks = draw("x", {"x": [(0, 1.0), (1, 1e20)]}).y_ticks
    assert [tick.label for tick in ticks] == ["1", "1,000", "1e6", "1e9", "1e12", "1e15", "1e18"]


def test_ticks_that_are_close_are_told_apart():
    assert tick_texts([0.0306, 0.03061, 0.03062]) == ["0.0306", "0.03061", "0.03062"]
    assert tick_texts([32.1, 32.12, 32.14]) == ["32.1", "32.12", "32.14"]
    assert tick_texts([0.0, 100.0, 20_000.0]) == ["0", "100", "20,000"]
    chart = draw("rate", {"lr": [(1, 0.0), (2, 5e-324)]})
    assert chart is not None


def test_no_points_make_no_chart():
    assert draw("x", {"a": [], "b": []}) is None


def test_thinning_keeps_the_mean_and_the_last_step():
    points = [(step, float(step % 7)) for step in range(1, 2801)]
    thinned = thin(points)
    assert len(thinned) == 400 and thinned[-1][0] == 2800
    assert {value for _, value in thinned} == {3.0}
    assert thin(points[:400]) == points[:400]


@given(
    st.lists(st.tuples(st.integers(0, 10**12), st.floats(-1e30, 1e30)), min_size=1, max_size=50),
    st.booleans(),
)
def test_every_curve_stays_inside_its_frame(points, from_zero):
    chart = draw("x", {"x": sorted(points)}, from_zero=from_zero)
    places = chart.lines[0].dots or [
        tuple(map(float, place.split())) for place in chart.lines[0].path[1:].split("L")
    ]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places)
    assert all(LEFT <= tick.at <= WIDTH - RIGHT for tick in chart.x_ticks)
    assert all(TOP <= tick.at <= HEIGHT - BOTTOM for tick in chart.y_ticks)
    assert len(chart.y_ticks) <= 13 and len(chart.x_ticks) <= 8
    json.loads(chart.hover)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_the_scrubber_and_the_curves_answer_in_a_browser(run, tmp_path):
    report(run)
    text = (run / "report.html").read_text()
    act = """<script>
      const slider = document.querySelector(".scrubber input");
      slider.value = 1;
      slider.dispatchEvent(new Event("input"));
      const chart = document.querySelector("svg[data-hover]");
      const box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 1}));
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", act))
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    after = Page(done.stdout[done.stdout.index("<html") :])
    frames = [image for image in after.all("img") if "data-step" in image][:6]
    assert ["hidden" in frame for frame in frames] == [True, False, True, True, True, True]
    assert "step 2 Prompts" in after.text
    assert "step 1: loss 1" in after.text
