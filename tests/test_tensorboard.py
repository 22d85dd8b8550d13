"""TensorBoard beside a run: what it shows is what metrics.jsonl has, and it ends no training."""

import json
import sys

import numpy as np
import pytest
from support.tiny import TINY

from imagen_scale.config import parse_config
from imagen_scale.errors import MissingExtraError
from imagen_scale.files.picture_files import save_png
from imagen_scale.runs.folders import metrics_path, tensorboard_dir
from imagen_scale.training.telemetry import Telemetry

pytest.importorskip("tensorboard")

CONFIG = parse_config(json.dumps(TINY), overrides=["logging.tensorboard=true"])


def shown(run):
    """What TensorBoard itself reads of the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tensorboard_dir(run, 1)))
    found.Reload()
    return found


def report(run, first, last, picture=None):
    with Telemetry(run, CONFIG, 1, first - 1, 9) as telemetry:
        for step in range(first, last + 1):
            telemetry.write(step, loss=1 / step + first, grad_norm=None)
        if picture is not None:
            telemetry.picture(last, picture)


def test_the_rows_of_metrics_and_the_grids_are_shown(tmp_path):
    grid = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    save_png(tmp_path / "grid.png", grid)
    report(tmp_path, 1, 5, tmp_path / "grid.png")
    found = shown(tmp_path)
    rows = [json.loads(line) for line in metrics_path(tmp_path, 1).read_text().splitlines()]
    scalars = [(event.step, event.value) for event in found.Scalars("loss")]
    assert scalars == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert found.Tags()["scalars"] == ["loss"]  # no number, no point
    (event,) = found.Images("samples")
    assert (event.step, event.width, event.height) == (5, 8, 8)


def test_steps_that_are_repeated_are_shown_once(tmp_path):
    report(tmp_path, 1, 6)
    report(tmp_path, 4, 7)  # from a checkpoint of step 3
    scalars = [(event.step, event.value) for event in shown(tmp_path).Scalars("loss")]
    assert [step for step, _ in scalars] == [1, 2, 3, 4, 5, 6, 7]
    assert [value > 4 for _, value in scalars] == [False] * 3 + [True] * 4


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, capsys):
    tensorboard_dir(tmp_path, 1).parent.mkdir(parents=True)
    tensorboard_dir(tmp_path, 1).write_text("in the way")
    report(tmp_path, 1, 5)
    assert capsys.readouterr().out.count("WARNING: TensorBoard cannot write") == 1
    assert len(metrics_path(tmp_path, 1).read_text().splitlines()) == 5


def test_without_the_package_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'imagen-scale\[tensorboard\]'"):
        report(tmp_path, 1, 1)
