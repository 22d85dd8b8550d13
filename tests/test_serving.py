"""A run behind HTTP: OpenAI's client, many callers at once, and what must not happen to any."""

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import openai
import pytest
import torch
from click.testing import CliRunner
from support import ROOT
from support.doc_commands import BLOCK
from support.serving import (
    Served,
    ask,
    assert_alike,
    assert_computed_together,
    client_of,
    pixels,
    served,
    until,
)
from support.tiny import write_run, write_stage

from imagen_scale.commands.listening import listen
from imagen_scale.commands.main import main
from imagen_scale.data.network import LOCALHOST
from imagen_scale.errors import CardProblem
from imagen_scale.sampling.cascade import Cascade
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.serving.app import application
from imagen_scale.serving.engine import Engine
from imagen_scale.serving.limits import Limits
from imagen_scale.serving.run import ServedRun
from imagen_scale.serving.server import KEY_VARIABLE, api_key, hosts_of, serve

PROMPTS = ("sun", "key", "red heart", "a pizza on the house")
LONG = " ".join(["rocket"] * 20)  # more than max_text_len


@pytest.fixture(scope="module")
def server(run):
    with served(run, limits=Limits(pictures=4, steps=99, prompt=200, body=2**12)) as one:
        until(lambda: one.engine.state == "ready")
        yield one


@pytest.fixture(scope="module")
def cascade(run):
    with Cascade.load(run, runtime="torch", say=print) as one:
        yield one


@pytest.fixture
def client(server):
    with client_of(server) as one:
        yield one


# OpenAI's client ---------------------------------------------------------------------------------


def test_pictures_are_those_of_the_cascade(client, cascade):
    made = client.images.generate(
        prompt="red heart", n=2, size="32x32", user="somebody", model="tiny",
        response_format="b64_json",
        extra_body={"seed": 5, "steps": [3, 2], "cond_scale": [2.5, 1.5], "sampler": "ddim",
                    "spacing": "linear", "eta": 0.5, "threshold": 0.9,
                    "negative_prompt": "pizza"},
    )  # fmt: skip
    expected = cascade.sample(
        "red heart", num=2, seed=5, steps=[3, 2], cond_scale=[2.5, 1.5], sampler="ddim",
        spacing="linear", eta=0.5, threshold=0.9, negative_prompt="pizza",
    )  # fmt: skip
    assert [one.seed for one in made.data] == [5, 6] and made.created > 0
    for one, image in zip(made.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(one.b64_json), np.asarray(image))


def test_the_first_stage_alone_ends_the_cascade_there(client, cascade):
    (made,) = client.images.generate(
        prompt="sun", size="16x16", extra_body={"steps": 3, "seed": 1}
    ).data
    (whole,) = cascade.stream("sun", steps=3, seed=1)
    np.testing.assert_array_equal(pixels(made.b64_json), np.asarray(whole.stages[0]))


def test_a_seed_is_drawn_and_told_and_makes_the_picture_again(client):
    def one(**more):
        return client.images.generate(prompt="sun", extra_body={"steps": 2, **more}).data[0]

    first, second = one(), one()
    assert first.seed != second.seed and first.b64_json != second.b64_json
    assert one(seed=first.seed).b64_json == first.b64_json


def test_what_is_not_read_of_a_prompt_is_told(client):
    (made,) = client.images.generate(prompt=LONG, extra_body={"steps": 1}).data
    assert [(lost["option"], lost["unet"], lost["read"]) for lost in made.not_read] == [
        ("prompt", 1, 8), ("prompt", 2, 8)
    ]  # fmt: skip
    (made,) = client.images.generate(prompt="sun", extra_body={"steps": 1}).data
    assert made.not_read == []


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "imagen-scale"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny' alone"):
        client.models.retrieve("../../etc/passwd")


def test_steps_are_told_in_order_and_then_the_pictures(client, cascade):
    events = list(
        client.images.generate(
            prompt="sun", n=2, stream=True, extra_body={"steps": [3, 2], "seed": 0}
        )
    )
    expected = [(unet, step, steps) for unet, steps in ((1, 3), (2, 2))
                for step in range(1, steps + 1)]  # fmt: skip
    for index, image in enumerate(cascade.sample("sun", num=2, steps=[3, 2])):
        *steps, last = [event for event in events if event.index == index]
        assert {event.type for event in steps} == {"image_generation.progress"}
        assert [(event.unet, event.step, event.steps) for event in steps] == expected
        assert (last.type, last.seed, last.size, last.output_format) == (
            "image_generation.completed", index, "32x32", "png"
        )  # fmt: skip
        np.testing.assert_array_equal(pixels(last.b64_json), np.asarray(image))


