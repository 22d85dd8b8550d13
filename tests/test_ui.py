"""The page that samples a run: over real HTTP, and in a real browser where there is one."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import ROOT
from support.doc_commands import Checker, Command
from support.tiny import write_run

from imagen_scale.commands.main import main
from imagen_scale.ui.generation import (
    Drawn,
    Failed,
    Generator,
    Made,
    Request,
    Said,
    Step,
    Stopped,
    Stopping,
)
from imagen_scale.ui.history import MOST_SHOWN, Facts, read_history
from imagen_scale.ui.shell_line import sample_command

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip
needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium on this machine and none on PyPI: the page is tested over HTTP alone",
)
SETTINGS = {"steps": [4, 3], "cond_scale": [3.0, 1.0], "sampler": "dpmpp_2m",
            "spacing": "trailing"}  # fmt: skip
SLOW = SETTINGS | {"steps": [100, 100], "sampler": "heun"}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "tiny"
    write_run(folder)
    return folder


def request(prompt="sun", *, negative="", seed=0, settings=SETTINGS, runtime="torch"):
    options = {"seed": seed, "negative_prompt": negative, **settings}
    return Request(prompt, options, runtime)


def events(run, asked):
    return list(Generator(run).generate(asked, threading.Event()))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def sample(*words):
    done = CliRunner().invoke(main, [*words])
    assert done.exit_code == 0, done.output


# What makes a picture ----------------------------------------------------------------------------


def test_both_stages_are_told_step_by_step_and_the_picture_is_the_commands(run, tmp_path):
    told = events(run, request(negative="pizza", seed=5))
    steps = [event for event in told if isinstance(event, Step)]
    assert {step.unet: (step.steps, step.image.shape) for step in steps} == {
        1: (4, (16, 16, 3)), 2: (3, (32, 32, 3))
    }  # fmt: skip
    assert [step.done for step in steps if step.unet == 2][-1] == 3
    made = told[-1]
    assert isinstance(made, Made) and made.path.parent == run / "samples"
    np.testing.assert_array_equal(pixels(made.path), steps[-1].image)
    facts = json.loads(made.path.with_suffix(".json").read_text())
    sample("sample", "sun", "--negative-prompt", "pizza", "--run", str(run), "--seed", "5",
           "--steps", "4,3", "--runtime", "torch", "--out", str(tmp_path / "out"))  # fmt: skip
    (file,) = (tmp_path / "out").glob("0*.json")
    assert json.loads(file.read_text()) == facts
    np.testing.assert_array_equal(pixels(file.with_suffix(".png")), pixels(made.path))


def test_an_export_is_sampled_with_guidance_in_whole_numbers_as_a_page_sends_them(
    exported, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(exported, run)
    whole = SETTINGS | {"cond_scale": [3, 1]}
    made = [events(run, request(settings=whole, runtime=name))[-1] for name in ("torch", "onnx")]
    assert all(isinstance(one, Made) for one in made), made
    theirs, ours = (pixels(one.path).astype(int) for one in made)
    assert np.abs(ours - theirs).max() <= 1


def test_auto_says_what_it_took(run):
    told = events(run, request(runtime="auto"))
    said = [event.sentence for event in told if isinstance(event, Said)]
    assert [sentence.partition(":")[0] for sentence in said] == ["U-Net 1", "U-Net 2"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(seed=None), "seed: a whole number from 0 on"),
        (request(seed=-1), "seed: a whole number from 0 on"),
        (request(settings=SETTINGS | {"steps": [4, None]}), "steps: a number is needed"),
        (request(settings=SETTINGS | {"cond_scale": [None, 1]}), "guidance: a number is needed"),
        (request(settings=SETTINGS | {"steps": [4, 0]}), "steps 0: it should be"),
        (request(settings=SETTINGS | {"cond_scale": [1, 1]}, negative="pizza"), "is none"),
        (request(runtime="onnx"), "has no onnx export"),
    ],
)
def test_what_cannot_be_made_is_said_and_leaves_nothing(run, asked, message):
    told = events(run, asked)
    assert isinstance(told[-1], Failed) and message in told[-1].message
    assert not list(run.glob("samples/*"))


def test_a_fault_of_ours_is_told_and_the_next_picture_is_made(run, monkeypatch, capsys):
    generator = Generator(run)
    with monkeypatch.context() as patch:
        patch.setattr("imagen_scale.sampling.stage.sample", lambda *args, **options: 1 / 0)
        (*_, last) = generator.generate(request(), threading.Event())
    assert isinstance(last, Failed) and "ZeroDivisionError" in last.message
    assert "Traceback" in capsys.readouterr().err
    (*_, last) = generator.generate(request(), threading.Event())
    assert isinstance(last, Made)


def test_stopping_acts_after_the_step_and_keeps_nothing(run):
    stop, told = threading.Event(), []
    for event in Generator(run).generate(request(settings=SLOW), stop):
        told.append(event)
        if isinstance(event, Step):
            stop.set()
    assert isinstance(told[-1], Stopped)
    assert all(event.unet == 1 for event in told if isinstance(event, Step))
    assert not list(run.glob("samples/*.png"))


def test_a_long_step_does_not_hide_that_the_stop_was_heard(run, monkeypatch):
    """No clock is compared: the step ends only after it has been said."""
    heard, stop = threading.Event(), threading.Event()
    monkeypatch.setattr(
        "imagen_scale.sampling.stages.TrainedStages.load", lambda *args, **how: heard.wait(60)
    )
    stop.set()
    told = []
    for event in Generator(run).generate(request(), stop):
        told.append(event)
        heard.set()
    assert isinstance(told[0], Stopping)


def test_all_pictures_are_made_in_one_thread(run, monkeypatch):
    """What torch.compile records for a card belongs to the thread that recorded it."""
    threads, make = [], Generator._make

    def spy(self, *inputs):
        threads.append(threading.get_ident())
        return make(self, *inputs)

    monkeypatch.setattr(Generator, "_make", spy)
    generator = Generator(run)
    for _ in range(2):
        events = list(generator.generate(request(), threading.Event()))
        assert isinstance(events[-1], Made)
    assert threads[0] == threads[1] != threading.get_ident()


def test_never_two_at_once_and_a_listener_that_leaves_ends_it(run):
    generator = Generator(run)
    first = generator.generate(request(settings=SLOW), threading.Event())
    assert isinstance(next(first), Said | Step)
    (refused,) = generator.generate(request(), threading.Event())
    assert "another picture is being made" in refused.message
    first.close()
    assert not list(run.glob("samples/*.png"))
    (*_, last) = generator.generate(request(), threading.Event())
    assert isinstance(last, Made)


def test_a_sheet_is_the_commands(run, tmp_path):
    asked = request(settings={"steps": [2, 1], "cond_scale": [3.0, 1.0]}, seed=4)
    told = events(run, asked._replace(varied={"cond_scale": "1, 4", "steps": "1,2"}))
    assert [event.done for event in told if isinstance(event, Drawn)] == [0, 1, 2, 3]
    made = told[-1]
    assert isinstance(made, Made) and made.path == run / "samples" / "sheet_00001.png"
    sample("sheet", "sun", "--run", str(run), "--cond-scale", "1,4", "--steps", "1,2", "--seed",
           "4", "--runtime", "torch", "--out", str(tmp_path / "out.png"))  # fmt: skip
    theirs = json.loads((tmp_path / "out.json").read_text())
    ours = json.loads(made.path.with_suffix(".json").read_text())
    assert {str(one) for row in ours["pictures"] for one in row} == {
        str(one) for row in theirs["pictures"] for one in row
    }
    for varied, message in (({}, "a sheet compares several values"),
                            ({"steps": "many"}, "steps 'many': write numbers"),
                            ({"checkpoint": "all,1"}, "has no checkpoint")):  # fmt: skip
        told = events(run, asked._replace(varied=varied))
        assert isinstance(told[-1], Failed) and message in told[-1].message


def test_a_sheet_is_stopped_between_two_pictures(run):
    stop, told = threading.Event(), []
    asked = request()._replace(varied={"seed": "1,2,3"})
    for event in Generator(run).generate(asked, stop):
        told.append(event)
        if isinstance(event, Drawn):
            stop.set()
    assert isinstance(told[-1], Stopped) and not list(run.glob("samples/*"))


# History and its commands ------------------------------------------------------------------------


def test_the_history_is_what_lies_in_the_folder_newest_first(run):
    assert read_history(run / "samples").entries == []
    sample("sample", "sun", "key", "--run", str(run), "--steps", "1", "--seed", "4")
    events(run, request("pizza"))
    samples = run / "samples"
    (samples / "00009_abcdef01.png").write_bytes(b"")  # its facts are missing
    (samples / "00008_abcdef01.png").write_bytes(b"")
    (samples / "00008_abcdef01.json").write_text('{"prompt": 1}')
    found = read_history(samples)
    assert [(one.facts.prompt, one.facts.seed) for one in found.entries] == [
        ("pizza", 0), ("key", 4), ("sun", 4)
    ]  # fmt: skip
    assert found.total == 5
    assert re.search("00009.*is missing", found.problems[0])
    assert re.search("00008.*damaged: prompt", found.problems[1])


def test_of_many_pictures_the_newest_are_shown(tmp_path):
    facts = {"prompt": "sun", "seed": 0, "stages": [
        {"steps": 1, "cond_scale": 3, "sampler": "ddim", "spacing": "linear"}]}  # fmt: skip
    for number in range(1, MOST_SHOWN + 5):
        path = tmp_path / f"{number:05d}_0.png"
        path.write_bytes(b"")
        path.with_suffix(".json").write_text(json.dumps(facts | {"seed": number}))
    found = read_history(tmp_path)
    assert (len(found.entries), found.total) == (MOST_SHOWN, MOST_SHOWN + 4)
    assert found.entries[0].facts.seed == MOST_SHOWN + 4


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "3,2", "--seed", "7"],
        ["--steps", "3,2", "--cond-scale", "2.5,-1", "--sampler", "ddim,heun", "--eta", "0.5,0",
         "--spacing", "linear", "--threshold", "0.8", "--tile", "16", "--negative-prompt",
         "-no 'key'", "--unet-limit", "2", "--guidance-interval", "0.5:1,none",
         "--cache-interval", "1,2"],
        ["--steps", "2", "--unet-limit", "1", "--precision", "bf16"],
    ],
    ids=["usual", "every option", "one stage"],
)  # fmt: skip
@pytest.mark.parametrize("prompt", ["red heart", '--it\'s "a" $HOME'])
def test_the_command_of_a_picture_makes_it_again(run, tmp_path, words, prompt):
    words = [word if not word.startswith("-no") else f"--negative-prompt={word}" for word in words
             if word != "--negative-prompt"]  # fmt: skip
    sample("sample", "--run", str(run), *words, "--runtime", "torch", "--", prompt)
    (entry,) = read_history(run / "samples").entries
    command = sample_command(entry.facts, run, num_unets=2, thresholds=[0.9, 0.9])
    parsed = shlex.split(command)
    Checker().check(Command(parsed, "history"))
    at = 2 if parsed[2] == prompt else parsed.index("--run")
    out = ["--out", str(tmp_path / "again")]
    sample(*parsed[1:at], *out, *parsed[at:])
    (again,) = (tmp_path / "again").glob("0*.png")
    np.testing.assert_array_equal(pixels(again), pixels(entry.path))
    assert json.loads(again.with_suffix(".json").read_text()) == json.loads(
        entry.path.with_suffix(".json").read_text()
    )


@given(prompt=st.text(min_size=1), negative=st.none() | st.text())
def test_any_prompt_survives_the_command_line(tmp_path_factory, prompt, negative):
    facts = Facts.model_validate(
        {"prompt": prompt, "negative_prompt": negative, "seed": 0, "stages": [
            {"steps": 1, "cond_scale": 3, "sampler": "ddim", "spacing": "linear",
             "runtime": "onnxruntime 1.0 (CPU)"}]}
    )  # fmt: skip
    line = sample_command(
        facts, ROOT / "a run", num_unets=1, thresholds=[0.9], allow_unfinished=True
    )
    words = shlex.split(line)
    context = main.commands["sample"].make_context("sample", words[2:])
    assert context.params["prompts"] == (prompt,)
    assert context.params["negative_prompt"] == (negative or None)
    assert context.params["run"] == str(ROOT / "a run")
    assert (context.params["runtime"], context.params["allow_unfinished"]) == ("onnx", True)


# The command -------------------------------------------------------------------------------------


def test_without_the_extra_the_remedy_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(main, ["ui", "--run", str(run)])
    assert done.exit_code == 2
    assert "pip install 'imagen-scale[ui]'" in done.output and "Traceback" not in done.output


def test_a_port_in_use_is_one_sentence(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["ui", "--run", str(run), "--port", str(port)])
    assert done.exit_code == 1
    assert re.search(
        rf"error: 127.0.0.1:{port} cannot be used: another program .* --port 0", done.output
    )
    assert "Traceback" not in done.output


def test_a_run_that_is_none_is_one_sentence():
    done = CliRunner().invoke(main, ["ui", "--run", "nowhere", "--port", "0"])
    assert (done.exit_code, "nowhere: not a run folder" in done.output) == (2, True)


# The page over HTTP ------------------------------------------------------------------------------

# Writes down every address that the program wants to reach, by name or by number.
WATCHED = """
import sys
def watch(event, facts):
    if event == "socket.getaddrinfo":
        name = facts[0]
    elif event == "socket.connect":
        name = facts[1][0] if isinstance(facts[1], tuple) else "127.0.0.1"
    else:
        return
    if name not in (None, "127.0.0.1", b"127.0.0.1", "localhost", "::1"):
        with open(sys.argv[1], "a") as file:
            file.write(f"{event} {name}\\n")
