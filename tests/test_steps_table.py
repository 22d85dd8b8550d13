"""What fewer steps cost: the rows of each stage, a student's below its teacher's."""

import json
import math

import pytest
from click.testing import CliRunner
from support.tiny import write_stage

from imagen_scale.commands.main import main


def tabulate(run, *words):
    done = CliRunner().invoke(
        main, ["evaluate", "--run", str(run), "--num", "4", "--runtime", "torch", *words]
    )
    return done


def rows_of(run, *words):
    done = tabulate(run, "--json", *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "teacher"
    for number in (1, 2):
        write_stage(run, number, overrides=("unets.0.pred_type=v",))
    return run


@pytest.fixture(scope="module")
def student(teacher):
    """A base of four steps, with its teacher's own weights."""
    run = teacher.with_name("student")
    section = {"teacher": str(teacher), "steps": [4, None], "cond_scale": [1, 1]}
    changes = ("unets.0.pred_type=v", f"distill={json.dumps(section)}")
    write_stage(run, 1, overrides=changes)
    write_stage(run, 2, overrides=("unets.0.pred_type=v",))
    return run


def test_every_stage_in_every_number_of_steps(teacher):
    rows = rows_of(teacher, "--steps-table", "4,2", "--cond-scale", "2", "--sampler", "ddim")
    assert [(r["unet"], r["who"], r["steps"], r["evaluations"]) for r in rows] == [
        (1, "itself", 4, 8), (1, "itself", 2, 4), (2, "itself", 4, 4), (2, "itself", 2, 2)
    ]  # fmt: skip
    for row in rows:
        assert (row["from_first"] == 0) == (row["steps"] == 4)
        assert row["psnr_db"] == pytest.approx(-20 * math.log10(row["distance"]), abs=3)
        assert (row["detail"] is None) == (row["unet"] == 1)
    assert json.loads((teacher / "steps_table.json").read_text()) == rows


def test_what_guidance_skips_is_not_counted(teacher):
    words = ("--steps-table", "4", "--cond-scale", "2", "--unet-limit", "1")
    for more, evaluations in (
        ((), 8), (("--guidance-interval", "0.5:1"), 6), (("--sampler", "heun"), 14),
        (("--sampler", "heun", "--guidance-interval", "0:0.25"), 8),
    ):  # fmt: skip
        (row,) = rows_of(teacher, *words, *more)
        assert row["evaluations"] == evaluations


def test_lists_are_for_the_whole_cascade_beside_a_student(student):
    rows = rows_of(student, "--steps-table", "2", "--sampler", "ddim,heun")
    assert [(row["who"], row["evaluations"]) for row in rows] == [
        ("teacher", 2), ("student", 4), ("itself", 3)
    ]  # fmt: skip


def test_a_student_stands_below_its_teacher_from_the_same_noise(student):
    """The same weights without guidance take the same steps: DDIM, at the same times."""
    rows = rows_of(student, "--steps-table", "4", "--sampler", "ddim", "--spacing", "trailing",
                   "--threshold", "1", "--unet-limit", "1")  # fmt: skip
    assert [(r["who"], r["steps"], r["evaluations"]) for r in rows] == [
        ("teacher", 4, 4), ("student", 4, 4)
    ]  # fmt: skip


def test_it_is_printed_and_wrong_use_is_one_sentence(student):
    done = tabulate(student, "--steps-table", "2", "--unet-limit", "1")
    assert "student" in done.output and "teacher" in done.output
    for words, said in (
        (("--steps-table", "4,x"), "--steps-table 4,x: give whole numbers from 1 on"),
        (("--steps-table", "4", "--steps", "8"), "leave --steps out"),
        (("--steps-table", "101"), "--steps-table 101: U-Net 1 has 100 times"),
    ):
        done = tabulate(student, *words)
        assert done.exit_code == 2 and said in done.output
