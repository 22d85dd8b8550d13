"""Weights & Biases that is slow, gone or misconfigured: training neither waits nor stops."""

import json
import os
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from support import ROOT
from support.tiny import TINY

from imagen_scale.config import parse_config
from imagen_scale.errors import ConfigError, MissingExtraError
from imagen_scale.training import wandb_sink
from imagen_scale.training.telemetry import Telemetry

pytest.importorskip("wandb")

KEY = "0123456789abcdef0123456789abcdef01234567"
ROWS = 50

REPORTING = """
import json, sys
from pathlib import Path
import psutil
from imagen_scale.config import parse_config
from imagen_scale.training import wandb_sink
from imagen_scale.training.telemetry import Telemetry

run, config, kill = Path(sys.argv[1]), parse_config(sys.argv[2]), len(sys.argv) > 3
wandb_sink.CLOSE_S = 4.0
with Telemetry(run, config, 1, 0, 50) as telemetry:
    for step in range(1, 51):
        telemetry.write(step, loss=1.0)
        if kill and step == 25:
            sink = telemetry._wandb
            while not sink._sendings.empty():
                sink._thread.join(0.05)
            for child in psutil.Process().children():
                child.kill()
    print("reported", flush=True)
print("ended", flush=True)
"""


def config(mode="online", project="test"):
    return json.dumps(TINY | {"logging": {"wandb": {"project": project, "mode": mode}}})


def report(run, *arguments, env):
    """Runs telemetry of 50 rows in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", REPORTING, str(run), *arguments], cwd=ROOT, text=True, timeout=180,
        capture_output=True, env=environment | env | {"HOME": str(run)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr
    lines = (run / "unet1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, ROWS + 1))
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(run) in (p.info["cmdline"] or [])
    ]
    return done.stdout


@pytest.fixture
def silent_server():
    """The address of a server that accepts and never answers, and the connections it has."""
    connections = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)

        def accept():
            try:
                while True:
                    connections.append(server.accept()[0])
            except OSError:  # closed
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    for connection in connections:
        connection.close()


def test_a_server_that_never_answers_costs_no_row_and_no_wait(silent_server, tmp_path):
    address, connections = silent_server
    said = report(tmp_path, config(), env={"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY})
    assert connections  # it was really asked
    assert said.index("reported") < said.index("waiting for wandb to finish, 4 s at most")
    assert "wandb did not finish in 4 s and is left; metrics.jsonl has every row" in said
    assert said.rstrip().endswith("ended")


def test_a_wandb_that_dies_costs_no_row(tmp_path):
    said = report(tmp_path, config("offline"), "kill", env={})
    assert "ended" in said
    assert said.count("wandb failed") + said.count("wandb did not finish") == 1


def test_offline_keeps_the_rows_for_later_under_the_same_id(tmp_path):
    for _ in range(2):
        said = report(tmp_path, config("offline"), env={})
        assert "WARNING" not in said
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files
    assert {file.stem for file in files} == {
        f"run-{(tmp_path / 'unet1' / 'wandb_id.txt').read_text()}"
    }


def test_rows_that_wandb_is_too_slow_for_are_dropped_counted_and_said_once(tmp_path, monkeypatch):
    """wandb.init waits until the test is over, as it does for a server out of reach."""
    import wandb

    is_over = threading.Event()
    monkeypatch.setattr(wandb_sink, "WAITING", 3)
    monkeypatch.setattr(wandb_sink, "CLOSE_S", 0.1)
    monkeypatch.setattr(wandb_sink, "_end_service", lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **options: is_over.wait())
    (tmp_path / "unet1").mkdir()
    told = []
    sink = wandb_sink.WandbSink(tmp_path, parse_config(config("offline")), 1, told.append)
    for step in range(5):
        sink.log({"step": step})
    assert len(told) == 1 and "has not taken the last 3 rows" in told[0]
    sink.close()
    is_over.set()
    sink._thread.join(60)
    assert told[1:] == [
        "waiting for wandb to finish, 0 s at most",
        "WARNING: wandb did not finish in 0 s and is left; metrics.jsonl has every row. Is its "
        "server reachable? logging.wandb.mode offline needs none.",
        "WARNING: wandb lacks 2 rows; metrics.jsonl has them",
    ]


def test_an_error_of_wandb_is_said_once_without_its_words(tmp_path, monkeypatch):
    import wandb

    def refuse(**options):
        raise wandb.errors.CommError(f"https://me:{KEY}@example.org refused")

    monkeypatch.setattr(wandb_sink, "_end_service", lambda: None)
    monkeypatch.setattr(wandb, "init", refuse)
    (tmp_path / "unet1").mkdir()
    told = []
    sink = wandb_sink.WandbSink(tmp_path, parse_config(config("offline")), 1, told.append)
    sink._thread.join(60)
    sink.log({"step": 1})
    sink.close()
    assert len(told) == 1 and told[0].startswith("WARNING: wandb failed (CommError)")
    assert KEY not in told[0]


def test_what_wandb_cannot_do_is_an_error_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_sink, "_has_key", lambda: False)
    with pytest.raises(ConfigError, match="wandb has no key for its server. Run `wandb login`"):
        Telemetry(tmp_path, parse_config(config()), 1, 0, 1)
    with pytest.raises(ConfigError, match="logging.wandb: wandb refuses it: .*Invalid project"):
        Telemetry(tmp_path, parse_config(config("offline", project="a/b")), 1, 0, 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        Telemetry(tmp_path, parse_config(config()), 1, 0, 1)