def test_an_error_in_a_stream_is_openais(client):
    with pytest.raises(openai.APIError, match="numbers that are not finite"):
        list(client.images.generate(prompt="sun", stream=True, extra_body={"cond_scale": 1e38}))


def test_the_document_works_as_it_is_written(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    text = text.replace("http://127.0.0.1:8000", server.address)
    lines = [line for language, body in BLOCK.findall(text) if language == "bash"
             for line in body.splitlines() if line.startswith("curl")]  # fmt: skip
    told = [subprocess.run([*shlex.split(line), "--noproxy", "*"], check=True, capture_output=True,
                           text=True).stdout for line in lines]  # fmt: skip
    assert len(json.loads((tmp_path / "answer.json").read_text())["data"]) == 2
    models, events, health, ready, metrics, with_key = told[1:]
    assert json.loads(models) == json.loads(with_key) and "tiny" in models
    assert events.count("image_generation.progress") == 100 and events.endswith("[DONE]\n\n")
    assert "ok" in health and "ready" in ready and "imagen_scale_queue_pictures 0.0" in metrics
    for language, body in BLOCK.findall(text):
        if language == "python":
            exec(body, {})
    assert {path.name for path in tmp_path.glob("*.png")} == {"5.png", "6.png"}
    assert "0 1 1 25\n" in capsys.readouterr().out
    told_metrics = set(re.findall(r"^\| `(imagen_scale_\w+)", text, re.M))
    assert told_metrics <= set(re.findall(r"^(imagen_scale_\w+?)(?:_bucket)?[{ ]", metrics, re.M))


# Company -----------------------------------------------------------------------------------------


def test_equal_settings_are_computed_together_whoever_asks(run, cascade):
    asked = [
        {"prompt": "sun", "seed": 1, "steps": 2, "cond_scale": 3.0},
        {"prompt": LONG, "seed": 2, "steps": 2, "cond_scale": 1.5},
        {"prompt": "key", "seed": 3, "steps": 2, "cond_scale": [4.0, 1.0]},
        {"prompt": "key", "seed": 3, "steps": 3, "cond_scale": 3.0},  # other steps
        {"prompt": "key", "seed": 4, "steps": 2, "cond_scale": 1.0},  # half the work
        {"prompt": "key", "seed": 4, "steps": 2, "negative_prompt": "sun"},
    ]
    assert_computed_together(run, asked, cascade)


def test_no_batch_is_larger_than_asked(run):
    with served(run, works=False, max_batch=2) as server, ThreadPoolExecutor() as callers:
        answer = callers.submit(ask, server, prompt="sun", n=5, steps=1, size="16x16")
        until(lambda: len(server.engine.waiting) == 5)
        server.engine.start()
        assert [one["seed"] for one in answer.result().json()["data"]][1:]
        assert server.metric("batch_pictures_count") == 3
        assert server.metric('batch_pictures_bucket{le="2.0"}') == 3


def test_one_that_cannot_be_computed_takes_no_other_along(run, cascade, capsys):
    scales = (3.0, 1e38, 2.0, 1.5)
    with served(run, works=False) as server, ThreadPoolExecutor() as callers:
        answers = [callers.submit(ask, server, prompt="sun", seed=0, steps=2, cond_scale=scale)
                   for scale in scales]  # fmt: skip
        until(lambda: len(server.engine.waiting) == len(scales))
        server.engine.start()
        first, poisoned, *others = [answer.result() for answer in answers]
        assert "error: U-Net 1: torch fp32" in capsys.readouterr().err
        assert poisoned.status_code == 500 and "not finite" in poisoned.json()["error"]["message"]
        assert server.metric('pictures_total{outcome="failed"}') == 1
        assert server.metric("batch_pictures_count") == 1
    for answer, scale in zip([first, *others], (3.0, 2.0, 1.5), strict=True):
        (image,) = cascade.sample("sun", steps=2, cond_scale=scale)
        assert_alike(answer.json()["data"][0]["b64_json"], image)


def test_large_stages_are_computed_in_tiles_where_the_server_says_so(run, cascade):
    with served(run, tile=16) as server:
        (made,) = ask(server, prompt="sun", seed=0, steps=2).json()["data"]
    (tiled,), (whole,) = (cascade.sample("sun", steps=2, tile=tile) for tile in (16, None))
    np.testing.assert_array_equal(pixels(made["b64_json"]), np.asarray(tiled))
    assert (np.asarray(tiled) != np.asarray(whole)).any()


def test_two_hundred_callers_get_each_their_own(run):
    each = 50
    with Cascade.load(run, unet_limit=1, runtime="torch") as cascade:
        expected = iter(cascade.sample(PROMPTS, num=each, steps=2))

    async def all_of_them(server):
        async with openai.AsyncOpenAI(
            base_url=f"{server.address}/v1", api_key="any", max_retries=0,
            http_client=httpx.AsyncClient(trust_env=False, timeout=300),
        ) as client:  # fmt: skip
            return await asyncio.gather(*(
                client.images.generate(
                    prompt=prompt, size="16x16", extra_body={"seed": seed, "steps": 2}
                )
                for prompt in PROMPTS for seed in range(each)
            ))  # fmt: skip

    with served(run, patience_s=0.1) as server:
        answers = asyncio.run(all_of_them(server))
        assert server.metric('pictures_total{outcome="made"}') == len(answers) == 4 * each
        assert server.metric('requests_total{status="200"}') == 4 * each
        assert server.metric("batch_pictures_sum") == 4 * each
        assert server.metric("batch_pictures_count") < 2 * each  # together, most of them
    for answer in answers:
        (made,) = answer.data
        assert_alike(made.b64_json, next(expected))
    assert [answer.data[0].seed for answer in answers] == [*range(each)] * 4


# More than there is room for, and callers who leave ----------------------------------------------


def test_a_full_queue_says_when_to_come_again(run):
    with served(run, works=False, queue=3) as server, ThreadPoolExecutor() as callers:
        accepted = callers.submit(ask, server, prompt="sun", n=2, steps=1)
        until(lambda: len(server.engine.waiting) == 2)
        refused = ask(server, prompt="sun", n=2, steps=1)  # all of a request, or nothing
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        error = refused.json()["error"]
        assert error["type"] == "rate_limit_error" and error["code"] == "rate_limit_exceeded"
        assert "2 pictures are waiting, and 3 may" in error["message"]
        with client_of(server) as client, pytest.raises(openai.RateLimitError):
            client.images.generate(prompt="sun", n=2)
        assert server.metric("queue_pictures") == 2
        server.engine.start()
        assert len(accepted.result().json()["data"]) == 2
        assert len(ask(server, prompt="sun", n=3, steps=1).json()["data"]) == 3


def send(server, **body):
    """A request on a line of its own, which the caller may cut."""
    text = json.dumps(body).encode()
    port = int(server.address.rpartition(":")[2])
    line = socket.create_connection(("127.0.0.1", port))
    line.sendall(
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        b"application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
    )
    return line


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_of_a_caller_who_left_are_never_begun(run, stream):
    with served(run, works=False) as server:
        line = send(server, prompt="sun", n=3, stream=stream)
        until(lambda: len(server.engine.waiting) == 3)
        line.close()
        until(lambda: len(server.engine.waiting) == 0)
        until(lambda: server.metric('pictures_total{outcome="dropped"}') == 3)
        server.engine.start()
        assert ask(server, prompt="sun", steps=1).status_code == 200
        assert server.metric('pictures_total{outcome="made"}') == 1
        if not stream:
            assert server.metric('requests_total{status="499"}') == 1


def test_a_caller_who_leaves_in_the_middle_ends_the_work(server):
    before = server.metric('pictures_total{outcome="dropped"}')
    line = send(server, prompt="sun", stream=True, steps=99)
    while b"image_generation.progress" not in line.recv(4096):
        pass
    line.close()
    until(lambda: server.metric('pictures_total{outcome="dropped"}') == before + 1)
    assert ask(server, prompt="sun", steps=1).status_code == 200


def test_a_body_that_breaks_off_is_a_caller_who_left(server, capsys):
    before = left_in_the_middle(server)
    line = socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])))
    line.sendall(
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        b'application/json\r\nContent-Length: 99\r\n\r\n{"prompt": '
    )
    line.close()
    until(lambda: left_in_the_middle(server) == before + 1)
    assert capsys.readouterr().err == ""


