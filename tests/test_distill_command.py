"""`imagen-scale distill`: an ordinary run beside its teacher; refusals in one sentence."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from support import ROOT
from support.environment import without_launcher
from support.tiny import write_run, write_stage

from imagen_scale.commands.main import main
from imagen_scale.config import load_config
from imagen_scale.files.atomic import sha256
from imagen_scale.runs.folders import config_path, inference_path
from imagen_scale.runs.inference import read_inference

V = ("unets.0.pred_type=v",)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A trained run, below the working folder."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "runs" / "first")


@pytest.fixture
def started(monkeypatch):
    """The folders of the runs whose training was started, which ends at once."""
    folders = []

    def start(command, folder):
        folders.append(str(folder))
        return 0

    for name in ("start", "run_launcher"):
        monkeypatch.setattr(f"imagen_scale.commands.distill.{name}", start)
    return folders


def write(run, *changes):
    for number in (1, 2):
        write_stage(run, number, overrides=(*V, *changes))
    return run


def write_adapted(noise):
    """What training leaves of RUN_v, of a run whose second stage is kept."""
    run, shorter = (
        noise.with_name(f"{noise.name}_v"),
        ("training.steps=1", "training.warmup_steps=0"),
    )
    write_stage(run, 1, overrides=(*V, *shorter), origin=sha256(inference_path(noise, 1)))
    inference_path(run, 2).parent.mkdir()
    shutil.copyfile(inference_path(noise, 2), inference_path(run, 2))
    return run


def distill(*words):
    return CliRunner().invoke(main, ["distill", *words])


def planned(*words):
    """The configuration and the launcher's words of a dry run."""
    done = distill(*words, "--dry-run")
    assert done.exit_code == 0, done.output
    text, _, line = done.stdout.rstrip().rpartition("\n")
    return json.loads(text), shlex.split(line)


def test_the_new_run_is_the_teachers_with_a_tenth_of_its_training(teacher):
    data, line = planned("first", "--steps", "4,2", "--cond-scale", "2")
    assert data["distill"] == {
        "teacher": "runs/first", "steps": [4, 2], "cond_scale": [2.0, 1.0], "teacher_steps": None,
        "spacing": "middle",
    }  # fmt: skip
    own = json.loads((teacher / "config.json").read_text())
    assert {key for key in own if data[key] != own[key]} <= {"distill", "training", "logging"}
    training = data["training"]
    assert (training["steps"], training["lr"]) == ([1, 1], [2.5e-4, 2.5e-4])
    assert (training["weight_decay"], training["loss_weight"]) == (0, "v_clipped")
    assert line[line.index("--config") + 1 :][:3] == [
        "runs/first_steps4-2.json", "--run", "runs/first_steps4-2"
    ]  # fmt: skip
    assert not list(teacher.parent.glob("first_steps*"))  # nothing is written


def test_a_stage_may_be_kept_and_everything_said_otherwise(teacher):
    data, line = planned(
        "runs/first", "--steps", "4,keep", "--cond-scale", "3", "--to", "quick",
        "--train-steps", "5", "--set", "training.lr=1e-5", "--set", "distill.teacher_steps=8",
    )  # fmt: skip
    assert data["distill"]["steps"] == [4, None] and data["distill"]["teacher_steps"] == 8
    assert data["training"]["steps"] == [5, 6] and data["training"]["lr"] == 1e-5
    assert "runs/quick" in line


def test_what_a_student_cannot_take_over_is_not(teacher):
    write(teacher, "imagen.loss_type=huber", "data.val_fraction=0.3", "training.val_x0=true",
          "training.keep_best=val_x_0_error", "training.ema_widths=[0.1]")  # fmt: skip
    data, _ = planned("first", "--steps", "4,2", "--cond-scale", "2")
    assert data["imagen"]["loss_type"] == "l2"
    assert (data["training"]["keep_best"], data["training"]["ema_widths"]) == ("val_loss", [])


