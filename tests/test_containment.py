"""Secrets stay in the environment, the network is left alone, and prompts name no files."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT
from support.tiny import TINY

from imagen_scale.config import Config, dump_config, load_config, parse_config
from imagen_scale.config.secret_values import secret_problems
from imagen_scale.errors import ConfigError

PLANTED = {
    "WANDB_API_KEY": "5f1ed0a7" * 5,
    "HF_TOKEN": "hf_PlantedTokenOfNobodyAtAll0123456789",
    "GITHUB_TOKEN": "ghp_PlantedTokenOfNobodyAtAll0123456789",
    "MY_PASSWORD": "correct-horse-battery-staple-planted",
}
SECRETS = [
    ("data.path", "https://user:hunter2@example.org/set"),
    ("text.encoder", PLANTED["HF_TOKEN"]),
    ("training.sample_prompts", [PLANTED["GITHUB_TOKEN"]]),
    ("logging.wandb", PLANTED["WANDB_API_KEY"]),
    ("logging.wandb.api_key", "anything"),
    ("logging.hf_token", "anything"),
    ("deepspeed.wandb.password", "anything"),
    ("deepspeed.comet.api_key", 17),
    (PLANTED["HF_TOKEN"], 1),
]


@pytest.mark.parametrize(("key", "value"), SECRETS, ids=lambda value: str(value)[:20])
def test_secrets_are_refused_and_never_repeated(key, value):
    config = TINY | {"logging": {"wandb": {"project": "p"}}, "deepspeed": {}}
    if key == "logging.wandb":
        config["logging"] = {}
    with pytest.raises(
        ConfigError, match="looks like a secret.*remove it.*WANDB_API_KEY"
    ) as caught:
        parse_config(json.dumps(config), overrides=(f"{key}={json.dumps(value)}",))
    for secret in (*PLANTED.values(), "hunter2", "anything", "17"):
        assert secret not in str(caught.value)


def test_no_key_and_no_shipped_value_is_taken_for_a_secret():
    def keys(schema):
        if isinstance(schema, dict):
            yield from schema.get("properties", {})
            for value in schema.values():
                yield from keys(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from keys(value)

    every_key = {key: "x" for key in keys(Config.model_json_schema())}
    assert "max_text_len" in every_key and secret_problems(every_key) == []
    for path in (ROOT / "configs").glob("*.json"):
        assert secret_problems(json.loads(dump_config(load_config(path)))) == []
    harmless = {"token": None, "path": "/cache/snapshots/" + "0" * 40, "prompt": "a token: hf_x"}
    assert secret_problems(harmless) == []


def found_in(folder):
    """Files below a folder that hold a planted secret."""
    return [
        f"{name} in {path}"
        for path in folder.rglob("*")
        if path.is_file()
        for name, secret in PLANTED.items()
        if secret.encode() in path.read_bytes()
    ]


def test_secrets_of_the_environment_are_in_no_file_of_a_run_and_in_no_output(tmp_path, launch):
    pytest.importorskip("wandb")
    config = TINY | {
        "training": TINY["training"] | {"steps": 3, "warmup_steps": 1},
        "data": TINY["data"] | {"cache_dir": str(tmp_path / "cache")},
        "logging": {"wandb": {"project": "planted", "mode": "offline"}},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    done = launch(path, tmp_path / "run", "--unet", "1", plain=True, env=PLANTED)
    assert (tmp_path / "run" / "unet1" / "inference.safetensors").is_file()
    assert list((tmp_path / "run").rglob("*.wandb"))
    assert list((tmp_path / "run" / "unet1").glob("step_*"))
    assert found_in(tmp_path) == []
    for secret in PLANTED.values():
        assert secret not in done.stdout + done.stderr
    (tmp_path / "planted.txt").write_text(PLANTED["MY_PASSWORD"])  # the search does find
    assert found_in(tmp_path) == [f"MY_PASSWORD in {tmp_path / 'planted.txt'}"]


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
calls = []
sys.addaudithook(lambda event, details: calls.append((event, details))
                 if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
                              "urllib.Request", "socket.sendto") else None)
import imagen_scale
names = [found.name for found in pkgutil.walk_packages(imagen_scale.__path__, "imagen_scale.")]
for name in names:
    importlib.import_module(name)
assert "imagen_scale.training.unet" in names and "torch" in sys.modules
assert not calls, calls
"""


def test_importing_every_module_leaves_the_network_alone(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_"))}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