def left_in_the_middle(server):
    with suppress(KeyError):
        return server.metric('requests_total{status="499"}')
    return 0


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "the body is not JSON"),
        (b"\xff\xfe", 400, None, "the body is not JSON"),
        (b"[" * 3000, 400, None, "the body is not JSON"),
        (b'["sun"]', 400, None, "not a JSON object"),
        (b'{"prompt": "sun", "prompt": "key"}', 400, None, "'prompt' stands twice"),
        (b'{"prompt": "sun", "cond_scale": NaN}', 400, None, "NaN is not allowed"),
        (b'{"prompt": "sun", "cond_scale": 1e999}', 400, None, "1e999 is too large"),
        (b'{"prompt": "\\ud800"}', 400, None, "broken character"),
        (b'{"prompt": "' + b"s" * 5000 + b'"}', 413, None, "larger than 4096 bytes"),
        ({}, 400, "prompt", "there is none"),
        ({"prompt": None}, 400, "prompt", "there is none"),
        ({"prompt": ["sun"]}, 400, "prompt", "valid string"),
        ({"prompt": "s" * 201}, 400, "prompt", "201 characters; at most 200"),
        ({"prompt": "sun\x00"}, 400, "prompt", r"control character '\x00'"),
        ({"prompt": "sun", "negative_prompt": "\x1b[31m"}, 400, "negative_prompt", "control"),
        ({"prompt": "sun", "n": 10**9}, 400, "n", "n 1000000000: at most 4"),
        ({"prompt": "sun", "n": 0}, 400, "n", "greater than or equal to 1"),
        ({"prompt": "sun", "n": True}, 400, "n", "valid integer"),
        ({"prompt": "sun", "n": "2"}, 400, "n", "valid integer"),
        ({"prompt": "sun", "steps": 100}, 400, "steps", "steps 100: at most 99"),
        ({"prompt": "sun", "steps": 101}, 400, "steps", "has 100 times"),
        ({"prompt": "sun", "steps": [1, 2, 3]}, 400, "steps", "3 values for 2 stage"),
        ({"prompt": "sun", "steps": {"a": 1}}, 400, "steps", "steps {'a': 1}"),
        ({"prompt": "sun", "size": "0x0"}, 400, "size", "auto, 16x16, 32x32"),
        ({"prompt": "sun", "size": "1024x1024"}, 400, "size", "auto, 16x16, 32x32"),
        ({"prompt": "sun", "response_format": "url"}, 400, "response_format", "'b64_json'"),
        ({"prompt": "sun", "sampler": "euler"}, 400, "sampler", "'ddim'"),
        ({"prompt": "sun", "eta": 0.5}, 400, "eta", "goes with sampler ddim"),
        (b'{"prompt": "sun", "n": 1' + b"0" * 4000 + b"}", 400, "n", "at most 4"),
        ({"prompt": "sun", "cond_scale": 10**400}, 400, "cond_scale", "cond_scale"),
        ({"prompt": "sun", "eta": 10**400}, 400, "eta", "eta"),
        ({"prompt": "sun", "seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"prompt": "sun", "seed": 2**63 - 1, "n": 2}, 400, "seed", "above 2^63 - 1"),
        ({"prompt": "sun", "cond_scale": 1, "negative_prompt": "key"}, 400, "negative_prompt",
         "every cond_scale is 1"),
        ({"prompt": "sun", "quality": "high"}, 400, "quality", "unknown key; known are prompt, n"),
        ({"prompt": "sun", "at_once": 1}, 400, "at_once", "unknown key"),
        ({"prompt": "sun", "model": "../../etc/passwd"}, 404, "model", "'tiny' alone"),
    ],
)  # fmt: skip
def test_hostile_requests_are_refused_in_openais_words(server, body, status, param, message):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(
        server.images, content=raw, headers={"content-type": "application/json"}, trust_env=False
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"] and "\x1f" not in error["message"]
    assert len(error["message"]) <= 1000 and "Traceback" not in answer.text


def test_other_addresses_and_ways_are_openais_errors(server):
    for answer, status in (
        (httpx.get(f"{server.address}/v1/nothing", trust_env=False), 404),
        (httpx.get(server.images, trust_env=False), 405),
        (httpx.post(server.images, content=b'{"prompt": "sun"}', trust_env=False,
                    headers={"content-type": "text/plain"}), 400),
    ):  # fmt: skip
        assert answer.status_code == status and "message" in answer.json()["error"]
    # A page elsewhere whose name points here is not answered.
    for host, status in (("elsewhere.example", 400), ("localhost:80", 200), ("[::1]:80", 200)):
        answer = httpx.get(f"{server.address}/healthz", headers={"host": host}, trust_env=False)
        assert answer.status_code == status, host


def test_a_key_is_asked_for_where_there_is_one(run):
    with served(run, works=False, key="schlüssel") as server:
        known = {"authorization": "bearer schlüssel".encode()}
        answer = httpx.get(f"{server.address}/v1/models", headers=known, trust_env=False)
        assert answer.status_code == 200
        for wrong in ("wrong", "s", "schlüsselx", "ключ"):
            header = {"authorization": f"Bearer {wrong}".encode()}
            for path in ("/v1/images/generations", "/v1/models", "/metrics"):
                answer = httpx.request(
                    "POST" if "images" in path else "GET", server.address + path,
                    headers=header, trust_env=False,
                )  # fmt: skip
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.address}/healthz", trust_env=False).status_code == 200
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.images.generate(prompt="sun")


