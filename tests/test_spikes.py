"""A loss that jumps is told, or ends training before anything of it is saved."""

import json
import math
from types import SimpleNamespace

import pytest

from imagen_scale.errors import ImagenScaleError
from imagen_scale.runs.folders import metrics_path
from imagen_scale.training.spikes import Spikes, reports_before


def spikes(on_spike="tell", before=None):
    said = []
    training = SimpleNamespace(on_spike=on_spike)
    job = SimpleNamespace(stage=SimpleNamespace(name="U-Net 1", training=training), say=said.append)
    return Spikes(job, before or {}), said


def test_a_loss_above_five_times_the_usual_is_told_and_is_not_usual_itself():
    watching, said = spikes()
    for step in range(1, 30):
        watching.look(step, 1.0 / step, 2.0, 0)  # it falls, as it should
    assert said == []
    usual = 1 / 19.5  # the median of the last twenty
    watching.look(30, 4.9 * usual, 2.0, 20)
    assert said == []
    for step in range(31, 60):
        watching.look(step, 6 * usual, 2.0, 20)
    assert len(said) == 29  # however long it lasts
    assert "U-Net 1: at step 31 the loss is 0.3077, 6.0 times the usual" in said[0]
    assert "after step 20" in said[0] and "training.lr" in said[0]


def test_a_norm_may_jump_alone_or_be_unknown():
    watching, said = spikes()
    for step in range(6):
        watching.look(step, 1.0, 1.0, 0)
    watching.look(7, 1.0, 9.9, 0)
    watching.look(8, 1.0, None, 0)
    watching.look(9, math.nan, math.inf, 0)  # told elsewhere
    assert said == []
    watching.look(10, 5.5, 10.5, 5)
    assert "the loss is 5.5, 5.5 times the usual 1 and the norm of the gradient is 10.5" in said[0]


def test_the_first_reports_say_nothing():
    watching, said = spikes()
    for step, loss in enumerate((1.0, 50.0, 0.1, 9.0, 300.0)):
        watching.look(step, loss, None, 0)
    assert said == []


def test_training_may_stop_there():
    watching, said = spikes("stop")
    for step in range(6):
        watching.look(step, 1.0, 1.0, 4)
    with pytest.raises(ImagenScaleError, match="the newest checkpoint is of step 4.*training.lr"):
        watching.look(7, 8.0, 1.0, 4)
    assert said == []


def test_a_training_that_goes_on_knows_what_was_usual(tmp_path):
    """As if it had never stopped, jumps and reports without a norm included."""
    rows = [{"step": step, "loss": 1 + step / 100, "grad_norm": 2.0 if step % 3 else None}
            for step in range(1, 40)]  # fmt: skip
    rows[25]["loss"] = 90.0
    whole, _ = spikes()
    for row in rows[:30]:
        whole.look(row["step"], row["loss"], row["grad_norm"], 0)
    path = metrics_path(tmp_path, 1)
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row | {"unet": 1}) + "\n" for row in rows))
    before = reports_before(tmp_path, 1, 30)
    assert before == {name: usual.recent() for name, usual in whole._usual.items()}
    assert before["loss"][-1] == 1.3 and len(before["loss"]) == 20 and 90.0 not in before["loss"]
    stops, _ = spikes("stop", before)
    with pytest.raises(ImagenScaleError, match=r"at step 31 the loss is 80, .*on_spike=tell"):
        stops.look(31, 80.0, 2.0, 30)
    assert reports_before(tmp_path / "none", 1, 30) == {"loss": [], "grad_norm": []}
