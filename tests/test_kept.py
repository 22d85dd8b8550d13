"""What is kept is read back, or found anew: whatever its file holds ends no program.

What keeps something is tried with the same damage beside its own tests.
"""

import json

import pytest
from support.kept import OTHER_JSON
from support.planned import tiny

from imagen_scale.files.kept import read_kept
from imagen_scale.planning.activations import Activations
from imagen_scale.planning.cache import cached_flops, cached_measure
from imagen_scale.planning.setup import Setup, written_setup
from imagen_scale.training.telemetry import drop_metrics_after


def test_a_setup_is_read_back(tmp_path):
    setup = written_setup(tiny().stage(1), 2, on_card=False)
    (tmp_path / "setup.json").write_text(json.dumps(setup._asdict()))
    assert read_kept(tmp_path / "setup.json", Setup) == setup


def test_what_cannot_be_read_is_not_kept(tmp_path):
    assert read_kept(tmp_path / "no.json", int) is None
    assert read_kept(tmp_path, int) is None
    (tmp_path / "one.json").write_bytes(b'"\xff"')
    assert read_kept(tmp_path / "one.json", str) is None


@pytest.mark.parametrize("text", OTHER_JSON)
def test_json_of_another_kind_is_not_kept(tmp_path, text):
    (tmp_path / "one.json").write_text(text)
    for kind in (Setup, Activations):
        assert read_kept(tmp_path / "one.json", kind) is None


@pytest.mark.parametrize("text", ["[]", '{"a'])
def test_figures_of_a_plan_are_found_anew(tmp_path, monkeypatch, text):
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    stage = tiny("unets.0.dim=16").stage(1)
    options = {"checkpointing": (None, None), "offload_activations": False}

    def find():
        measured = cached_measure(stage, precision="fp32", micro_batch=1, **options)
        return measured, cached_flops(stage, checkpointing=(None, None))

    first = find()
    files = list((tmp_path / "plan").iterdir())
    before = {file: file.read_text() for file in files}
    assert len(files) == 2
    for file in files:
        file.write_text(text)
    assert find() == first
    assert {file: file.read_text() for file in files} == before


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b'{"step": 5',
        b"[]",
        b"3",
        b"{}",
        b'{"step": "5"}',
        b"[" * 9999,
        b"\xff\xfe",
        b"\0" * 99,
    ],
)
def test_a_line_that_is_no_metrics_is_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
    drop_metrics_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