# Health ------------------------------------------------------------------------------------------


def test_a_key_from_a_file_may_end_in_a_line(monkeypatch):
    for kept, key in (("sesame\n", "sesame"), (" \n", None), ("", None)):
        monkeypatch.setenv(KEY_VARIABLE, kept)
        assert api_key() == key


def test_balancers_may_ask_with_head(server):
    for path, status in (("healthz", 200), ("nowhere", 404)):
        answer = httpx.head(f"{server.address}/{path}", trust_env=False)
        assert answer.status_code == status and answer.content == b""


def test_it_is_ready_once_its_stages_are_loaded(run):
    with served(run, works=False) as server:
        answer = httpx.get(f"{server.address}/readyz", trust_env=False)
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        server.engine.start()
        until(lambda: server.engine.state == "ready")
        assert httpx.get(f"{server.address}/readyz", trust_env=False).status_code == 200
        told = httpx.get(f"{server.address}/metrics", trust_env=False)
        assert told.headers["content-type"].startswith("text/plain")
        assert "imagen_scale_queue_pictures 0.0" in told.text


def test_a_fault_of_ours_is_said_to_the_terminal_alone(run, monkeypatch, capsys):
    with served(run) as server:
        until(lambda: server.engine.state == "ready")
        with monkeypatch.context() as patch:
            patch.setattr(TrainedStages, "encode", raising(RuntimeError("a secret")))
            answer = ask(server, prompt="sun")
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text and "its log says why" in answer.text
        assert ask(server, prompt="sun", steps=1).status_code == 200
    assert "RuntimeError: a secret" in capsys.readouterr().err


