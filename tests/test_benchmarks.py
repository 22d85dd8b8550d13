"""The benchmarks: what they compute without peers or a card, and a run on the CPU."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import card
import click
import gpu_memory
import peers
import pytest
import quality
import serving
import torch
import training_memory
from card_parts import machine, pages, pictures, runtime_switches, switches, ways
from card_parts.measurement import LeftOut, Measurement
from card_parts.processes import Processes
from report import publish, split_at_marks, table, write_between_marks
from support import ROOT
from support.environment import LAUNCHER_VARIABLES
from training_memory import MINIMAGEN, NETWORKS, OURS, PLAIN, Measured, Whole

from imagen_scale.config import load_config
from imagen_scale.models.unet import UNet
from imagen_scale.planning.activations import measure
from imagen_scale.sampling.runtimes import onnx_runtime, tensorrt_rtx


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------------------------------- report


def test_a_table_is_markdown():
    assert table(["", "bytes"], [["ours", "1"]]) == "|  | bytes |\n| --- | ---: |\n| ours | 1 |"


def test_only_the_part_between_the_marks_is_replaced(tmp_path, capsys):
    document = tmp_path / "a.md"
    page = "# Title\n<!-- x: begin -->{}<!-- x: end -->\n<!-- y: begin -->\n<!-- y: end -->\n"
    document.write_text(page.format(" old "))
    for text in ("first", "second"):
        publish(text, document, "x")
        assert document.read_text() == page.format(f"\n{text}\n")
    publish("third", None, "x")
    assert capsys.readouterr().out == "first\nsecond\nthird\n"


@pytest.mark.parametrize("text", [None, "no marks", "<!-- x: end --> <!-- x: begin -->"])
def test_a_document_without_marks_is_left_alone(tmp_path, text):
    document = tmp_path / "a.md"
    if text is not None:
        document.write_text(text)
    with pytest.raises(click.UsageError, match="<!-- x: begin --> and <!-- x: end -->"):
        write_between_marks(document, "x", "new")
    assert text is None or document.read_text() == text


@pytest.mark.parametrize("module", [training_memory, gpu_memory])
def test_the_memory_document_has_the_marks(module):
    text = (ROOT / "docs" / "memory.md").read_text()
    assert f"<!-- {module.MARK}: begin -->" in text
    assert f"<!-- {module.MARK}: end -->" in text


# --------------------------------------------------------------------------------------- quality


def test_the_recipe_takes_as_many_steps_as_minimagens_time_allows():
    nothing = quality.Measured(*[0.0] * 7)
    found = {
        quality.PACKAGE: [nothing._replace(seconds=seconds) for seconds in (200.0, 150.0)],
        quality.MODERN: [nothing._replace(seconds=100.0)] * 3,
        quality.EQUAL: [nothing],
    }
    assert quality.steps_in_equal_time(found, 500) == [1000, 750]
    names = [quality.PACKAGE, quality.MODERN, quality.EQUAL]
    wanted = quality.seeds_of_each(names, 3, {quality.PACKAGE: 2})
    assert wanted == dict(zip(names, (2, 3, 2), strict=True))
    assert quality.seeds_of_each(names[:2], 3, {}) == dict.fromkeys(names[:2], 3)
    assert "500 steps of each stage, in MinImagen's time 1000, 64" in quality.report(found, 500, 64)


def test_equal_time_is_refused_without_what_it_is_equal_to(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--only", quality.EQUAL, "--only", quality.MODERN])
    assert "ask for it and for 'modern', too" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------- training_memory


def measured(held, seconds):
    return Measured(parameters=4, held=held, peak=2 * held, loss=1.5, seconds=seconds)


def test_ratios_are_minimagens_value_over_ours():
    ways = {MINIMAGEN: measured(900_000_000, 3.0), "ours": measured(100_000_000, 1.5)}
    *_, line = training_memory.pass_table(ways).splitlines()
    assert cells(line) == [
        "ours", "4", "1.500000", "100.0 MB", "9.00x", "200.0 MB", "9.00x", "1.50 s", "2.00x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("held", "seconds", "kept"),
    [
        (100, 1.0, [True] * 6),
        (1000, 1.0, [False, True, False, True, False, True]),
        (100, 2.2, [True, False, True, True, True, False]),
        (100, 2.4, [True, False, True, False, True, False]),
    ],
)
def test_a_goal_that_is_missed_fails(held, seconds, kept):
    ways = {way.name: measured(held, seconds) for way in OURS}
    verdicts = training_memory.judge("base", ways | {MINIMAGEN: measured(1900, 2.0)})
    assert [verdict.is_kept for verdict in verdicts] == kept
    assert [str(verdict)[:4] for verdict in verdicts] == ["PASS" if k else "FAIL" for k in kept]


def test_every_goal_is_about_something_measured():
    for goal in training_memory.GOALS:
        assert goal.network in NETWORKS
        assert goal.way in {way.name for way in OURS}
        assert goal.quantity in training_memory.RATIOS
    assert {PLAIN, *training_memory.RECOMPUTED} <= {way.name for way in OURS}


@pytest.mark.parametrize(("card", "kept"), [(2, True), (2.1, False)])
def test_the_whole_step_is_compared_with_its_last_line(card, kept):
    steps = {"MinImagen": Whole(10, 0, "run"), "a": Whole(9, 0, "run"), "b": Whole(card, 3, "sum")}
    assert training_memory.judge_whole(steps).is_kept is kept


def test_the_networks_are_those_of_the_comparison():
    """MinImagen's counts on the meta device; the base is the shipped configuration's."""
    assert (
        training_memory.config().unets[0] == load_config(ROOT / "configs/pokemon_64.json").unets[0]
    )
    for (name, network), expected in zip(NETWORKS.items(), (44_533_635, 715_727_235), strict=True):
        with torch.device("meta"):
            unet = UNet(
                training_memory.config().stage(network.index + 1, training_memory.TEXT_DIM).network
            )
        assert training_memory.num_parameters(unet) == expected, name


def test_ours_shares_the_weights_it_is_given():
    stage = training_memory.config().stage(1, training_memory.TEXT_DIM).network
    stage = replace(stage, dim=16, cond_dim=16)
    first = UNet(stage)
    ours = training_memory.build_ours(stage, "blocks", first.state_dict())
    pairs = zip(first.parameters(), ours.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() and b.requires_grad for a, b in pairs)


def test_bytes_are_those_of_the_planner():
    """The benchmark's own pass holds what the planner predicts for the same network."""
    small = training_memory.config()
    entry = small.unets[0].model_copy(update={"dim": 16})
    small = small.model_copy(update={"unets": (entry, *small.unets[1:])})
    stage = small.stage(1, training_memory.TEXT_DIM).network
    run = training_memory.Pass(NETWORKS["base"])
    unet = training_memory.build_ours(stage, "norms", UNet(stage).state_dict())
    held, _, loss = training_memory.measure_bytes(lambda: run.ours(unet))
    predicted = measure(
        small.stage(1, training_memory.TEXT_DIM), micro_batch=2, checkpointing=("norms",) * 3
    )
    inputs = run.text_embeds.nbytes + 4 * run.x_t.nbytes  # the planner makes them in its pass
    assert held <= predicted.held <= held + inputs + 1000
    assert loss > 0
    gradients = training_memory.take_gradients(unet)
    assert training_memory.gradient_error(gradients, gradients) == 0
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_gradient_that_differs_or_is_missing_shows():
    reference = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.0])}
    moved = reference | {"a": torch.tensor([1.0, -1.0])}
    assert training_memory.gradient_error(moved, reference) == 0.5
    assert training_memory.gradient_error({"a": reference["a"]}, reference) == float("inf")


