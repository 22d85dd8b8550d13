"""A bundle behind HTTP: what a run's server does, without the run and without torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from support.serving import (
    ask,
    assert_alike,
    assert_computed_together,
    client_of,
    pixels,
    served,
    until,
)
from support.tiny import write_stage

from imagen_scale.commands.main import main
from imagen_scale.sampling.cascade import Cascade

LONG = " ".join(["rocket"] * 20)  # more than max_text_len
# Importing torch, or what brings it along, raises here, whoever does it.
PROGRAM = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
from imagen_scale.commands.main import main
main()
"""


@pytest.fixture(scope="module")
def server(bundled):
    with served(bundled) as one:
        until(lambda: one.engine.state == "ready")
        yield one


@pytest.fixture(scope="module")
def cascade(exported):
    """The run that the bundle was made of, in torch."""
    with Cascade.load(exported, runtime="torch", say=print) as one:
        yield one


def edited(bundled, folder, change):
    """A copy of the bundle of which something else is said."""
    shutil.copytree(bundled, folder)
    facts = json.loads((folder / "bundle.json").read_text())
    change(facts)
    (folder / "bundle.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def few(bundled, tmp_path_factory):
    """A bundle whose base stage is one of few steps, which has no guided graph."""

    def change(facts):
        facts["stages"][0] |= {"few_steps": True, "thresholding": "none", "denoiser": None}
        facts["stages"][0]["settings"] |= {"steps": 2, "cond_scale": 1.0, "sampler": "ddim"}

    folder = edited(bundled, tmp_path_factory.mktemp("few") / "few", change)
    (folder / "unet1" / "denoiser.onnx").write_bytes(b"not to be read")
    facts = json.loads((folder / "bundle.json").read_text())
    del facts["files"]["unet1/denoiser.onnx"]
    (folder / "bundle.json").write_text(json.dumps(facts))
    return folder


def test_pictures_are_those_of_the_run_in_torch(server, cascade, bundled):
    options = {
        "seed": 5, "steps": [3, 2], "cond_scale": [2.5, 1.5], "sampler": "ddim",
        "spacing": "linear", "eta": 0.5, "threshold": 0.9, "negative_prompt": "pizza",
        "guidance_interval": "0:0.5",
    }  # fmt: skip
    with client_of(server) as client:
        made = client.images.generate(
            prompt="red heart", n=2, size="32x32", model=bundled.name, extra_body=options
        )
    assert [one.seed for one in made.data] == [5, 6]
    for one, image in zip(made.data, cascade.sample("red heart", num=2, **options), strict=True):
        assert_alike(one.b64_json, image)


def test_what_is_left_out_is_the_bundles(server, cascade):
    (made,) = ask(server, prompt="sun", seed=0).json()["data"]
    assert_alike(made["b64_json"], cascade.sample("sun")[0])


def test_the_first_stage_alone_ends_the_cascade_there(server, cascade):
    (made,) = ask(server, prompt="sun", size="16x16", steps=3, seed=1).json()["data"]
    (whole,) = cascade.stream("sun", steps=3, seed=1)
    assert_alike(made["b64_json"], whole.stages[0])


def test_what_is_not_read_is_told_as_of_a_run(server, exported):
    asked = {"prompt": LONG, "negative_prompt": LONG + " sun", "steps": 1, "seed": 0}
    with served(exported) as other:
        theirs, ours = (ask(one, **asked).json()["data"] for one in (other, server))
    assert ours[0]["not_read"] == theirs[0]["not_read"]
    assert [lost["option"] for lost in ours[0]["not_read"]] == ["prompt"] * 2 + [
        "negative_prompt"
    ] * 2
    (first,) = ask(server, **asked | {"size": "16x16"}).json()["data"]
    assert [lost["unet"] for lost in first["not_read"]] == [1, 1]


def test_equal_settings_are_computed_together_each_with_its_own_guidance(bundled, cascade):
    asked = [
        {"prompt": "sun", "seed": 1, "steps": 2, "cond_scale": [3.0, 2.0]},
        {"prompt": LONG, "seed": 2, "steps": 2, "cond_scale": [1.5, 5.0]},
        {"prompt": "key", "seed": 3, "steps": 2, "cond_scale": [-1.0, 0.5]},
        {"prompt": "key", "seed": 3, "steps": 3, "cond_scale": [3.0, 2.0]},  # other steps
        {"prompt": "key", "seed": 4, "steps": 2, "cond_scale": 1.0},  # half the work
        {"prompt": "key", "seed": 4, "steps": 2, "cond_scale": 0.0},
    ]
    assert_computed_together(bundled, asked, cascade)


def test_one_that_cannot_be_computed_takes_no_other_along(bundled, cascade, capsys):
    scales = (3.0, 1e38, 2.0)
    with served(bundled, works=False) as server, ThreadPoolExecutor() as callers:
        answers = [callers.submit(ask, server, prompt="sun", seed=0, steps=2, cond_scale=scale)
                   for scale in scales]  # fmt: skip
        until(lambda: len(server.engine.waiting) == len(scales))
        server.engine.start()
        first, poisoned, last = [answer.result() for answer in answers]
        assert "error: U-Net 1 (16 px): onnx" in capsys.readouterr().err
        assert poisoned.status_code == 500 and "not finite" in poisoned.json()["error"]["message"]
        assert server.metric('pictures_total{outcome="failed"}') == 1
    for answer, scale in ((first, 3.0), (last, 2.0)):
        (image,) = cascade.sample("sun", steps=2, cond_scale=scale)
        assert_alike(answer.json()["data"][0]["b64_json"], image)


def test_steps_are_told_and_a_caller_who_leaves_ends_the_work(server):
    before = server.metric('pictures_total{outcome="dropped"}')
    body = {"prompt": "sun", "stream": True, "steps": 100}
    told = []
    with (
        httpx.Client(trust_env=False, timeout=120) as caller,
        caller.stream("POST", server.images, json=body) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("data"):
                told.append(json.loads(line.removeprefix("data:")))
            if len(told) == 3:
                break
    assert [(one["unet"], one["step"], one["steps"]) for one in told] == [
        (1, step, 100) for step in (1, 2, 3)
    ]
    until(lambda: server.metric('pictures_total{outcome="dropped"}') == before + 1)


def test_large_stages_are_computed_in_tiles_where_the_server_says_so(bundled, cascade):
    with served(bundled, tile=16) as server:
        (made,) = ask(server, prompt="sun", seed=0, steps=2).json()["data"]
    (tiled,), (whole,) = (cascade.sample("sun", steps=2, tile=tile) for tile in (16, None))
    assert_alike(made["b64_json"], tiled)
    assert np.abs(pixels(made["b64_json"]) - np.asarray(whole).astype(int)).max() > 1


def test_what_a_bundle_was_not_made_for_is_refused_by_name(few):
    with served(few) as server:
        for wrong in (
            {"cond_scale": 3.0}, {"cond_scale": [2.0, 1.0]}, {"steps": 5}, {"sampler": "heun"},
            {"threshold": 0.9}, {"spacing": "karras"}, {"guidance_interval": "0:0.5"},
            {"negative_prompt": "pizza"}, {"size": "64x64"}, {"cond_scale": [1.0, 1.0, 1.0]},
            {"sampler": ["ddim", "euler"]}, {"tile": 16},
        ):  # fmt: skip
            answer = ask(server, prompt="sun", **wrong)
            (name,) = wrong
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name), (wrong, answer.text)
            assert error["type"] == "invalid_request_error" and "\x1f" not in error["message"]
        made = ask(server, prompt="sun", seed=1, steps=[2, 3], cond_scale=[0, 2]).json()["data"]
        assert made[0]["seed"] == 1
        assert server.metric('pictures_total{outcome="failed"}') == 0


# The command -------------------------------------------------------------------------------------


def test_where_torch_cannot_be_imported_it_draws_what_torch_draws(bundled, cascade):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", bundled, "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        with httpx.Client(base_url=address, trust_env=False, timeout=120) as caller:
            until(lambda: caller.get("/readyz").status_code == 200)
            assert caller.get("/v1/models").json()["data"][0]["id"] == bundled.name
            body = {"prompt": "sun", "seed": 3, "steps": 3}
            (made,) = caller.post("/v1/images/generations", json=body).json()["data"]
        assert_alike(made["b64_json"], cascade.sample("sun", seed=3, steps=3)[0])
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
        assert (process.returncode, "Traceback" in error) == (0, False), error
    finally:
        process.kill()
        process.communicate()


def serve(*arguments):
    return CliRunner().invoke(main, ["serve", "--port", "0", *map(str, arguments)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runtime", "torch"], "--runtime torch: take one of onnx, openvino"),
        (["--precision", "fp16"], "--precision: is a run's, and"),
        (["--channels-last"], "--channels-last: is a run's, and"),
        (["--allow-unfinished"], "--allow-unfinished: is a run's, and"),
        (["--unet-limit", "3"], "--unet-limit 3: this cascade has U-Nets 1 to 2"),
        (["--provider", "CUDA"], "--provider CUDA: this ONNX Runtime has"),
        (["--tile", "7"], "--tile 7: U-Net 2 (32 px) takes tiles in multiples of"),
    ],
)
def test_what_does_not_go_with_a_bundle_is_one_sentence(bundled, flags, message):
    done = serve(bundled, *flags)
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("flag", "value"), [("--provider", "CPUExecutionProvider"),
                                             ("--threads", "1")])  # fmt: skip
