"""imagen-scale-runtime draws from a bundle what torch draws from the run."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from imagen_scale_runtime import Cascade, Wanted, bundle, command, noise, pictures
from imagen_scale_runtime.command import main
from imagen_scale_runtime.errors import (
    CardProblem,
    DataError,
    EnvironmentProblem,
    ExportError,
    ImagenScaleError,
    UsageError,
)
from imagen_scale_runtime.stage import _clean
from PIL import Image
from safetensors.torch import load_file
from support import ROOT, gate
from support.tiny import write_stage

from imagen_scale.diffusion.lowres import enlarge
from imagen_scale.diffusion.sampler import levels_at
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.thresholding import dynamic_threshold
from imagen_scale.files.pictures import to_uint8
from imagen_scale.runs.folders import inference_path
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.stages import TrainedStages

PACKAGE = Path(bundle.__file__).parent


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**62 + 5])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 5, 7), (1, 17), (1, 4, 4)])
def test_noise_is_torchs(seed, shape):
    generator, own = torch.Generator().manual_seed(seed), noise.NormalNoise(seed)
    for _ in range(3):
        theirs = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(own.draw(shape), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sides", [(64, 64), (32, 48), (16, 16), (20, 37), (8, 8), (7, 5)])
def test_resizing_is_torchs(sides):
    images = torch.rand(2, 3, 16, 16) * 2.2 - 1.1
    theirs = enlarge(images, *sides).numpy()
    np.testing.assert_allclose(pictures.enlarge(images.numpy(), *sides), theirs, atol=1e-5)


def test_thresholds_and_levels_are_torchs():
    x_0 = torch.randn(3, 3, 16, 16) * 2
    for percentile in (0.5, 0.9, 0.95, 0.999, 1.0):
        theirs = dynamic_threshold(x_0, percentile).numpy()
        np.testing.assert_allclose(
            pictures.dynamic_threshold(x_0.numpy(), percentile), theirs, atol=1e-6
        )
    np.testing.assert_array_equal(pictures.to_uint8(x_0.numpy()), to_uint8(x_0))


@pytest.mark.parametrize("pred_type", ["eps", "v", "x0"])
def test_predictions_are_read_as_torch_reads_them(pred_type):
    schedule, times = NoiseSchedule.cosine(100), [0, 40, 99]
    x_t, prediction = torch.randn(2, 3, 2, 4, 4)
    for i, level in enumerate(levels_at(schedule, times)):
        t = torch.tensor([level.time])
        theirs = schedule.predicted_x_0(pred_type, x_t[i : i + 1], t, prediction[i : i + 1])
        ours = _clean(pred_type, x_t[i : i + 1].numpy(), level, prediction[i : i + 1].numpy())
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def cascades(exported, bundled):
    with Cascade(bundled) as ours:
        yield TrainedStages.load(exported), ours


def same(theirs, ours, prompts, **options):
    """Whether all stages of all pictures are the same; gives the last stage of the first."""
    found = list(ours.stream(prompts, **options))
    expected = list(theirs.stream(prompts, SamplingOptions(**{"steps": 25, **options})))
    assert [(made.prompt, made.seed) for made in found] == [
        (made.prompt, made.seed) for made in expected
    ]
    for made, picture in zip(found, expected, strict=True):
        for image, tensor in zip(made.stages, picture.stages, strict=True):
            levels = to_uint8(tensor[None])[0].astype(int)
            assert np.abs(np.asarray(image).astype(int) - levels).max() <= 1
    return np.asarray(found[0].image)


@pytest.mark.parametrize(
    "options",
    [
        {},  # as the bundle says
        {"steps": 5, "sampler": "ddpm"},
        {"steps": (5, 3), "sampler": "ddim", "eta": 0.5, "spacing": "linear"},
        {"steps": 5, "sampler": "dpmpp_2m_sde", "spacing": "karras"},
        {"steps": 4, "sampler": "heun", "spacing": "logsnr", "threshold": 0.8},
        {"steps": 3, "cond_scale": (0, 2)},
        {"steps": 3, "cond_scale": 1.0, "at_once": 1, "num": 3, "seed": 5},
        {"steps": 3, "negative_prompt": "pizza"},
        {"steps": 3, "tile": 16},
        {"steps": 4, "guidance_interval": "0.5:1"},
        {"steps": 4, "cond_scale": (3, 2), "guidance_interval": ("0:0.5", "0.2:0.6"), "tile": 16},
        {"steps": 5, "cache_interval": (1, 2), "cond_scale": (3, 2)},
        {"steps": 4, "cache_interval": (1, 3), "tile": 16, "sampler": "heun"},
    ],
)
def test_pictures_are_the_runs(cascades, options):
    same(*cascades, ["sun", "red heart"], **options)


@pytest.mark.parametrize(
    "scales",
    [
        ((3.0, 1.0), (1.5, 1.0), (-1.0, 1.0)),  # of the base alone
        ((0.0, 2.0), (1.0, 1.0), (4.0, 0.0)),
        ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)),  # no picture needs both branches
    ],
)
@pytest.mark.parametrize("interval", [None, "0.5:1"])
def test_each_picture_of_a_batch_has_its_own_guidance(cascades, scales, interval):
    theirs, ours = cascades
    asked = {"steps": 4, "guidance_interval": interval}
    wanted = [("sun", 1), ("key", 2), ("red heart", 3)]
    of_ours = [Wanted(*one, scale) for one, scale in zip(wanted, scales, strict=True)]
    found = list(ours.draw(of_ours, ours.settings(**asked)))
    for made, (prompt, seed), scale in zip(found, wanted, scales, strict=True):
        options = SamplingOptions(**asked, seed=seed, cond_scale=scale)
        (picture,) = theirs.stream([prompt], options)
        assert (made.prompt, made.seed) == (prompt, seed)
        for image, tensor in zip(made.stages, picture.stages, strict=True):
            levels = to_uint8(tensor[None])[0].astype(int)
            assert np.abs(np.asarray(image).astype(int) - levels).max() <= 1


def test_pictures_go_through_as_many_stages_as_there_are_settings(cascades):
    _, ours = cascades
    settings = ours.settings(stages=1, steps=3)
    (made,) = ours.draw([Wanted("sun", 1)], settings)
    (whole,) = ours.stream("sun", steps=3, seed=1)
    (first,) = made.stages
    np.testing.assert_array_equal(np.asarray(first), np.asarray(whole.stages[0]))


def test_every_option_shows(cascades):
    """Else the equalities above would hold of options that nobody reads."""
    of = {
        name: same(*cascades, ["sun"], steps=3, **options)
        for name, options in {
            "plain": {}, "seed": {"seed": 1}, "guidance": {"cond_scale": 9.0},
            "negative": {"negative_prompt": "pizza"}, "tile": {"tile": 16},
            "interval": {"guidance_interval": "0.5:1"}, "threshold": {"threshold": 0.5},
            "spacing": {"spacing": "linear"}, "cache": {"cache_interval": (1, 3)},
        }.items()
    }  # fmt: skip
    plain = of.pop("plain")
    assert [name for name, found in of.items() if np.array_equal(found, plain)] == []


def test_prompts_of_no_text_and_long_ones(cascades, recwarn):
    theirs, ours = cascades
    said = []
    ours._say = said.append
    same(theirs, ours, ["", "a red heart beside a small wooden house under the sun"], steps=2)
    (one, other) = said  # of both stages
    assert "reads the first 8 of 13 tokens and not what begins at 'house under the sun'" in one
    assert "U-Net 2" in other
    with pytest.raises(DataError, match="is not UTF-8 text"):
        ours.sample("\udcff", steps=2)


def test_stages_of_another_kind_are_sampled_in_their_way(exported, bundled, tmp_path):
    """x_0 as a correction, clamped: the same weights, told otherwise in both."""
    run, folder = tmp_path / "run", shutil.copytree(bundled, tmp_path / "bundle")
    for number in (1, 2):
        weights = load_file(inference_path(exported, number))

        def take(unet, weights=weights):
            unet.load_state_dict(weights)

        write_stage(
            run, number, change=take,
            overrides=["unets.0.pred_type=x0", "unets.1.pred_type=x0",
                       "unets.1.lowres_residual=true",
                       "imagen.dynamic_thresholding_percentile=null"],
        )  # fmt: skip
    facts = json.loads((folder / "bundle.json").read_text())
    for stage in facts["stages"]:
        stage |= {"pred_type": "x0", "thresholding": "clamp"}
        stage["settings"]["spacing"] = "logsnr"
    facts["stages"][1]["lowres_residual"] = True
    (folder / "bundle.json").write_text(json.dumps(facts))
    same(TrainedStages.load(run), Cascade(folder), ["sun"], steps=4)
    same(TrainedStages.load(run), Cascade(folder), ["sun"], steps=4, tile=16)


@pytest.mark.parametrize(
    ("reason", "known"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", CardProblem),
        ("CUDA failure 2: out of memory ; GPU=0", EnvironmentProblem),
        ("CUDA failure 801: operation not supported ; GPU=0", ExportError),
    ],
)
def test_what_a_card_does_not_recover_from_is_told_apart(bundled, monkeypatch, reason, known):
    def fail(*arguments):
        raise RuntimeError(reason)

    with Cascade(bundled) as cascade:
        list(cascade.sample("sun", steps=1))
        monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
        with pytest.raises(ImagenScaleError) as told:
            list(cascade.sample("sun", steps=1))
    assert type(told.value) is known


def test_openvino_gives_the_same(exported, bundled):
    same(TrainedStages.load(exported), Cascade(bundled, runtime="openvino"), ["sun"], steps=3)


def run_alone(packages, *arguments):
    """The command where only the runtime's own packages can be imported."""
    environment = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, gate.__file__, "imagen_scale_runtime", *map(str, arguments)],
        env=environment, capture_output=True, text=True, cwd="/",
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The distribution, unpacked."""
    folder = tmp_path_factory.mktemp("wheels")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "-w", folder, ROOT / "export" / "runtime"], check=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_the_main_packages_own_modules(wheel):
    links = [path for path in PACKAGE.rglob("*.py") if path.is_symlink()]
    assert {path.name for path in links} >= {"reverse.py", "solvers.py", "spacing.py", "tiles.py"}
    for path in PACKAGE.rglob("*.py"):
        built = wheel / "imagen_scale_runtime" / path.relative_to(PACKAGE)
        assert not built.is_symlink() and built.read_bytes() == path.read_bytes()
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    needed = {line.split()[1] for line in metadata.read_text().splitlines()
              if line.startswith("Requires-Dist") and "extra" not in line}  # fmt: skip
    assert {name.partition(">")[0] for name in needed} == {
        "numpy", "onnxruntime", "pillow", "tokenizers"
    }  # fmt: skip


def test_installed_alone_the_command_draws_the_runs_picture(wheel, exported, bundled, tmp_path):
    arguments = ("sun", "--bundle", bundled, "--out", tmp_path, "--steps", "3,2", "--seed", 4)
    done = run_alone(wheel, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"1 pictures in {tmp_path}\n"
    (picture,) = tmp_path.glob("*.png")
    facts = json.loads(picture.with_suffix(".json").read_text())
    assert (facts["prompt"], facts["seed"], facts["stages"][1]["steps"]) == ("sun", 4, 2)
    theirs = TrainedStages.load(exported).sample(["sun"], SamplingOptions(steps=(3, 2), seed=4))
    difference = np.asarray(Image.open(picture)).astype(int) - to_uint8(theirs[-1])[0].astype(int)
    assert np.abs(difference).max() <= 1
    assert run_alone(wheel, *arguments).returncode == 0
    assert sorted(path.name[:5] for path in tmp_path.glob("*.png")) == ["00001", "00002"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt: give one or more"),
        (["sun", "--steps", "0"], "--steps 0: must be a whole number from 1 on"),
        (["sun", "--steps", "101"], "--steps 101: U-Net 1 (16 px) has 100 times; take at most so"),
        (["sun", "--steps", "100,101"], "--steps 101: U-Net 2 (32 px) has 100 times"),
        (["sun", "--steps", "1,2,3"], "--steps: 3 values for 2 stage(s)"),
        (["sun", "--cond-scale", "nan"], "--cond-scale nan: must be a finite number"),
        (["sun", "--seed", str(2**63)], "must be a whole number from 0 on, below 2^63"),
        (["sun", "--threads", "-3"], "--threads -3: must be 0 or more"),
        (["sun", "--sampler", "euler"], "--sampler 'euler': take one of ddpm, ddim"),
        (["sun", "--eta", "0.5"], "--eta 0.5: goes with --sampler ddim, not dpmpp_2m"),
        (["sun", "--threshold", "2"], "--threshold 2.0: must be above 0 and at most 1"),
        (["sun", "--guidance-interval", "1:0"], "--guidance-interval 1:0: it should be FROM:UNTIL"),
        (
            ["sun", "--cache-interval", "2"],
            "--cache-interval 2: the graphs of U-Net 1 (16 px) compute every evaluation whole; "
            "export the bundle with --cache",
        ),
        (["sun", "--cache-interval", "1,0"], "--cache-interval 0: must be a whole number from 1"),
        (["sun", "--tile", "7"], "--tile 7: U-Net 2 (32 px) takes tiles in multiples of"),
        (["sun", "--seed", "-1"], "--seed -1: must be a whole number from 0 on"),
        (["sun", "--provider", "CUDA"], "--provider CUDA: this ONNX Runtime has "),
        (["sun", "--runtime", "tf"], "--runtime tf: take one of onnx, openvino"),
        (["sun", "--negative-prompt", "x", "--cond-scale", "1"], "--negative-prompt: acts through"),
        (["--from-file", "/nowhere"], "--from-file /nowhere: cannot be read: No such file"),
    ],
)
def test_wrong_use_is_one_sentence(bundled, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--bundle", str(bundled), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert (ended.value.code, said.startswith("error: ")) == (2, True)
    assert message in said and said.count("\n") == 1


def test_what_was_made_before_a_fault_is_told(bundled, tmp_path, capsys, monkeypatch):
    write, written = command._write, []

    def full(folder, *others):
        if written:
            raise OSError(28, "No space left on device", str(folder))
        written.append(write(folder, *others))

    monkeypatch.setattr(command, "_write", full)
    with pytest.raises(SystemExit) as ended:
        main(
            ["sun", "--num", "2", "--bundle", str(bundled), "--out", str(tmp_path), "--steps", "1"]
        )
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert said == [
        f"1 of 2 pictures are in {tmp_path}", f"error: {tmp_path}: No space left on device"
    ]  # fmt: skip


def test_a_bundle_of_links_is_a_bundle(bundled, tmp_path):
    """The cache of the Hugging Face hub is made of them."""
    shutil.copytree(bundled, tmp_path / "linked", copy_function=os.symlink)
    assert bundle.Bundle(tmp_path / "linked").stages[1].size == 32


FALSE = {
    "image_size": 0, "channels": 1, "max_text_len": 0, "pred_type": "x", "thresholding": "all",
    "percentile": 7, "lowres_time": 5000,
}  # fmt: skip


def test_lists_are_read_as_the_main_package_reads_them():
    asked = command._parser().parse_args(
        ["sun", "--bundle", "b", "--threshold", "none, 0.9", "--sampler", "ddim, ddim",
         "--guidance-interval", "none,0.2:1"]
    )  # fmt: skip
    assert (asked.threshold, asked.sampler) == ([None, 0.9], ["ddim", "ddim"])
    assert asked.guidance_interval == [None, "0.2:1"]
    assert command.typed("\udcc3\udca9") == "é"  # of a locale without it


@pytest.mark.parametrize(
    "asked", [{"steps": True}, {"steps": [None, 2]}, {"sampler": ["ddim", None]}, {"num": True},
              {"seed": 2**63 - 1, "num": 2}, {"threshold": True}, {"cond_scale": 1e300}],
)  # fmt: skip
def test_what_the_main_package_refuses_is_refused(bundled, asked):
    with Cascade(bundled) as cascade, pytest.raises(UsageError):
        cascade.sample("sun", **{"steps": 1, **asked})


def test_a_bundle_in_a_folder_whose_name_is_no_text_is_not_called_damaged(bundled, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/b\xe9")
    shutil.copytree(bundled, folder)
    with pytest.raises(ExportError, match="names are UTF-8 text; rename the folder"):
        Cascade(folder)


def damaged(folder, what):
    facts = json.loads((folder / "bundle.json").read_text())
    if what == "missing":
        (folder / "unet1" / "denoiser.onnx.data").unlink()
    elif what == "changed":
        path = folder / "unet1" / "denoiser.onnx.data"
        content = bytearray(path.read_bytes())
        content[99] ^= 1
        path.write_bytes(content)
    elif what == "outside":
        facts["files"]["../x"] = {"bytes": 0, "sha256": ""}
    elif what == "schema":
        facts["schema_version"] = 2
    elif what == "cut":
        del facts["stages"]
    elif what == "empty":
        facts["stages"] = []
    elif what == "other":
        facts["stages"][1]["settings"]["steps"] = "25"
    elif what in FALSE:
        facts["stages"][1][what] = FALSE[what]
    elif what == "flat":
        facts["text"] = "minilm"
    elif what == "unlisted":
        del facts["files"]["unet2/denoiser.onnx"]
    elif what == "list":
        facts = [facts]
    if what == "json":
        (folder / "bundle.json").write_text("{")
    else:
        (folder / "bundle.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "denoiser.onnx.data: is missing"),
        ("changed", "denoiser.onnx.data: is not what was exported"),
        ("outside", r"names '\.\./x', which is outside"),
        ("schema", "is of schema 2, and this imagen-scale-runtime reads 1"),
        ("cut", "is damaged: stages is None"),
        ("empty", "is damaged: it has no stages"),
        ("other", "is damaged: steps is 25"),
        *((name, f"is damaged: {name} is {value}") for name, value in FALSE.items()),
        ("flat", "is damaged: text is no JSON object"),
        ("unlisted", "is damaged: it does not list unet2/denoiser.onnx"),
        ("list", "is damaged: it is no JSON object"),
        ("json", "cannot be read"),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused(bundled, tmp_path, what, message):
    folder = shutil.copytree(bundled, tmp_path / "bundle")
    damaged(folder, what)
    with pytest.raises(ExportError, match=message):
        Cascade(folder)


def test_what_is_no_bundle_and_what_is_no_option_is_said(bundled, tmp_path):
    with pytest.raises(ExportError, match=r"holds no bundle\.json"):
        Cascade(tmp_path)
    with pytest.raises(UsageError, match="stps: there is no such option; there are steps"):
        Cascade(bundled).sample("sun", stps=3)
    for options, said in (
        ({"cond_scale": 10**400}, "must be a finite number"),
        ({"negative_prompt": ["a"]}, "is not a string"),
    ):
        with pytest.raises(UsageError, match=said):
            Cascade(bundled).sample("sun", **options)
    # No words are none, as in the main package: nothing is led away from.
    Cascade(bundled).settings(negative_prompt=" ", cond_scale=1)
    with pytest.raises(UsageError, match="prompts: there is none"):
        Cascade(bundled).sample([])


def test_few_steps_are_sampled_as_they_learned_it(bundled, tmp_path):
    folder = shutil.copytree(bundled, tmp_path / "bundle")
    facts = json.loads((folder / "bundle.json").read_text())
    facts["stages"][0] |= {"few_steps": True, "thresholding": "none", "denoiser": None}
    facts["stages"][0]["settings"] |= {"steps": 2, "cond_scale": 1.0, "sampler": "ddim"}
    (folder / "bundle.json").write_text(json.dumps(facts))
    cascade = Cascade(folder)
    assert [made.steps for made in cascade.settings()] == [2, 25]
    assert cascade.settings(cond_scale=0)[0].cond_scale == 0
    for wrong in (
        {"steps": 5}, {"cond_scale": 3.0}, {"sampler": "heun"}, {"threshold": 0.9},
        {"negative_prompt": "pizza", "cond_scale": [0, 2]},
    ):  # fmt: skip
        name, *_ = wrong
        with pytest.raises(UsageError, match=f"{name}.* learned to take few steps"):
            cascade.settings(**wrong)


def test_steps_of_a_bundle_are_no_more_than_its_times(bundled, tmp_path):
    folder = shutil.copytree(bundled, tmp_path / "bundle")
    facts = json.loads((folder / "bundle.json").read_text())
    facts["stages"][1]["settings"]["steps"] = 300  # as bundles had it before that was refused
    (folder / "bundle.json").write_text(json.dumps(facts))
    first, second = Cascade(folder).settings()
    assert (first.steps, second.steps) == (facts["stages"][0]["settings"]["steps"], 100)


def test_graphs_are_freed_when_they_are_not_kept(bundled):
    kept, freed = Cascade(bundled), Cascade(bundled, keep=False)
    for cascade in (kept, freed):
        cascade.sample("sun", steps=1)
    assert [len(stage._graphs) for stage in kept._stages] == [1, 1]
    assert [len(stage._graphs) for stage in freed._stages] == [0, 0]
    assert kept._reader._graphs and not freed._reader._graphs
    kept.close()
    assert not kept._reader._graphs and kept.sample("sun", steps=1)


@pytest.mark.slow
def test_a_process_without_torch_is_measured_beside_one_with_it(exported, bundled):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "alone.py", exported, bundled, "--rounds", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "imagen" in line]
    (_, _, cpu_s, peak, _), (_, _, own_cpu_s, own_peak, _) = rows
    assert float(own_cpu_s) < float(cpu_s) and float(own_peak) < float(peak)
