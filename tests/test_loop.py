"""What is due after a step."""

import json

import pytest
from support.tiny import TINY

from imagen_scale.config import parse_config
from imagen_scale.training.loop import Due


def due_after(step, *, log_every=2, is_stopping=False, **training):
    """The names of what is due, in their order."""
    often = {"steps": 12, "checkpoint_every": 5, "sample_every": 6, "val_every": 4}
    config = parse_config(json.dumps(TINY | {"training": TINY["training"] | often | training}))
    due = Due.after(step, config.stage(1), log_every=log_every, is_stopping=is_stopping)
    return [name for name, is_due in vars(due).items() if is_due]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, []),
        (2, ["report"]),
        (4, ["report", "validation"]),
        # Never a checkpoint or a file for sampling without a report before it.
        (5, ["report", "checkpoint", "inference"]),
        (6, ["report", "inference", "pictures"]),
        (12, ["report", "validation", "checkpoint", "inference", "pictures"]),
    ],
)
def test_what_is_due_and_in_which_order(step, expected):
    assert due_after(step) == expected


def test_at_the_last_step_everything_is_due_however_seldom_it_is():
    seldom = {"checkpoint_every": 1000, "sample_every": 1000, "val_every": 1000}
    assert len(due_after(12, log_every=1000, ema_widths=[0.1], **seldom)) == 6
    assert due_after(11, log_every=1000, **seldom) == []


def test_averages_are_saved_a_sixteenth_of_the_steps_apart_with_a_report_before():
    assert "snapshot" not in due_after(12)
    assert due_after(3, ema_widths=[0.1], log_every=7) == ["report", "snapshot"]
    often = {"ema_widths": [0.1], "log_every": 700, "steps": 320}
    assert [step for step in range(1, 321) if "snapshot" in due_after(step, **often)] == [
        *range(20, 321, 20)
    ]
    assert "snapshot" in due_after(12, ema_widths=[0.1], ema_snapshot_every=7)  # the last


def test_what_is_kept_of_a_step_is_saved_before_the_checkpoint_that_training_goes_on_from():
    due = due_after(10, ema_widths=[0.1], ema_snapshot_every=5, val_every=5)
    assert due == ["report", "validation", "snapshot", "checkpoint", "inference"]


def test_pictures_may_never_be_due():
    assert due_after(12, sample_every=None) == ["report", "validation", "checkpoint", "inference"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, ["report", "checkpoint"]),
        (6, ["report", "checkpoint", "inference"]),  # pictures are put off
    ],
)
def test_a_request_to_stop_reports_and_saves(step, expected):
    assert due_after(step, is_stopping=True) == expected