def test_a_dead_worker_is_seen_and_nobody_hangs(run, monkeypatch, capsys):
    with served(run) as server:
        until(lambda: server.engine.state == "ready")
        monkeypatch.setattr(TrainedStages, "encode", raising(SystemExit("gone")))
        for _ in range(2):
            answer = ask(server, prompt="sun", n=2)
            assert answer.status_code == 503 and "no more pictures" in answer.text
        ready = httpx.get(f"{server.address}/readyz", trust_env=False)
        assert (ready.status_code, ready.json()) == (503, {"status": "ended"})
        assert httpx.get(f"{server.address}/healthz", trust_env=False).status_code == 200
    assert "SystemExit: gone" in capsys.readouterr().err


def test_a_lost_card_ends_the_program(run, monkeypatch):
    stages = TrainedStages.load(run, runtime=RuntimeOptions(runtime="torch"))
    engine = Engine(ServedRun(stages), max_batch=4, patience_s=0.02, queue=8)
    app = application(engine, "tiny", limits=Limits(), key=None, hosts=hosts_of(LOCALHOST))
    listener = listen(LOCALHOST, 0)
    server = Served(engine, f"http://{LOCALHOST}:{listener.getsockname()[1]}")
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(serve, engine, app, listener, say=print)
        until(lambda: engine.state == "ready")
        assert ask(server, prompt="sun", steps=1).status_code == 200
        fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        monkeypatch.setattr(TrainedStages, "encode", raising(fault))
        answer = ask(server, prompt="sun", n=2)
        assert answer.status_code == 503 and "its log says why" in answer.text
        with pytest.raises(CardProblem, match=r"illegal memory access.*Start again") as told:
            ended.result(timeout=60)
    assert told.value.exit_code == 1