sys.addaudithook(watch)
from imagen_scale.commands.main import main
main(sys.argv[2:])
"""


class Served:
    """A page that is served by the real command."""

    def __init__(self, process, address, run, reached):
        self.process, self.address, self.run, self.reached = process, address, run, reached

    @property
    def pictures(self):
        return sorted(self.run.glob("samples/0*.png"))


@contextmanager
def served(folder):
    run, reached = folder / "tiny", folder / "reached.txt"
    write_run(run)
    reached.write_text("")
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, reached, "ui", "--run", run, "--port", "0", "--no-open",
         "--runtime", "torch"],
        stderr=subprocess.PIPE, text=True,
        # The page fetches nothing, so that no proxy is its business.
        env=os.environ | {"OMP_NUM_THREADS": "1", "ALL_PROXY": "socks5://127.0.0.1:9",
                          "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + process.stderr.read()
        yield Served(process, address[0], run, reached)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with served(tmp_path_factory.mktemp("page")) as one:
        yield one


def values(
    prompt="sun", *, negative="", seed=0, steps=(3, 2), scales=(3.0, 1.0), interval="", cache=1
):  # fmt: skip
    folded = ("dpmpp_2m", "trailing", 0.0, None, interval, cache)
    return (prompt, "torch", negative, *steps, *scales, seed, *folded)


@pytest.fixture
def client(page):
    from gradio_client import Client

    one = Client(page.address, verbose=False, download_files=False, analytics_enabled=False)
    yield one
    one.close()


def test_a_picture_is_made_over_http(page, client):
    before = len(page.pictures)
    asked = values(negative="pizza", seed=3, interval="0.5:1", cache=2)
    job = client.submit(*asked, api_name="/generate")
    job.result(timeout=120)
    told = [str(output) for output in job.outputs()]
    assert all(any(f'data-unet="{unet}" data-done="{last}"' in one for one in told)
               for unet, last in ((1, 3), (2, 2)))  # fmt: skip
    assert "kept as" in told[-1] and "imagen-scale sample sun" in told[-1]
    assert len(page.pictures) == before + 1
    facts = json.loads(page.pictures[-1].with_suffix(".json").read_text())
    assert (facts["prompt"], facts["negative_prompt"], facts["seed"]) == ("sun", "pizza", 3)
    first = facts["stages"][0]
    assert (first["guidance_interval"], first["cache_interval"]) == ("0.5:1", 2)


def test_a_sheet_is_made_over_http(page, client):
    varied = ["Guidance", "1, 3", "Steps", ""]
    job = client.submit(*values(seed=3), *varied, api_name="/sheet")
    job.result(timeout=120)
    told = [str(output) for output in job.outputs()]
    assert "Picture 2 of 2" in "".join(told) and "kept as" in told[-1]
    assert 'src="gradio_api/file=' in told[-1] and "sheet_0" in told[-1]


def test_an_error_is_a_message_of_the_page(page, client):
    before = len(page.pictures)
    for wrong, message in (
        (values(seed=-1), "seed: a whole number from 0 on"),
        (values(negative="key", scales=(1.0, 1.0)), "every guidance is 1"),
        (values(steps=(0, 2)), "steps 0: it should be"),
    ):
        (status, *_) = client.predict(*wrong, api_name="/generate")
        assert 'role="alert"' in status and message in status
    assert len(page.pictures) == before


def test_stop_over_http(page, client):
    before = len(page.pictures)
    job = client.submit(*values(steps=(100, 100)), api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    client.predict(api_name="/stop")
    assert "Stopped; nothing was kept" in str(job.result(timeout=120))
    assert len(page.pictures) == before


def test_two_pages_take_turns(page, client):
    from gradio_client import Client

    before = len(page.pictures)
    other = Client(page.address, verbose=False, download_files=False, analytics_enabled=False)
    jobs = [one.submit(*values(steps=(20, 20)), api_name="/generate") for one in (client, other)]
    for job in jobs:
        assert "kept as" in str(job.result(timeout=120))
    assert len(page.pictures) == before + 2
    other.close()


def test_it_answers_this_machine_alone(page):
    import httpx

    answer = httpx.get(page.address)
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and policy.startswith("default-src 'self';")
    assert "http" not in policy
    assert httpx.get(page.address, headers={"host": "elsewhere.example"}).status_code == 400
    theme = httpx.get(f"{page.address}/theme.css?v=1").text
    assert "system-ui" in theme and "googleapis" not in theme
    # Only pictures of the run are handed out.
    for path in ("config.json", "unet1/inference.safetensors"):
        file = page.run / path
        assert httpx.get(f"{page.address}/gradio_api/file={file}").status_code == 403
    port = int(page.address.rpartition(":")[2])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    for other in others - {"127.0.0.1", "127.0.1.1", "::1"}:
        with socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET) as probe:
            assert probe.connect_ex((other, port)) != 0


def test_ctrl_c_ends_it_in_one_line_even_while_it_works(tmp_path):
    from gradio_client import Client

    with served(tmp_path) as one:
        client = Client(one.address, verbose=False, download_files=False, analytics_enabled=False)
        job = client.submit(*values(steps=(100, 100)), api_name="/generate")
        while not job.outputs():
            time.sleep(0.02)
        one.process.send_signal(signal.SIGINT)
        error = one.process.communicate(timeout=60)[1]
        assert one.process.returncode == 130, error
        assert error.split() == ["interrupted"]
        assert not one.pictures and one.reached.read_text() == ""


# The page in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield one
        one.close()


@pytest.fixture
def tab(page, browser):
    """The page, opened; at the end it has asked nobody else and had no error."""
    one = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong, asked = [], set()
    one.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("request", lambda request: asked.add(request.url))
    one.set_default_timeout(60_000)
    one.goto(page.address)
    one.wait_for_selector("#prompt textarea")
    yield one
    one.close()
    assert not wrong
    assert all(url.startswith((page.address, "data:", "blob:")) for url in asked), asked


def ask(tab, prompt, *, steps=(3, 2), seed=None):
    tab.fill("#prompt textarea", prompt)
    for unet, count in enumerate(steps, start=1):
        tab.fill(f"#steps{unet} input", str(count))
    if seed is not None:
        tab.fill("#seed input", str(seed))
    tab.evaluate("window.before = document.querySelector('#status').innerText")
    tab.click("#start")


def finished(tab):
    # The words of the picture before name another file.
    tab.wait_for_function("""() => document.querySelector("#status .is-good")
        && document.querySelector("#status").innerText !== window.before""")
    tab.wait_for_selector("#start:not([disabled])")


@needs_browser
def test_a_picture_in_the_browser_with_both_stages_as_they_denoise(page, tab):
    tab.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            for (const stage of document.querySelectorAll(".is-stage")) {
                const now = stage.dataset.unet + ":" + stage.dataset.done;
                if (stage.querySelector("img") && !window.seen.includes(now)) window.seen.push(now);
            }
        }).observe(document.body, {subtree: true, childList: true, attributes: true});
    }""")
    before = len(page.pictures)
    ask(tab, "red heart", steps=(40, 40), seed=11)
    finished(tab)
    seen = tab.evaluate("window.seen")
    assert {"1:40", "2:40"} <= set(seen)
    assert min(sum(one.startswith(f"{unet}:") for one in seen) for unet in (1, 2)) > 3, seen
    sizes = tab.evaluate("""() => [...document.querySelectorAll(".is-stage img")]
        .map(image => [image.naturalWidth, image.complete])""")
    assert sizes == [[16, True], [32, True]]
    # On disk as the command line leaves it, and the first of the history.
    assert len(page.pictures) == before + 1
    newest = page.pictures[-1]
    tab.wait_for_function(
        "name => document.querySelector('#history img')?.src.includes(name)", arg=newest.name
    )
    assert tab.locator("#history button.thumbnail-item, #history .gallery-item").count() >= 1
    command = " ".join(tab.locator("#command .cm-line").all_inner_texts())
    assert "imagen-scale sample 'red heart' --run" in command and "--seed 11" in command
    assert tab.evaluate("document.querySelector('#details img').naturalWidth") == 32