def test_fewer_steps_are_learned_by_the_same_command(teacher):
    section = {"teacher": str(teacher), "steps": [4, None], "cond_scale": [2, 1]}
    write(teacher.with_name("first_steps4-keep"), f"distill={json.dumps(section)}")
    data, line = planned("first_steps4-keep", "--steps", "2,keep")
    assert data["distill"] == {
        "teacher": "runs/first_steps4-keep", "steps": [2, None], "cond_scale": [2.0, 1.0],
        "teacher_steps": None, "spacing": "trailing",  # its teacher's
    }  # fmt: skip
    assert data["training"]["lr"] == [1e-3, 1e-3]
    assert "runs/first_steps2-keep" in line
    # One that is kept decides nothing.
    data_of_second, _ = planned("first_steps4-keep", "--steps", "keep,2")
    assert data_of_second["distill"]["spacing"] == "middle"
    assert planned("first_steps4-keep", "--steps", "2,keep", "--cond-scale", "2")[0] == data
    done = distill("first_steps4-keep", "--steps", "2,keep", "--cond-scale", "5", "--dry-run")
    assert done.exit_code == 2
    assert "--cond-scale: 5 for U-Net 1, but guidance 2 is built into it already" in done.output
    done = distill("first_steps4-keep", "--steps", "4,keep", "--to", "x", "--dry-run")
    assert done.exit_code == 2
    assert (
        "distill.steps: 4 for U-Net 1, but its teacher runs/first_steps4-keep takes 4 itself"
        in (done.output)
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("first", "--steps", "4"), "--cond-scale: say the guidance that becomes part of U-Net 1"),
        (("first", "--steps", "4,4,4", "--cond-scale", "2"), "--steps: 3 values for 2 stages"),
        (("first", "--steps", "4", "--cond-scale", "2,1,1"), "--cond-scale: 3 values for 2 stages"),
        (("first", "--steps", "17", "--cond-scale", "2"), "'17': give 1 to 16, or keep"),
        (("first", "--steps", "9" * 5000, "--cond-scale", "2"), "9': give 1 to 16, or keep"),
        (("first", "--steps", "4", "--cond-scale", "nan"), "'nan' is not a finite number"),
        (("first", "--steps", "4", "--cond-scale", "2,inf"), "'inf' is not a finite number"),
        (("first", "--steps", "keep"), "distill.steps: null for every U-Net"),
        (("fisrt", "--steps", "4"), "Did you mean runs/first?"),
    ],
)
def test_wrong_use_is_one_sentence(words, said, teacher):
    done = distill(*words)
    assert done.exit_code == 2 and said in done.output, done.output
    assert not list(teacher.parent.glob("*.json"))


@pytest.mark.parametrize("to", [".", "..", "quick/", "../quick", "runs/quick", "/quick"])
def test_the_new_run_is_named_and_not_placed(teacher, started, to):
    done = distill("first", "--steps", "4", "--cond-scale", "2", "--to", to)
    assert done.exit_code == 2, done.output
    assert f"--to {to}: is a name, of a folder beside runs/first; leave paths out" in done.output
    assert not list(teacher.parents[1].rglob("quick*")) and not started


@pytest.mark.parametrize("within", [".", "unet1"])
def test_the_new_run_lies_beside_a_teacher_that_is_named_from_within(teacher, monkeypatch, within):
    monkeypatch.chdir(teacher / within)
    data, line = planned("." if within == "." else "..", "--steps", "4,2", "--cond-scale", "2")
    student = teacher.with_name("first_steps4-2")
    assert line[line.index("--config") + 1 :] == [f"{student}.json", "--run", str(student)]
    assert data["distill"]["teacher"] == str(teacher)


def test_the_same_call_goes_on_and_another_one_keeps_what_is_there(teacher, started):
    words = ("first", "--steps", "4,keep", "--cond-scale", "2")
    first, again = distill(*words), distill(*words)
    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    assert "written: runs/first_steps4-keep.json" in first.stderr
    assert "written" not in again.stderr
    assert started == ["runs/first_steps4-keep"] * 2
    path = teacher.with_name("first_steps4-keep.json")
    assert load_config(path).distill.cond_scale == (2, 1)
    of_the_user = json.dumps(json.loads(path.read_text()), indent=8)  # spelled in another way
    path.write_text(of_the_user)
    assert distill(*words).exit_code == 0
    for text, scale in ((of_the_user, "3"), ("{", "2")):
        path.write_text(text)
        done = distill(*words[:-1], scale)
        assert done.exit_code == 2
        assert "runs/first_steps4-keep.json: exists already and says something else" in done.output
        assert "`imagen-scale train runs/first_steps4-keep.json`" in done.output
        assert path.read_text() == text
    assert len(started) == 3


