"""Stages that learned few steps, sampled and exported: as they learned it, and in no other way."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from imagen_scale_export.exporter import ExportOptions, export_unet, verify_export
from support.tiny import write_stage

from imagen_scale.commands.main import main
from imagen_scale.diffusion.lowres import resize
from imagen_scale.diffusion.sampler import levels_at
from imagen_scale.diffusion.solvers import ddim_step
from imagen_scale.errors import UsageError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import learned_stages, read_inference
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.manifest import read_manifest
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Inputs, Stage, noise_source
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.ui.generation import Request, checked

CPU = torch.device("cpu")
TEACHER = "runs/teacher"


def few(steps, cond_scale=(2, 1)):
    section = {"teacher": TEACHER, "steps": steps, "cond_scale": list(cond_scale)}
    return ("unets.0.pred_type=v", f"distill={json.dumps(section)}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base of four steps and an ordinary second stage."""
    run = tmp_path_factory.mktemp("runs") / "few"
    for number in (1, 2):
        write_stage(run, number, overrides=few([4, None]))
    return run


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two stages of few steps."""
    run = tmp_path_factory.mktemp("runs") / "both"
    for number in (1, 2):
        write_stage(run, number, overrides=few([4, 2]))
    return run


def file_of(run, number=1):
    return read_inference(inference_path(run, number))


def settings(run, **options):
    return TrainedStages.load(run).settings(SamplingOptions.make(**options))


def text(batch):
    generator = torch.Generator().manual_seed(5)
    return Text(torch.randn(batch, 8, 384, generator=generator), torch.ones(batch, 8).bool())


def test_a_stage_is_sampled_as_it_learned_beside_one_that_did_not(run):
    learned = StageSettings(steps=4, cond_scale=1.0, sampler="ddim", spacing="trailing")
    ordinary = StageSettings(steps=25, cond_scale=1.0, threshold=0.9)
    assert settings(run) == [learned, ordinary]
    assert settings(run, steps=[4, 8])[1].steps == 8
    options = {"sampler": ["ddim", "heun"], "spacing": ["auto", "karras"], "cond_scale": [1, 2],
               "threshold": [None, 0.8]}  # fmt: skip
    found = settings(run, **options)
    assert found[0] == learned
    assert found[1] == StageSettings(cond_scale=2, sampler="heun", spacing="karras", threshold=0.8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 8), ("cond_scale", 3.0), ("sampler", "heun"), ("spacing", "linear"), ("eta", 0.5),
     ("threshold", 0.9), ("cache_interval", 2)],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_by_name(name, value, run):
    with pytest.raises(UsageError) as caught:
        settings(run, **{name: value})
    assert str(caught.value) == (
        f"{name} {value}: U-Net 1 learned to take 4 steps with guidance 2 built in, and nothing "
        f"else; leave {name} out, or sample its teacher {TEACHER}."
    )


@pytest.mark.parametrize("what", [["--unet", "all"], ["--bundle"]])
def test_no_graphs_are_made_that_it_would_not_take(run, what):
    done = CliRunner().invoke(main, ["export", *what, "--cache", "--run", str(run)])
    assert done.exit_code == 2
    assert "--cache: U-Net 1 learned few steps, and every evaluation is whole" in done.output
    assert "Export the others with --unet" in done.output
    assert not (run / "export").exists()


def test_a_negative_prompt_needs_a_stage_that_is_guided(run, both):
    with pytest.raises(UsageError, match="negative_prompt: acts .* few steps is built in; sample"):
        settings(both, negative_prompt="sun")
    assert settings(run, negative_prompt="sun", cond_scale=[1, 2])[1].cond_scale == 2


def test_its_steps_are_ddim_without_thresholding(run):
    stage = Stage(file_of(run), CPU)
    inputs = Inputs(text(2), [3, 4])
    (of_stage,) = SamplingOptions().for_stages([stage.config])
    found = stage.sample(inputs, of_stage)
    draw_noise = noise_source("sample", stage.config, [3, 4], (3, 16, 16), CPU)
    denoise, x = stage.runtime.bind(Conditioning(inputs.text, 1.0)), draw_noise()
    levels = levels_at(stage.schedule, [99, 74, 49, 24])
    for level, lower in zip(levels, [*levels[1:], None], strict=True):
        x_0 = denoise(x, torch.full((2,), level.time))
        x = x_0 if lower is None else ddim_step(x, x_0, level, lower, eta=0, noise=None)
    assert torch.equal(found, x.clamp(-1, 1))
    assert x_0.abs().max() > 1  # thresholding would have been seen


def test_no_runtime_guides_it(run):
    runtime = Stage(file_of(run), CPU).runtime
    for scale in (0.0, 1.0):
        runtime.bind(Conditioning(text(1), scale))
    with pytest.raises(UsageError, match="cond_scale 3: U-Net 1 learned .* guidance 2 built in"):
        runtime.bind(Conditioning(text(1), 3.0))


def test_it_is_exported_as_one_graph_that_gives_the_same_pictures(tmp_path):
    for number in (1, 2):
        entry = f"unets.{number - 1}"
        shallow = (f"{entry}.dim_mults=[1]", f"{entry}.layer_attns=false",
                   f"{entry}.layer_cross_attns=false")  # fmt: skip
        write_stage(tmp_path, number, overrides=(*few([4, 2]), *shallow))
        file = file_of(tmp_path, number)
        folder = export_unet(file, ExportOptions(), lambda sentence: None)
        names = {path.name for path in folder.iterdir()}
        assert {name for name in names if name.startswith("denoiser")} == {
            "denoiser_unguided.onnx", "denoiser_unguided.onnx.data"
        }  # fmt: skip
        manifest = read_manifest(folder)
        assert manifest.sampler.steps == manifest.verification.loop_steps == (4, 2)[number - 1]
        assert "cond_scale" not in {port.name for port in manifest.denoiser.inputs}
        assert verify_export(folder, file).passed
        lowres = None if number == 1 else resize(torch.rand(2, 3, 16, 16) * 2 - 1, 16)
        inputs = Inputs(text(2), [0, 1], lowres)
        (of_stage,) = SamplingOptions().for_stages([file.stage])
        for scale in (1.0, 0.0):
            made = [
                Stage(file, CPU, RuntimeOptions(runtime=name)).sample(
                    inputs, of_stage.model_copy(update={"cond_scale": scale})
                )
                for name in ("onnx", "torch")
            ]
            torch.testing.assert_close(*made, atol=1e-4, rtol=0)
    inspected = CliRunner().invoke(main, ["export", "inspect", str(folder)])
    assert "; 2 steps within" in inspected.output


def test_commands_take_its_way_and_say_it(both, tmp_path):
    """Prompts to pictures, and a picture enlarged with a text and without."""
    invoke = CliRunner().invoke
    out = tmp_path / "out"
    done = invoke(main, ["sample", "sun", "--run", str(both), "--out", str(out)])
    assert done.exit_code == 0, done.output
    facts = json.loads(next(out.glob("*.json")).read_text())
    assert [(s["steps"], s["sampler"], s["spacing"], s["threshold"]) for s in facts["stages"]] == [
        (4, "ddim", "trailing", None), (2, "ddim", "trailing", None)
    ]  # fmt: skip
    picture = next(out.glob("0*.png"))
    for prompt in ((), ("--prompt", "sun")):
        large = tmp_path / f"large{len(prompt)}.png"
        words = ["upscale", str(picture), "--run", str(both), "--unet", "2", *prompt]
        done = invoke(main, [*words, "--out", str(large)])
        assert done.exit_code == 0, done.output
    done = invoke(main, ["sample", "sun", "--run", str(both), "--steps", "25"])
    assert done.exit_code == 2
    assert "--steps 25: U-Net 1 learned to take 4 steps" in done.output


def test_the_report_says_what_was_learned(run, tmp_path):
    done = CliRunner().invoke(main, ["report", str(run), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert "4 steps, guidance 2 built in, learned from runs/teacher" in page


FORM = """
import json, sys
from pathlib import Path
import gradio
from imagen_scale.config import load_config
from imagen_scale.runs.inference import learned_stages
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.ui.form import Form
from imagen_scale.ui.history import Facts
run = Path(sys.argv[1])
own = SamplingOptions().for_stages(load_config(run / "config.json").stages())
with gradio.Blocks():
    form = Form([16, 32], "torch", own, learned_stages(run, 2))