def test_what_is_a_bundles_is_refused_of_a_run(tmp_path, flag, value):
    write_stage(tmp_path / "run", 1)
    done = serve(tmp_path / "run", flag, value)
    assert done.exit_code == 2 and f"{flag} {value}: is a bundle's, and" in done.output


def test_only_the_first_stages_are_served_where_that_is_asked(bundled):
    with served(bundled, unet_limit=1) as server:
        assert pixels(ask(server, prompt="sun", steps=1).json()["data"][0]["b64_json"]).shape == (
            16, 16, 3
        )  # fmt: skip
        assert ask(server, prompt="sun", size="32x32").status_code == 400


def test_a_bundle_that_is_not_whole_ends_it_in_one_sentence(bundled, tmp_path):
    folder = edited(bundled, tmp_path / "bundle", lambda facts: facts.pop("stages"))
    done = serve(folder)
    assert done.exit_code == 1 and "bundle.json: is damaged" in done.output
    assert "Traceback" not in done.output


def test_without_the_runtime_the_remedy_is_said(bundled, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagen_scale_runtime", None)
    done = serve(bundled)
    assert done.exit_code == 2 and "run pip install ./export/runtime" in done.output


def test_another_version_of_the_runtime_is_refused(bundled, monkeypatch):
    monkeypatch.setattr("imagen_scale_runtime.__version__", "0.0.9")
    done = serve(bundled)
    assert done.exit_code == 2 and "its version 0.0.9 beside imagen-scale" in done.output
