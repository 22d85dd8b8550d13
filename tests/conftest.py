"""Shared fixtures: a folder for compiled operators, a tiny configuration, the real launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# Timings on a shared machine say nothing.
settings.register_profile("imagen-scale", deadline=None, max_examples=30)
settings.load_profile("imagen-scale")

ROOT = Path(__file__).parent.parent

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

TINY = {
    "imagen": {"image_sizes": [16, 32], "text_encoder_name": "minilm", "timesteps": 100},
    "unets": [
        {"dim": 8, "dim_mults": [1, 2], "layer_attns": [False, True],
         "layer_cross_attns": [False, True], "attn_heads": 2, "max_text_len": 8},
        {"dim": 8, "dim_mults": [1, 2], "layer_attns": False,
         "layer_cross_attns": [False, True], "max_text_len": 8, "pred_type": "v"},
    ],
    "data": {"source": "emoji", "names": ["red heart", "sun", "pizza", "rocket", "key", "house"]},
    "training": {"steps": 6, "global_batch": 8, "lr": 1e-3, "warmup_steps": 2,
                 "precision": "fp32", "checkpoint_every": 3, "val_every": 3, "sample_every": 6,
                 "sample_steps": 2, "sample_prompts": ["red heart"]},
    "logging": {"log_every": 1},
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory):
    """Operators and prepared data of the tests stay apart from the user's own.

    Both survive the session under the repository's cache, so that operators compile once.
    """
    cache = Path(os.environ.get("PYTEST_CACHE", ROOT / ".pytest_cache")) / "imagen-scale"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(cache / "torch_extensions")
    os.environ["IMAGEN_SCALE_CACHE"] = str(cache / "prepared")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    yield
    for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
        leftover.unlink(missing_ok=True)


@pytest.fixture
def tiny_config(tmp_path):
    """Path of a configuration that trains two U-Nets in seconds."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@contextmanager
def environment_of_no_launcher():
    """No launcher's variables inside; the environment as it was afterwards."""
    before = dict(os.environ)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def process_group(private_folders):
    """DeepSpeed in this process, as the only rank; it cannot be joined a second time."""
    from imagen_scale.training import ranks

    with environment_of_no_launcher():
        ranks.fill_environment()
        ranks.check_machine()
        ranks.join()
        yield
        ranks.stop()


@pytest.fixture(scope="session")
def launch():
    """Runs launch/train.py under the real deepspeed launcher, or with plain python."""

    def run(
        config,
        run_dir,
        *options,
        processes=1,
        plain=False,
        check=True,
        env=None,
        kill_at=None,
        kill_with=signal.SIGKILL,
        script=None,
    ):
        flags = [option for option in options if option.startswith("--") or option.isdigit()]
        settings = [
            item
            for option in options
            if not option.startswith("--") and not option.isdigit()
            for item in ("--set", option)
        ]
        launcher = [
            str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(processes),
            "--master_port", str(free_port()),
        ]  # fmt: skip
        command = [
            *([sys.executable] if plain else launcher), *([str(script)] if script else []),
            str(ROOT / "launch" / "train.py"),
            "--config", str(config), "--run", str(run_dir), *flags, *settings,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
        environment |= {"OMP_NUM_THREADS": "1"} | (env or {})
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=kill_at is not None,
        )  # fmt: skip
        if kill_at is not None:
            while process.poll() is None and not list(Path(run_dir).glob(f"*/{kill_at}")):
                time.sleep(0.005)
            os.killpg(process.pid, kill_with)  # as a terminal and SLURM do
            check = False
        try:
            stdout, stderr = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done

    return run


def free_port():
    """A port that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(run_dir, unet=1):
    """The training losses of one U-Net as metrics.jsonl has them, by step."""
    lines = (Path(run_dir) / f"unet{unet}" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def write_stage(run, number, *, seed=0, step=6, fingerprint=None, change=None, overrides=()):
    """Writes the inference file of one stage of TINY with random weights, norms included."""
    import torch

    from imagen_scale.config import dump_config, parse_config
    from imagen_scale.data.encoder import encoder_fingerprint, encoder_folder
    from imagen_scale.models.unet import UNet
    from imagen_scale.runs.folders import inference_path
    from imagen_scale.runs.inference import InferenceFile, save_inference

    config = parse_config(json.dumps(TINY), overrides=overrides)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(dump_config(config))
    torch.manual_seed(10 * seed + number)
    unet = UNet(config.stage(number, 384).network).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    if change:
        change(unet)
    file = InferenceFile(
        inference_path(run, number), config, number, text_embed_dim=384,
        text_fingerprint=fingerprint or encoder_fingerprint(encoder_folder("minilm")),
        step=step, steps=6,
    )  # fmt: skip
    save_inference(file, unet.state_dict())


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A run with ONNX exports of both stages in fp32 and fp16; copy before changing it."""
    from imagen_scale_export.exporter import Options, export_unet

    from imagen_scale.runs.folders import inference_path
    from imagen_scale.runs.inference import read_inference

    run = tmp_path_factory.mktemp("exported") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        # torch treats graphs of more than 1.5 GB in its own way: all of them here.
        patch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
        for number in (1, 2):
            write_stage(run, number)
            for precision in ("fp32", "fp16"):
                # The second stage in fp32 takes other sizes as well.
                any_size = number == 2 and precision == "fp32"
                options = Options(precision=precision, dynamic_size=any_size)
                file = read_inference(inference_path(run, number))
                export_unet(file, options, lambda sentence: None)
    return run