fields = {name: [(field.value, field.interactive) for field in form.options[name]]
          for name in ("steps", "cond_scale")}
values = {field: field.value for field in form.fields} | {form.prompt: "sun"}
asked = [form.read(list(values.values()))]
asked.append(form.read(list((values | {form.options["sampler"][0]: "heun"}).values())))
for stages in json.loads(sys.argv[2]):
    stages = [stage | {"runtime": "torch"} for stage in stages]
    filled = form.fill(Facts(prompt="sun", seed=3, stages=stages))
    asked.append(form.read(list((values | filled).values())))
print(json.dumps([fields, *(one.options for one in asked)]))
"""


def test_the_page_fixes_what_was_learned_and_asks_for_nothing_that_was_left_alone(run):
    assert {number: one.steps for number, one in learned_stages(run, 2).items()} == {1: 4}
    others = {"threshold": [None, 0.7], "sampler": ["ddim", "heun"]}
    made = [settings(run, cond_scale=[1, 1], **more) for more in ({}, others)]
    recorded = json.dumps([[stage.model_dump() for stage in one] for one in made])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORM, run, recorded],
                          capture_output=True, text=True, check=True)  # fmt: skip
    fields, options, with_heun, *again = json.loads(done.stdout)
    assert fields == {"steps": [[4, False], [25, True]], "cond_scale": [[1.0, False], [1.0, True]]}
    assert set(options) == {"steps", "cond_scale", "seed", "negative_prompt"}
    cascade = TrainedStages.load(run)
    assert cascade.settings(checked(Request("sun", options, "torch")))[0].sampler == "ddim"
    found = cascade.settings(checked(Request("sun", with_heun, "torch")))
    assert [stage.sampler for stage in found] == ["ddim", "heun"]
    # "Take these settings" asks for the same again: of the stages that leave a choice.
    for before, asked in zip(made, again, strict=True):
        assert cascade.settings(checked(Request("sun", asked, "torch"))) == before
    assert "threshold" not in again[0]
