"""Terminals whose encoding is not UTF-8."""

import io
import json
import os
import subprocess
import sys

import pytest

from imagen_scale.commands.terminal import settle_output, typed

NO_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sun", "sun"),
        ("naïve ☀", "naïve ☀"),
        ("naïve ☀".encode().decode("ascii", "surrogateescape"), "naïve ☀"),
        ("na\udcefve", "na\udcefve"),  # of Latin-1: refused later, by its name
    ],
)
def test_text_is_what_was_typed(given, meant):
    assert typed(given) == meant


@pytest.mark.parametrize(
    ("encoding", "is_terminal", "printed"),
    [
        ("utf-8", True, "ï ☀ \\udcff".encode()),
        ("ascii", False, "ï ☀ \\udcff".encode()),
        ("ascii", True, b"\\xef \\u2600 \\udcff"),
        ("latin-1", True, "ï \\u2600 \\udcff".encode("latin-1")),
        ("latin-1", False, "ï \\u2600 \\udcff".encode("latin-1")),  # the user's word
    ],
)
def test_any_text_can_be_printed(monkeypatch, encoding, is_terminal, printed):
    out = io.BytesIO()
    stream = io.TextIOWrapper(out, encoding=encoding)
    monkeypatch.setattr(out, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    settle_output()
    print("ï ☀ \udcff", end="", flush=True)
    assert out.getvalue() == printed


def test_sampling_without_a_locale(run, tmp_path):
    out = tmp_path / "ü"
    done = subprocess.run(
        [sys.executable, "-c", "from imagen_scale.commands.main import main; main()", "sample",
         "naïve ☀", "--negative-prompt", "größer", "--run", run, "--out", out, "--steps", "1",
         "--unet-limit", "1"],
        env=os.environ | NO_LOCALE, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (facts,) = (json.loads(path.read_text()) for path in out.glob("0*.json"))
    assert (facts["prompt"], facts["negative_prompt"]) == ("naïve ☀", "größer")
    assert b"1 pictures in" in done.stdout