def test_what_lies_where_a_run_is_trained_on_is_kept_as_well(teacher, started):
    write_run(teacher.with_name("noise"))
    path = teacher.with_name("noise_v.json")
    path.write_text("{}")
    words = ("noise", "--steps", "4,keep", "--cond-scale", "2")
    done = distill(*words)
    assert done.exit_code == 2 and "runs/noise_v.json: exists already and says" in done.output
    assert path.read_text() == "{}" and not started
    path.unlink()
    distill(*words)
    assert load_config(path).training.start_from == "runs/noise"
    assert started == ["runs/noise_v"]


def test_teachers_that_cannot_teach_say_what_to_do(teacher):
    write_stage(teacher, 2, step=3, overrides=V)
    done = distill("first", "--steps", "4", "--cond-scale", "2")
    assert done.exit_code == 1 and "U-Net 2 is half-trained (3 of 6 steps)" in done.output


def test_a_run_that_predicts_the_noise_is_trained_on_first(teacher):
    noise = teacher.with_name("noise")
    write_run(noise)
    words = ("noise", "--steps", "4,keep", "--cond-scale", "2", "--dry-run")
    done = distill(*words)
    assert done.exit_code == 0, done.output
    assert "U-Net 1 of runs/noise predicts the noise" in done.stderr
    assert "for 1 step, into runs/noise_v" in done.stderr
    text, _, line = done.stdout.rstrip().rpartition("\n")
    data = json.loads(text)
    assert [unet["pred_type"] for unet in data["unets"]] == ["v", "v"] and data["distill"] is None
    assert (data["training"]["start_from"], data["training"]["steps"]) == ("runs/noise", [1, 1])
    asked = ["--config", "runs/noise_v.json", "--run", "runs/noise_v", "--unet", "1"]
    assert shlex.split(line)[-6:] == asked
    assert not list(teacher.parent.glob("*.json"))
    # Once that is done, it teaches.
    write_adapted(noise)
    done = distill(*words)
    assert done.exit_code == 0, done.output
    assert "into runs/noise_v; it is there already" in done.stderr
    text, _, line = done.stdout.rstrip().rpartition("\n")
    assert json.loads(text)["distill"]["teacher"] == "runs/noise_v"
    assert shlex.split(line)[-1] == "runs/noise_steps4-keep"


def test_weights_that_a_run_had_once_do_not_teach_in_its_place(teacher, started):
    noise = write_run(teacher.with_name("noise"))
    adapted = write_adapted(noise)
    words = ("noise", "--steps", "4,keep", "--cond-scale", "2", "--dry-run")
    assert distill(*words).exit_code == 0
    for number in (1, 2):
        write_stage(noise, number, seed=1)  # trained on
        done = distill(*words)
        assert done.exit_code == 2 and not started
        how = ("trained", "taken over")[number - 1]
        assert f"runs/noise_v: its U-Net {number} was not {how} from that of runs/noise" in (
            done.output
        )
        assert "Delete runs/noise_v and runs/noise_v.json" in done.output
        write_stage(noise, number)
    write_stage(adapted, 1, overrides=V)  # somebody's own run under that name
    assert "runs/noise_v: its U-Net 1 was not trained" in distill(*words).output


def test_a_stage_that_was_kept_there_does_not_teach_and_one_that_was_trained_is_not_kept(teacher):
    noise = write_run(teacher.with_name("noise"), overrides=("unets.1.pred_type=eps",))
    assert "--unet" not in planned("noise", "--steps", "4,2", "--cond-scale", "2")[1]
    adapted = write_adapted(noise)
    done = distill("noise", "--steps", "4,2", "--cond-scale", "2", "--dry-run")
    assert done.exit_code == 2 and "runs/noise_v: its U-Net 2 was not trained" in done.output
    write_stage(adapted, 2, overrides=V, origin=sha256(inference_path(noise, 2)))
    assert distill("noise", "--steps", "4,2", "--cond-scale", "2", "--dry-run").exit_code == 0
    done = distill("noise", "--steps", "4,keep", "--cond-scale", "2", "--dry-run")
    assert done.exit_code == 2 and "runs/noise_v: its U-Net 2 was not taken over" in done.output


