"""What MinImagen and imagen-pytorch left behind: runs that give the same pixels, configurations."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from check_golden import check
from click.testing import CliRunner
from safetensors import safe_open
from support import ROOT

from imagen_scale.commands.main import main
from imagen_scale.config import load_config
from imagen_scale.diffusion.sampler import sample
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.diffusion.thresholding import dynamic_threshold
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.stage import Stage
from imagen_scale.sampling.stages import TrainedStages

sys.path.insert(0, str(Path(__file__).parent / "records"))
from record_sampling import COND_SCALE, GOLDEN, RECORD, SEED, TIMESTEPS

CPU = torch.device("cpu")


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def golden():
    """Weights, inputs and parameters of MinImagen's cascade."""
    tensors, metadata = tensors_of(GOLDEN)
    return tensors, json.loads(metadata["imagen"]), json.loads(metadata["unets"])


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A text encoder as wide as MinImagen's default one, with random weights."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(vocab_size=8, d_model=512, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def training(tmp_path, golden):
    """A training folder as MinImagen 0.0.9 leaves it."""
    tensors, imagen, unets = golden
    folder = tmp_path / "training_20260823_120000"
    for name in ("parameters", "state_dicts", "tmp"):
        (folder / name).mkdir(parents=True)
    parameters = folder / "parameters"
    (parameters / "training_parameters_20260823.txt").write_text("--EPOCHS=2\n")
    imagen = imagen | {"timesteps": TIMESTEPS}
    (parameters / "imagen_params_20260823.json").write_text(json.dumps(imagen))
    for i, unet in enumerate(unets):
        # As saved before `Imagen` sets it.
        unet = unet | {"lowres_cond": False}
        (parameters / f"unet_{i}_params_20260823.json").write_text(json.dumps(unet))
        prefix = f"unet{i + 1}/weights/"
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        torch.save(state, folder / "state_dicts" / f"unet_{i}_state_20260823.pth")
    return folder


@pytest.fixture
def run(training, t5, tmp_path):
    done = cli("import", training, "--run", tmp_path / "run", "--text-encoder", t5)
    assert done.exit_code == 0, done.output
    return tmp_path / "run"


def test_it_samples_the_pixels_of_minimagen(run, golden):
    """MinImagen's own loop over all timesteps, with the same noise."""
    tensors, imagen, _ = golden
    theirs, _ = tensors_of(RECORD)
    noise = np.random.RandomState(SEED)
    text = Text(tensors["inputs/text_embeds"], tensors["inputs/text_mask"])
    for number, size in enumerate(imagen["image_sizes"], start=1):

        def drawn(size=size):
            return torch.from_numpy(noise.standard_normal((2, 3, size, size)).astype(np.float32))

        stage = Stage(read_inference(inference_path(run, number)), CPU)
        lowres = {"lowres_img": None, "lowres_t": None}
        if number > 1:
            lowres = {"lowres_img": tensors["unet2/inputs/lowres_cond_img"],
                      "lowres_t": torch.tensor([3, 9])}  # fmt: skip
        ours = sample(
            stage.runtime.bind(Conditioning(text, COND_SCALE, **lowres)), drawn(), stage.schedule,
            times=visited_times(stage.schedule, TIMESTEPS, "linear"), sampler="ddpm",
            threshold=lambda x_0: dynamic_threshold(x_0, 0.9), draw_noise=drawn,
        )  # fmt: skip
        drawn()  # MinImagen draws once more for its last step, and leaves it out
        difference = ((ours + 1) / 2 - theirs[f"unet{number}"]).abs().max()
        assert difference < 0.5 / 255, (number, difference)  # the same 8-bit pixels


def test_the_run_is_one_of_ours(run, training):
    config = load_config(run / "config.json")
    assert config.imagen.image_sizes == (8, 32)
    assert (config.unets[1].memory_efficient, config.unets[1].lowres_cond) == (True, None)
    cascade = TrainedStages.load(run)
    assert [file.is_finished for file in cascade.files] == [True, True]
    assert cli("runs", "--root", run.parent).exit_code == 0
    done = cli("import", training, "--run", run)
    assert (done.exit_code, "exists already" in done.stderr) == (2, True)


def test_what_changed_is_noted(training, t5, tmp_path):
    done = cli("import", training, "--run", tmp_path / "run", "--text-encoder", t5)
    for note in ("unets.1.lowres_cond: false becomes null", "sampling: the low-resolution picture",
                 "the run can be sampled"):  # fmt: skip
        assert f"note: {note}" in done.stderr


def test_the_record_of_the_weights_still_holds(golden):
    assert max(check(GOLDEN).values()) < 2e-4


def test_the_last_weights_are_taken_where_there_are_no_best_ones(training, t5, tmp_path):
    for i in (0, 1):
        best = next((training / "state_dicts").glob(f"unet_{i}_*"))
        best.rename(training / "tmp" / f"unet_{i}_tmp.pth")
    done = cli("import", training, "--run", tmp_path / "run", "--text-encoder", t5)
    assert done.exit_code == 0
    assert "from tmp, were taken" in done.stderr