@needs_browser
def test_an_error_in_the_browser_and_the_page_goes_on(page, tab):
    ask(tab, "sun")
    finished(tab)
    tab.fill("#steps1 input", "")
    tab.click("#start")
    tab.wait_for_selector("#status [role=alert]:has-text('a number is needed')")
    tab.wait_for_selector("#start:not([disabled])")
    ask(tab, "sun")
    finished(tab)


@needs_browser
def test_stop_in_the_browser(page, tab):
    before = len(page.pictures)
    ask(tab, "sun", steps=(100, 100))
    tab.wait_for_selector(".is-stage[data-unet='1'] img")
    assert tab.is_disabled("#start")
    tab.click("#stop")
    tab.wait_for_selector("#status :text('Stopped')")
    tab.wait_for_selector("#start:not([disabled])")
    assert tab.is_disabled("#stop") and len(page.pictures) == before
    ask(tab, "sun")
    finished(tab)


@needs_browser
def test_a_page_that_is_closed_leaves_the_model_to_the_next(page, browser, tab):
    other = browser.new_page()
    other.goto(page.address)
    other.wait_for_selector("#prompt textarea")
    ask(other, "sun", steps=(100, 100))
    other.wait_for_selector(".is-stage[data-unet='1'] img")
    other.close()
    ask(tab, "key")
    finished(tab)


@needs_browser
def test_the_history_gives_settings_back_and_prompts_are_text(page, tab):
    evil = "<img src=x onerror='window.evil = 1'><b>bold</b>"
    ask(tab, evil, seed=21)
    finished(tab)
    ask(tab, "key", steps=(2, 1), seed=22)
    finished(tab)
    tab.wait_for_selector("#history .grid-container button >> nth=0 >> text=key")
    assert tab.evaluate("document.querySelectorAll('#details b').length") == 0
    tab.click("#history .grid-container button >> nth=1")
    tab.wait_for_selector("#details dd:has-text('onerror')")
    tab.click("#reuse")
    tab.wait_for_function("() => document.querySelector('#seed input').value === '21'")
    assert tab.input_value("#prompt textarea") == evil
    assert tab.input_value("#steps1 input") == "3"
    assert tab.evaluate("window.evil === undefined")
    tab.reload()  # the history is what lies on disk
    tab.wait_for_selector("#history .grid-container button >> nth=1")


@needs_browser
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_stands_out_of_a_narrow_window(tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_nobody_else_was_asked(page, client):
    """The last of the file: all of the tests above have used the page."""
    client.predict(*values(), api_name="/generate")
    assert page.process.poll() is None
    assert page.reached.read_text() == ""