def test_the_peers_see_this_checkout_and_bound_threads(tmp_path):
    environment = peers.environment(tmp_path, 1)
    assert environment["PYTHONPATH"].split(":")[:2] == [str(tmp_path), str(ROOT)]
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["OMP_PLACES"].count("{") == 1


# ------------------------------------------------------------------------------------ gpu_memory


def run_gpu_memory(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_memory.py"), *map(str, options)]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_stage_is_planned_and_trained(tiny_config, tmp_path):
    document = tmp_path / "memory.md"
    document.write_text("<!-- gpu_memory: begin -->\n<!-- gpu_memory: end -->\n")
    done = run_gpu_memory("--cpu", "--config", tiny_config, "--steps", 2, "--write", document)
    assert done.returncode == 0, done.stderr
    title, *_ = done.stdout.splitlines()
    assert "deepspeed" in title and "torch" in title
    header, _, *rows = (line for line in done.stdout.splitlines() if line.startswith("|"))
    assert cells(header) == list(gpu_memory.COLUMNS)
    stages = [dict(zip(gpu_memory.COLUMNS, cells(row), strict=True)) for row in rows]
    assert [stage["stage"] for stage in stages] == [
        "`tiny` U-Net 1, 16 px", "`tiny` U-Net 2, 32 px",
    ]  # fmt: skip
    for stage in stages:
        assert "checkpointing none" in stage["planned"]
        assert stage["accumulated here"] == "1 of 1"
        assert stage["predicted"].endswith("GB") and stage["host measured"].endswith("GB")
        assert float(stage["images/s"]) > 0
        assert stage["allocated"] == stage["reserved"] == "-"  # there is no card
    assert done.stdout.strip() in document.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
def test_without_a_card_it_says_so():
    done = run_gpu_memory()
    assert done.returncode == 2
    assert done.stderr == (
        "gpu_memory needs an NVIDIA card and torch finds none; --cpu trains on the CPU.\n"
    )


def test_a_stage_that_fails_is_a_line_of_its_own():
    line = gpu_memory.row("x", 12_000_000_000, {"fault": "out of memory: tried", "planned": "this"})
    assert line[2:5] == ["12 GB", "**out of memory: tried** (this)", "- of -"]
    assert set(line[5:]) == {"-"}
    assert len(line) == len(gpu_memory.COLUMNS)


def test_what_the_planner_may_choose_is_left_to_it():
    for name in gpu_memory.CONFIGS:
        written = load_config(ROOT / "configs" / f"{name}.json")
        free = gpu_memory.left_to_planner(written)
        assert free.unets == written.unets and free.imagen == written.imagen
        assert free.training.micro_batch is None and free.training.optimizer is None
        assert free.memory == type(free.memory)()
        assert "zero_optimization" not in free.deepspeed


@pytest.mark.parametrize(
    ("accumulated", "planned", "expected"), [(4, 4, 9.0), (4, 10, 9.0 + 6 * 2.0)]
)
def test_missing_micro_batches_are_counted(accumulated, planned, expected):
    seconds = gpu_memory.full_step_seconds([8.0, 10.0], [2.0, 1.0, 3.0], accumulated, planned)
    assert seconds == expected


@pytest.mark.parametrize(
    ("unets", "expected"),
    [((), [(0, 8), (0, None), (1, 8), (1, None)]), ((2,), [(1, 8), (1, None)])],
)
def test_stages_are_measured_under_every_limit(tiny_config, unets, expected):
    found = gpu_memory.tasks((str(tiny_config),), unets, [8, None], steps=3)
    assert [(task["unet_index"], task["limit"]) for _, task in found] == expected
    assert all(task["steps"] == 3 for _, task in found)
    json.dumps(found)  # sent to a process


# ------------------------------------------------------------------------------------------ card


def run_card(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "card.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rehearsal_measures_something_of_every_part(tmp_path):
    document, out = tmp_path / "cards.md", tmp_path / "out"
    names = pages.BLOCKS.values()
    marks = (f"<!-- {name}: begin -->\n(to be replaced)\n<!-- {name}: end -->\n" for name in names)
    document.write_text("".join(marks))
    done = run_card("--rehearse", "--out", out, "--minutes", 10, "--write", document)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    kinds = {(row["part"], row["status"]) for row in rows}
    assert {(part, "measured") for part in range(5)} <= kinds
    assert {status for _, status in kinds} == {"measured", "left out"}
    left_out = {row["name"]: row["why"] for row in rows if row["status"] == "left out"}
    assert "needs an NVIDIA card" in left_out["tiny, stage 2: TensorRT fp16"]
    for row in rows:
        if row["part"] == 1 and row["status"] == "measured":
            assert row["error"] <= row["bound"]
        if row["part"] == 2:
            assert row["images_per_s"] > 0
    text = (out / "card.md").read_text()
    for name in names:
        assert f"<!-- {name}: begin -->" in text
    assert "(to be replaced)" not in document.read_text()
    assert "1000 steps" in document.read_text()
    assert not (out / "models").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
def test_measuring_a_card_needs_one(tmp_path):
    done = run_card("--out", tmp_path / "out")
    assert done.returncode == 2
    assert "needs an NVIDIA card and torch finds none; --rehearse" in done.stderr
    assert not (tmp_path / "out").exists()


def faulty(name, part=1, limit_s=60.0, group="together"):
    return Measurement(part, name, f"support.card_faults:{name}", {}, limit_s, group)


def test_what_fails_hangs_or_dies_loses_its_own_row_alone(tmp_path):
    sequence = ["measures", "raises", "differs", "hangs", "cannot", "dies", "fills", "measures"]
    asked = [faulty(name, limit_s=3 if name == "hangs" else 60) for name in sequence]
    asked += [Measurement(1, "known", "", {}, reason="not here"), faulty("measures", 2, group="")]
    known, *rows = Processes(tmp_path, 5, on_card=False).run(asked)
    assert (known["status"], known["why"]) == ("left out", "not here")
    assert [row["status"] for row in rows] == [
        "measured", "failed", "differs", "timed out", "left out", "crashed", "out of memory",
        "measured", "measured",
    ]  # fmt: skip
    assert [row["name"] for row in rows] == [*sequence, "measures"]
    why = {row["name"]: row["why"] for row in rows}
    assert why["raises"] == "ValueError: as it was told"
    assert why["hangs"].startswith("after 3")
    assert why["cannot"] == "it is not installed"
    assert why["dies"].startswith("killed by SIGKILL")
    assert rows[2]["error"] == 0.5 and rows[-1]["part"] == 2
    text = pages.page([known, *rows])
    assert "| raises | **failed**: ValueError: as it was told |" in text
    assert "1 timed out" in text


def test_no_process_outlives_its_measurement(tmp_path):
    (row,) = Processes(tmp_path, 5, on_card=False).run([faulty("hangs_with_a_child", limit_s=4)])
    assert row["status"] == "timed out"
    pid = int((tmp_path / "log" / "together.txt").read_text())
    end = time.monotonic() + 10  # a kill that was sent takes a moment to arrive
    while not is_dead(pid):
        assert time.monotonic() < end, f"process {pid} lives on"
        time.sleep(0.05)


def is_dead(pid: int) -> bool:
    """Gone, or dead and not yet reaped by its new parent."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_what_there_is_no_time_for_is_named(tmp_path):
    late, later = Processes(tmp_path, 1e-3, on_card=False).run([faulty("dies"), faulty("raises")])
    assert late["status"] == later["status"] == "skipped"
    assert late["why"] == "the time was up"


def test_what_was_measured_is_not_measured_again(tmp_path):
    results = card.Results(tmp_path)
    for status in ("measured", "failed"):
        results.add({"part": 1, "name": status, "status": status, "why": "", "seconds": 1.0,
                     "error": 0, "bound": 1})  # fmt: skip
    again = card.Results(tmp_path)
    assert again.is_done(1, "measured") and not again.is_done(1, "failed")
    assert not again.is_done(2, "measured")


def test_the_page_of_a_card_has_every_figure():
    def row(part, name, **figures):
        return {"part": part, "name": name, "status": "measured", "why": "", "seconds": 1} | figures

    sizes = dict.fromkeys(
        ("predicted", "in_use", "allocated", "reserved", "context", "host_predicted", "host"), 2e9
    )
    rows = [
        row(0, "machine", machine="8 cores", is_card=True, versions={"torch": "2"}, card="X",
            memory=12e9, free=11e9, capability="8.6", cuda="13.0", cudnn=9, peak_by_name=25.0,
            peaks={"bf16": 20.0}, context=None),
        row(1, "a", error=1e-6, bound=1e-4, is_equal=True),
        row(2, "b", planned="p|q", accumulated=[2, 64], images_per_s=3.0, tflops=10.0,
            precision="bf16", **sizes),
        row(2, "c", planned="fp32", full="tried to", allocated=11e9),
        row(3, "d", before_s=0.2, after_s=0.1, faster=2.0, before_images_per_s=5.0,
            after_images_per_s=10.0, before_bytes=2e9, after_bytes=1e9),
        row(4, "n: minimagen", first_1=1.0, evaluation_1=0.1, picture_1=100.0,
            full_8="tried to", is_extrapolated=True, allocated=3e9),
        row(4, "n: ours", first_1=1.0, evaluation_1=0.05, picture_1=1.0, first_8=1.0,
            evaluation_8=0.2, picture_8=0.5, allocated=3e9),
    ]  # fmt: skip
    lines = pages.page(rows).splitlines()
    tables = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
    assert tables["a"] == ["a", "equal", "1.0e-06", "1e-04", "-", "-"]
    assert tables["b"][-3:] == ["10.00", "50 %", "40 %"] and "2 of 64" in tables["b"]
    assert "**out of memory**: tried to" in tables["c"] and "11.00 GB" in tables["c"]
    assert tables["d"][1:4] == ["200.0 ms", "100.0 ms", "2.000x"]
    assert "**batch 8: out of memory**" in tables["n: minimagen"]
    assert tables["n: ours"][4] == "100x"
    widths = {len(cells(line)) for line in lines if line.startswith(("| n: ", "|  | first call"))}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 3060 Ti", 32.4),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", None),
        ("another", None),
    ],
)
def test_peaks_are_found_by_name(name, peak):
    assert machine.peak_by_name(name) == peak


def test_ways_and_switches_are_those_of_this_version():
    taken, refused = ways.ways()
    names = {way.name for way in taken}
    assert {"fp32, adamw, ZeRO-0", "bf16, adamw_8bit, ZeRO-3, optimizer offloaded"} <= names
    assert any(way.optimizer == "adafactor" and way.where == "ZeRO-1" for way in refused)
    for switch in switches.SWITCHES:
        reason = switches.reason_to_leave_out(switch, rehearse=False)
        assert not reason or "training." in reason
    unknown = switches._key("no_such_key")
    reason = switches.reason_to_leave_out(unknown, rehearse=False)
    assert reason == "this version has no training.no_such_key"


def test_what_a_runtime_is_told_of_a_card_is_told_within_and_a_line_of_its_own():
    card, told = torch.device("cuda", 0), onnx_runtime.cuda_options
    plain = told(card, 7)
    found = {}
    for name, switch in runtime_switches.ONNX.items():
        with switch():
            found[name] = dict(onnx_runtime.cuda_options(card, 7).items() - plain.items())
            options = onnx_runtime.OnnxCuda.run_options
        if options is not None:
            entry = "disable_synchronize_execution_providers"
            found[name] = {entry: options.get_run_config_entry(entry)}
    assert found == {
        "CUDA graphs": {"enable_cuda_graph": "1"},
        "convolutions by heuristic": {"cudnn_conv_algo_search": "HEURISTIC"},
        "memory as requested": {"arena_extend_strategy": "kSameAsRequested"},
        "no wait after a run": {"disable_synchronize_execution_providers": "1"},
    }
    with runtime_switches.TENSORRT["CUDA graphs"]():
        assert tensorrt_rtx.TensorRT.cuda_graphs
    assert not tensorrt_rtx.TensorRT.cuda_graphs
    assert (onnx_runtime.cuda_options, onnx_runtime.OnnxCuda.run_options) == (told, None)
    lines = {how.name for how in pictures.ways("fp16") if how.switch}
    assert lines == {
        *(f"ONNX Runtime fp16, {name}" for name in found), "TensorRT fp16, CUDA graphs"
    }  # fmt: skip
    with pytest.raises(LeftOut, match="means nothing without"):
        pictures._check({"runtime": "onnx"}, "CUDA graphs", rehearse=True)


def test_the_document_about_cards_has_the_marks():
    pages.check_document(ROOT / "docs" / "cards.md")


@pytest.mark.parametrize("parts", ["", "5", "1,x"])
def test_parts_that_do_not_exist_are_refused(parts):
    with pytest.raises(click.UsageError, match="--parts"):
        card.parts_of(parts)


# --------------------------------------------------------------------------------------- serving


def test_percentiles_are_values_that_were_measured():
    values = [float(value) for value in range(100, 0, -1)]
    assert [serving.percentile(values, p) for p in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert serving.percentile([3.0], 99) == 3.0


def test_what_a_caller_waits_for_counts_from_the_question():
    """Three callers, one at a time: the last has waited for the others too."""
    asked = []
    measured = serving.measured(3, 1, 1, asked.append)
    assert asked == [0, 1, 2] and measured.waits == sorted(measured.waits)
    assert measured.seconds >= measured.waits[-1]
    asked.clear()
    assert len(serving.measured(2, 2, 3, asked.append).waits) == 6
    assert sorted(asked) == list(range(6))


def test_the_document_about_serving_has_the_marks():
    split_at_marks(ROOT / "docs" / "serving.md", serving.MARK)


@pytest.mark.slow
def test_serve_is_measured_beside_the_command(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("<!-- serving: begin -->\n<!-- serving: end -->\n")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "serving.py", "--callers", "1", "--callers", "2",
         "--each", "2", "--steps", "2,1", "--write", document],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [cells(line) for line in document.read_text().splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["1", "2"]
    assert all(float(cell.removesuffix(" s")) > 0 for row in rows[2:] for cell in row)
    assert "torch" in done.stdout and "uvicorn" in done.stdout