def test_what_is_set_counts_for_what_is_trained_first_as_well(teacher):
    write_run(teacher.with_name("noise"))
    sets = ("training.lr=1e-5", "distill.teacher_steps=8", "training.steps=50")
    words = [word for one in sets for word in ("--set", one)]
    data, line = planned("noise", "--steps", "4,keep", "--cond-scale", "2", *words)
    assert line[-2:] == ["--unet", "1"]  # by hand, too, what is kept is not trained
    assert data["training"]["lr"] == 1e-5
    assert data["distill"] is None and data["training"]["steps"] == [1, 1]  # the student's own


def test_a_kept_stage_that_predicts_the_noise_is_taught_later(teacher, started):
    """And the stage that takes few steps by then stays what it is."""
    noise = (*V, "unets.1.pred_type=eps")
    section = {"teacher": str(teacher), "steps": [4, None], "cond_scale": [2, 1]}
    run = teacher.with_name("first_steps4-keep")
    write_stage(run, 2, overrides=noise)
    write_stage(run, 1, overrides=(*noise, f"distill={json.dumps(section)}", "training.lr=1e-5"))
    words = ("first_steps4-keep", "--steps", "keep,2", "--cond-scale", "2,1")
    distill(*words)
    adapted = run.with_name("first_steps4-keep_v")
    assert started == ["runs/first_steps4-keep_v"]
    config = load_config(config_path(adapted))
    assert config.distill is None and [unet.pred_type for unet in config.unets] == ["v", "v"]
    assert config.training.lr == 1e-3  # as that stage was trained
    assert inference_path(adapted, 1).read_bytes() == inference_path(run, 1).read_bytes()
    assert not inference_path(adapted, 2).exists()

    made = config_path(adapted).read_text()
    write_stage(adapted, 2, overrides=V, origin=sha256(inference_path(run, 2)))
    config_path(adapted).write_text(made)
    done = distill(*words)
    assert done.exit_code == 0, done.output
    config = load_config(run.with_name("first_stepskeep-2.json"))
    assert (config.distill.steps, config.distill.cond_scale) == ((None, 2), (2, 1))
    assert config.training.lr == (2.5e-4, 2.5e-4)


def test_make_demo_fast_gives_commands_that_can_be_called():
    done = subprocess.run(["make", "--dry-run", "demo-fast", "VENV=venv", "PYTHON=python3"],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    lines = [shlex.split(line)[1:] for line in done.stdout.splitlines()
             if line.startswith("venv/bin/imagen-scale")]  # fmt: skip
    fast = [
        words for words in lines if "demo_steps4-keep" in " ".join(words) or words[0] == "distill"
    ]
    assert [words[0] for words in fast] == ["distill", "sample", "evaluate"]
    for name, *words in fast:
        main.commands[name].make_context(name, words)


@pytest.mark.distributed
def test_it_trains_under_the_real_launcher(teacher, private_folders):
    write_run(teacher.with_name("noise"))
    words = ["distill", "noise", "--steps", "2,keep", "--cond-scale", "2", "--train-steps", "2",
             "--set", "distill.teacher_steps=4", "--set", "training.sample_every=null"]  # fmt: skip
    code = "from imagen_scale.commands.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], env=without_launcher(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run, adapted = (teacher.with_name(name) for name in ("noise_steps2-keep", "noise_v"))
    assert "written: runs/noise_v.json" in done.stderr
    assert "written: runs/noise_steps2-keep.json" in done.stderr
    assert read_inference(inference_path(adapted, 1)).stage.unet.pred_type == "v"
    assert load_config(run / "config.json") == load_config(f"{run}.json")
    file = read_inference(inference_path(run, 1))
    assert (file.step, file.stage.few_steps.steps, file.stage.few_steps.cond_scale) == (2, 2, 2.0)
    kept = inference_path(teacher.with_name("noise"), 2).read_bytes()
    assert kept == inference_path(adapted, 2).read_bytes() == inference_path(run, 2).read_bytes()
    assert "U-Net 2: taken over from runs/noise as it is (step 6)" in done.stderr