class Code:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_holds_code_is_refused_and_nothing_is_written(training, t5, tmp_path):
    weights = next((training / "state_dicts").glob("unet_1_*"))
    weights.write_bytes(pickle.dumps({"weights": Code(tmp_path / "ran")}))
    done = cli("import", training, "--run", tmp_path / "run", "--text-encoder", t5)
    assert (done.exit_code, "could run code" in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda state: state.pop("final_conv.weight"), 1, "final_conv.weight is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), 1, "extra is unknown"),
        (
            lambda state: state.update({"final_conv.bias": torch.zeros(7)}),
            1,
            "is (7,), expected (3,)",
        ),
        (lambda state: state.update(epoch=3), 1, "not a state_dict"),
    ],
)
def test_weights_that_do_not_fit_are_named(training, t5, tmp_path, change, code, message):
    path = next((training / "state_dicts").glob("unet_0_*"))
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    done = cli("import", training, "--run", tmp_path / "run", "--text-encoder", t5)
    assert (done.exit_code, message in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "run").exists()


def test_folders_that_are_not_minimagens(training, t5, tmp_path):
    def refused(message, *arguments):
        done = cli("import", *arguments, "--run", tmp_path / "run", "--text-encoder", t5)
        assert (done.exit_code, message in done.stderr) == (2, True), done.stderr

    refused("no such folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("are not all there", tmp_path / "empty")
    (tmp_path / "imagen.pt").touch()
    refused("of another network", tmp_path / "imagen.pt")
    second = next((training / "state_dicts").glob("unet_1_*"))
    second.with_name("unet_1_state_1.pth").touch()
    refused("one file unet_1_*.pth is needed", training)
    second.unlink()
    second.with_name("unet_1_state_1.pth").unlink()
    refused("there is none", training)


def test_damaged_weights(training, t5, tmp_path):
    path = next((training / "state_dicts").glob("unet_0_*"))
    path.write_bytes(path.read_bytes()[:5000])
    done = cli("import", training, "--run", tmp_path / "run", "--text-encoder", t5)
    assert (done.exit_code, "damaged" in done.stderr) == (1, True), done.stderr
    assert "Traceback" not in done.output


# Configurations.


def test_parameters_of_minimagen_become_a_configuration(training, tmp_path):
    out = tmp_path / "new.json"
    done = cli("import-config", training / "parameters", "--out", out)
    assert done.exit_code == 0, done.output
    config = load_config(out)
    assert (config.imagen.timesteps, config.imagen.cond_drop_prob) == (TIMESTEPS, 0.15)
    assert config.unets[1].num_resnet_blocks == (1, 2, 2)
    assert cli("import-config", training / "parameters", "--out", out).exit_code == 2
    printed = cli("import-config", training)
    assert json.loads(printed.stdout) == json.loads(out.read_text())


def test_the_seeds_own_blocks_are_taken_unchanged(tmp_path):
    seed = json.loads((ROOT / "configs" / "pokemon_64.json").read_text())
    path = tmp_path / "seed.json"
    path.write_text(json.dumps({"imagen": seed["imagen"], "unets": seed["unets"]}))
    ours = json.loads(cli("import-config", path).stdout)
    expected = load_config(ROOT / "configs" / "pokemon_64.json").model_dump(mode="json")
    for i, unet in enumerate(ours["unets"]):
        expected["unets"][i]["text_embed_dim"] = unet["text_embed_dim"]
    assert (ours["imagen"], ours["unets"]) == (expected["imagen"], expected["unets"])


PYTORCH = {
    "type": "original",
    "imagen": {
        "image_sizes": [64, 256], "timesteps": [1000, 500], "noise_schedules": ["cosine", "linear"],
        "pred_objectives": ["noise", "x_start"], "random_crop_sizes": [None, 64],
        "text_encoder_name": "google/t5-v1_1-large", "condition_on_text": True,
        "unets": [
            {"dim": 128, "dim_mults": [1, 2, 3, 4], "num_resnet_blocks": 3, "attn_dim_head": 64,
             "layer_attns": [False, True, True, True],
             "layer_cross_attns": [False, True, True, True]},
            {"dim": 64, "dim_mults": [1, 2, 4], "memory_efficient": True, "layer_attns": False,
             "layer_cross_attns": [False, False, True], "use_linear_attn": True,
             "attend_at_middle": False},
        ],
    },
    "trainer": {"lr": 1e-4}, "max_batch_size": 4,
}  # fmt: skip


def test_parameters_of_imagen_pytorch_become_a_configuration(tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(PYTORCH))
    done = cli("import-config", path)
    assert done.exit_code == 0, done.output
    ours = json.loads(done.stdout)
    assert ours["text"]["encoder"] == "google/t5-v1_1-large"
    assert ours["imagen"]["timesteps"] == [1000, 500]
    assert ours["imagen"]["cond_drop_prob"] == 0.5  # theirs, not ours
    assert ours["imagen"]["dynamic_thresholding_percentile"] == 0.95
    assert [unet["attn_heads"] for unet in ours["unets"]] == [16, 16]
    assert [unet["pred_type"] for unet in ours["unets"]] == ["eps", "x0"]
    assert ours["unets"][0]["schedule"]["type"] == "cosine"
    assert ours["unets"][1]["schedule"] is None
    assert [unet["crop"] for unet in ours["unets"]] == [None, 64]
    assert [unet["attend_at_middle"] for unet in ours["unets"]] == [True, False]
    for note in (
        "unets.1: attention heads are 64 wide here, not 32",
        "unets.1.use_linear_attn: true has no counterpart",
        "imagen.condition_on_text: true has no counterpart",
        'trainer: {"lr": 0.0001} is left out',
        "max_batch_size: 4 is left out",
    ):
        assert f"note: {note}" in done.stderr


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, ["cosine", "cosine", None]),
        ({"noise_schedules": "cosine"}, ["cosine", "cosine", None]),
        ({"noise_schedules": "linear"}, [None, "cosine", None]),
        ({"noise_schedules": ["linear", "linear", "cosine"]}, [None, None, "cosine"]),
    ],
)
def test_schedules_that_are_not_given_are_those_of_imagen_pytorch(tmp_path, theirs, ours):
    path, imagen = tmp_path / "theirs.json", dict(PYTORCH["imagen"])
    for key in ("noise_schedules", "random_crop_sizes", "pred_objectives"):
        del imagen[key]
    unets = [*imagen["unets"], imagen["unets"][1]]
    imagen |= {"image_sizes": [64, 256, 512], "timesteps": 1000, "unets": unets}
    path.write_text(json.dumps(PYTORCH | {"imagen": imagen | theirs}))
    done = cli("import-config", path)
    assert done.exit_code == 0, done.output
    schedules = [unet["schedule"] for unet in json.loads(done.stdout)["unets"]]
    assert [schedule and schedule["type"] for schedule in schedules] == ours