def test_told_to_give_up_it_does_so_after_the_step_it_is_at(run):
    with served(run, max_batch=1) as server, ThreadPoolExecutor() as callers:
        until(lambda: server.engine.state == "ready")
        line = send(server, prompt="sun", stream=True, steps=100)
        waiting = callers.submit(ask, server, prompt="key")
        until(lambda: len(server.engine.waiting) == 1)
        server.engine.stop()
        assert waiting.result().status_code == 503
        told = b""
        while not told.endswith(b"0\r\n\r\n"):  # the end of what is sent in pieces
            told += line.recv(4096)
        line.close()
        assert b"event: error" in told and b"completed" not in told
        assert server.metric('pictures_total{outcome="made"}') == 0


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


# The command -------------------------------------------------------------------------------------


def test_told_to_end_it_finishes_what_it_accepted(tmp_path):
    run = write_run(tmp_path / "tiny")
    process = subprocess.Popen(
        [sys.executable, "-c", "from imagen_scale.commands.main import main; main()", "serve", run,
         "--port", "0", "--runtime", "torch", "--max-steps", "1000"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        seen = []
        with httpx.Client(base_url=address, trust_env=False, timeout=120) as caller:
            until(lambda: caller.get("/readyz").status_code == 200)
            body = {"prompt": "sun", "stream": True, "steps": 40}
            with caller.stream("POST", "/v1/images/generations", json=body) as answer:
                for told in answer.iter_lines():
                    if told.startswith("event") and not seen:
                        process.send_signal(signal.SIGTERM)
                        until(lambda: caller.get("/readyz").json() == {"status": "draining"})
                        late = caller.post("/v1/images/generations", json={"prompt": "sun"})
                        assert late.status_code == 503 and late.headers["retry-after"] == "1"
                    seen.append(told)
        assert "event: image_generation.completed" in seen and "data: [DONE]" in seen
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 0, error
        assert "finishing what was accepted" in error and "Traceback" not in error
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [("127.0.0.1", "", False), ("0.0.0.0", "", True), ("0.0.0.0", "right", False)],
)
def test_stages_that_cannot_be_loaded_end_it_in_one_sentence(tmp_path, host, key, warns):
    for number in (1, 2):
        write_stage(tmp_path / "run", number, fingerprint="of another encoder")
    done = CliRunner(env={"IMAGEN_SCALE_API_KEY": key}).invoke(
        main, ["serve", str(tmp_path / "run"), "--host", host, "--port", "0"]
    )
    assert done.exit_code == 1, done.output
    assert "trained with another version of the text encoder" in done.output
    assert "Traceback" not in done.output and "right" not in done.output
    assert ("warning: whoever reaches 0.0.0.0 may use this server" in done.output) == warns


def test_without_the_extra_the_remedy_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    done = CliRunner().invoke(main, ["serve", str(run)])
    assert done.exit_code == 2 and "pip install 'imagen-scale[serve]'" in done.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere: not a run folder"),
        (["--max-n", "9", "--queue", "8"], "--max-n 9: does not fit into --queue 8"),
        (["--max-batch", "0"], "Invalid value for '--max-batch'"),
        (["RUN", "--max-steps", "10"], "--max-steps 10: a request that names no steps takes 25"),
    ],
)
def test_wrong_use_is_one_sentence(flags, message, run):
    flags = [str(run) if word == "RUN" else word for word in flags]
    done = CliRunner().invoke(main, ["serve", "--port", "0", *flags])
    assert done.exit_code == 2 and message in done.output


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_no_place_here_is_told_as_such(run, host):
    done = CliRunner().invoke(main, ["serve", str(run), "--host", host, "--port", "0"])
    assert done.exit_code == 2 and f"--host {host}: is no address of this machine" in done.output