@pytest.mark.parametrize(
    ("theirs", "ours", "note"),
    [
        ({}, "min_snr", ""),  # as they do unless told otherwise
        ({"min_snr_loss_weight": False, "min_snr_gamma": 3}, None, ""),
        ({"min_snr_gamma": 3}, "min_snr", "imagen.min_snr_gamma: 3 is 5 here"),
        ({"loss_type": "l1"}, None, "errors other than squared ones are not weighted"),
    ],
)
def test_the_loss_is_weighted_as_theirs(tmp_path, theirs, ours, note):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(PYTORCH | {"imagen": PYTORCH["imagen"] | theirs}))
    done = cli("import-config", path)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["training"]["loss_weight"] == ours
    assert note in done.stderr and "has no counterpart" not in "".join(
        line for line in done.stderr.splitlines() if "min_snr" in line
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(True, 0.95), (False, None), ([False, False], None), ([False, True], 0.95)],
)
def test_predictions_that_were_only_cut_off_still_are(tmp_path, theirs, ours):
    path = tmp_path / "theirs.json"
    imagen = PYTORCH["imagen"] | {"dynamic_thresholding": theirs}
    path.write_text(json.dumps(PYTORCH | {"imagen": imagen}))
    done = cli("import-config", path)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["imagen"]["dynamic_thresholding_percentile"] == ours
    note = "imagen.dynamic_thresholding_percentile: all U-Nets have one here, or none"
    assert (note in done.stderr) == (theirs == [False, True])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "elucidated"}, "'elucidated' models have no counterpart"),
        ({"imagen": PYTORCH["imagen"] | {"video": True}}, "'video' models"),
        ({"imagen": PYTORCH["imagen"] | {"unets": [{"is_null": True}]}}, "U-Net 1 is a NullUnet"),
        ({"imagen": {"image_sizes": [64]}}, "no parameters found"),
        ({"imagen": PYTORCH["imagen"] | {"unets": [3]}}, "a list of objects"),
        ({"imagen": {"unets": []}}, "unets"),
        ({"imagen": PYTORCH["imagen"] | {"loss_type": "l3"}}, "imagen.loss_type"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(PYTORCH | change))
    done = cli("import-config", path)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


def test_files_that_are_no_parameters(tmp_path, training):
    for text in ("[1]", "{", ""):
        (tmp_path / "a.json").write_text(text)
        assert cli("import-config", tmp_path / "a.json").exit_code == 2
    assert cli("import-config", tmp_path / "none.json").exit_code == 2
    (training / "parameters" / "imagen_params_2.json").write_text("{}")
    done = cli("import-config", training)
    assert (done.exit_code, "several for one part" in done.stderr) == (2, True)
    (training / "parameters" / "imagen_params_2.json").unlink()
    (training / "parameters" / "unet_0_params_20260823.json").unlink()
    done = cli("import-config", training)
    assert (done.exit_code, "counted from 0" in done.stderr) == (2, True)
