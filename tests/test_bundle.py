"""A bundle: one folder from which a program without torch draws what the run draws."""

import hashlib
import json
import math
import os
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner
from imagen_scale_export.text_encoder import export_text_encoder, verify_text_encoder
from support.tiny import write_stage
from tokenizers import Tokenizer, models, pre_tokenizers

from imagen_scale.commands.main import main
from imagen_scale.data.encoder import TextEncoder
from imagen_scale.errors import ParityError
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.bundle import Bundle
from imagen_scale.sampling.stage import noise_source
from imagen_scale.sampling.stages import TrainedStages

CPU = torch.device("cpu")


def export(*arguments):
    return CliRunner().invoke(main, ["export", "--bundle", *map(str, arguments)])


def facts_of(bundled):
    return json.loads((bundled / "bundle.json").read_text())


def run_graph(path, feed):
    return onnxruntime.InferenceSession(path).run(None, feed)


def conditioned(bundled, prompt):
    """Tokens and pooled text of the first stage, as docs/export.md says."""
    text, stage = facts_of(bundled)["text"], facts_of(bundled)["stages"][0]
    tokenizer = Tokenizer.from_file(str(bundled / "tokenizer.json"))
    tokenizer.enable_truncation(text["max_tokens"])
    ids = np.array([tokenizer.encode(prompt).ids])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (features,) = run_graph(bundled / "text_encoder.onnx", feed)
    length = stage["max_text_len"]
    kept = features[:, :length]
    embeds = np.zeros((1, length, text["embed_dim"]), np.float32)
    embeds[:, : kept.shape[1]] = kept
    mask = np.arange(length)[None] < kept.shape[1]
    path = bundled / stage["folder"] / "conditioner.onnx"
    return run_graph(path, {"text_embeds": embeds, "text_mask": mask})


def test_numbers_and_graphs_alone_give_the_picture_of_the_run(exported, bundled):
    """DDIM at the times of the bundle from the run's own start: nothing else of the program."""
    stage, cond_scale = facts_of(bundled)["stages"][0], 3.0
    folder = bundled / stage["folder"]
    schedule, null = (json.loads((folder / f"{name}.json").read_text())
                      for name in ("schedule", "null_text"))  # fmt: skip
    np.testing.assert_allclose(
        np.cumprod(1 - np.array(schedule["betas"])), schedule["abar"], rtol=1e-9
    )
    tokens, hidden = conditioned(bundled, "sun")
    session = onnxruntime.InferenceSession(folder / "denoiser.onnx")
    cascade, options = TrainedStages.load(exported), SamplingOptions(sampler="ddim", num=1)
    x = noise_source("sample", cascade.configs[0], [0], (3, 16, 16), CPU)().numpy()
    times = stage["settings"]["times"]
    for i, time in enumerate(times):
        prediction = session.run(None, {
            "x_t": x, "t": np.array([time], np.float32), "text_tokens": tokens,
            "text_hidden": hidden, "null_tokens": np.array([null["tokens"]], np.float32),
            "null_hidden": np.array([null["hidden"]], np.float32),
            "cond_scale": np.array([cond_scale], np.float32),
        })[0]  # fmt: skip
        abar = schedule["abar"][time]
        alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
        assert stage["pred_type"] == "eps" and stage["thresholding"] == "dynamic"
        x_0 = (x - sigma * prediction) / alpha
        limit = max(1.0, float(np.quantile(np.abs(x_0), stage["percentile"])))
        x_0 = np.clip(x_0, -limit, limit) / limit
        if i + 1 < len(times):
            lower = schedule["abar"][times[i + 1]]
            eps = (x - alpha * x_0) / sigma
            x = (math.sqrt(lower) * x_0 + math.sqrt(1 - lower) * eps).astype(np.float32)
    theirs = cascade.sample(["sun"], options)[0]
    assert np.abs(x_0 - theirs.numpy()).max() < 1 / 255


def test_exports_that_are_there_are_taken_as_they_are(bundled):
    said = (bundled.parent / "said.txt").read_text()
    assert said.count(": takes ") == 2 and "tracing the fp32 graph" not in said
    assert "2 stages of 16 to 32 px, fp32, text encoder minilm" in said


def test_every_file_is_listed_with_its_hash_and_every_port_is_the_graphs_own(bundled):
    facts = facts_of(bundled)
    found = {path.relative_to(bundled).as_posix(): path for path in bundled.rglob("*")
             if path.is_file() and path.name != "bundle.json"}  # fmt: skip
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()} \
        == {name: file["sha256"] for name, file in facts["files"].items()}  # fmt: skip
    graphs = {"text_encoder.onnx": facts["text"]["graph"]}
    for stage in facts["stages"]:
        graphs |= {f"{stage['folder']}/{name}.onnx": stage[name]
                   for name in ("conditioner", "denoiser", "denoiser_unguided")}  # fmt: skip
    for whole in ("denoiser", "denoiser_unguided"):  # the second stage was exported with --cache
        prediction, deep = stage[whole]["outputs"]
        inputs = [*stage[whole]["inputs"], deep]
        graphs[f"unet2/{whole}_shallow.onnx"] = {"inputs": inputs, "outputs": [prediction]}
    assert {name for name in found if name.endswith(".onnx")} == set(graphs)
    for name, graph in graphs.items():
        session = onnxruntime.InferenceSession(found[name])
        for ports, values in ((graph["inputs"], session.get_inputs()),
                              (graph["outputs"], session.get_outputs())):  # fmt: skip
            assert [(port["name"], port["dims"]) for port in ports] == [
                (value.name, list(value.shape)) for value in values
            ]
    assert {"licences/LICENSE", "licences/THIRD_PARTY.md"} <= set(found)
    Bundle.model_validate_json((bundled / "bundle.json").read_text())
    assert [stage["lowres_time"] for stage in facts["stages"]] == [None, 20]
    assert [stage["settings"]["cond_scale"] for stage in facts["stages"]] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unet", 1], "--unet 1: a bundle holds all U-Nets"),
        (["--format", "tensorrt"], "--format tensorrt: a bundle holds ONNX files"),
    ],
)
def test_what_goes_not_with_a_bundle_is_said(exported, arguments, message):
    done = export("--run", exported, *arguments)
    assert (done.exit_code, message in done.output) == (2, True), done.output


def test_stages_of_two_text_encoders_are_no_bundle(tmp_path):
    """Whose weights have one width may have learned from other features."""
    for number in (1, 2):
        write_stage(tmp_path / "run", number, fingerprint="another" if number == 2 else None)
    done = export("--run", tmp_path / "run")
    assert done.exit_code == 1, done.output
    assert "U-Net 2 was trained with another version of the text encoder" in done.output
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_bundle_is_replaced_by_force_and_another_folder_never(exported, bundled, tmp_path):
    done = export("--run", exported, "--out", bundled)
    assert done.exit_code == 2 and "exists already; add --force" in done.output
    (tmp_path / "mine").mkdir()
    done = export("--run", exported, "--out", tmp_path / "mine", "--force")
    assert done.exit_code == 2 and "is there and no bundle; name a folder" in done.output
    done = CliRunner().invoke(main, ["export", "--unet", "1", "--out", "x", "--run", str(exported)])
    assert done.exit_code == 2 and "--out: goes with --bundle" in done.output
    done = export("--run", exported, "--batch", "1:2:4")
    assert done.exit_code == 2 and "--batch: is an engine's, and a bundle holds none" in done.output


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 with random weights and a tokenizer of the words of a few captions."""
    folder = tmp_path_factory.mktemp("encoders") / "t5"
    words = "red heart a small wooden house beside lake , seen from above at dusk"
    known = ["<pad>", "</s>", "<unk>", *words.split()]
    vocabulary = {word: i for i, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_a_t5_is_exported_too_and_compared_with_the_original(t5, tmp_path):
    encoder = TextEncoder(t5, CPU)
    graph, tokenizer = tmp_path / "text_encoder.onnx", tmp_path / "tokenizer.json"
    tokenizer.write_text(encoder.tokenizer_json("t5"))
    export_text_encoder(encoder, graph, 16)
    assert encoder.max_tokens == 64
    captions = ["red heart", "a house beside a lake at dusk"]
    expected = encoder.encode(captions)
    ids = np.array([[3, 4, 0, 0, 0, 0, 0], [5, 8, 9, 5, 10, 15, 16]])
    mask = (ids > 0).astype(np.int64)
    (found,) = run_graph(graph, {"input_ids": ids, "attention_mask": mask})
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=1e-4)
    with torch.no_grad():
        encoder.network.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)
    with pytest.raises(ParityError, match="the text encoder differs by"):
        verify_text_encoder(encoder, graph, tokenizer)


def test_triton_gets_every_graph_with_its_ports_and_weights(bundled, tmp_path):
    done = CliRunner().invoke(
        main, ["export", "triton", str(bundled), "--out", str(tmp_path / "models")]
    )
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "models").iterdir()}
    graphs = ("conditioner", "denoiser", "denoiser_unguided")
    assert names == {"text_encoder", *(f"unet{n}_{graph}" for n in (1, 2) for graph in graphs)}
    types = {"tensor(float)": "FP32", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
    for name in names:
        folder = tmp_path / "models" / name
        config = (folder / "config.pbtxt").read_text()
        assert f'name: "{name}"\nbackend: "onnxruntime"\n' in config
        assert "max_batch_size: 8\n" in config and "dynamic_batching { }" in config
        (graph,) = (folder / "1").glob("*.onnx")
        assert f'default_model_filename: "{graph.name}"' in config
        session = onnxruntime.InferenceSession(graph)  # its weights are there
        assert '"deep"' not in config  # its first dimension is not always the batch
        for port in (*session.get_inputs(), *session.get_outputs()[:1]):
            _, *sides = [side if isinstance(side, int) else -1 for side in port.shape]
            dims = f"dims: {sides} }}" if sides else "dims: [1], reshape: { shape: [] } }"
            assert f'{{ name: "{port.name}", data_type: TYPE_{types[port.type]}, {dims}' in config
    again = ["export", "triton", str(bundled), "--out", str(tmp_path / "models")]
    done = CliRunner().invoke(main, again)
    assert done.exit_code == 2 and "models: exists already" in done.output
    done = CliRunner().invoke(main, ["export", "triton", str(tmp_path), "--out", "x"])
    assert done.exit_code == 1 and "is no bundle" in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.update({"../x": {"bytes": 0, "sha256": ""}}), "'../x' leads out"),
        (lambda files: files.pop("unet1/denoiser.onnx.data"), "not list unet1/denoiser.onnx.data"),
    ],
)
def test_triton_gets_what_the_bundle_lists_and_nothing_else(bundled, tmp_path, change, message):
    folder = tmp_path / "bundle"
    shutil.copytree(bundled, folder)
    facts = json.loads((folder / "bundle.json").read_text())
    change(facts["files"])
    (folder / "bundle.json").write_text(json.dumps(facts))
    done = CliRunner().invoke(main, ["export", "triton", str(folder), "--out", str(tmp_path / "m")])
    assert done.exit_code == 1 and message in done.output


def test_triton_gets_what_links_lead_to(bundled, tmp_path):
    """The cache of the Hugging Face hub is made of links."""
    shutil.copytree(bundled, tmp_path / "blobs")
    shutil.copytree(tmp_path / "blobs", tmp_path / "linked", copy_function=os.symlink)
    done = CliRunner().invoke(
        main, ["export", "triton", str(tmp_path / "linked"), "--out", str(tmp_path / "models")]
    )
    assert done.exit_code == 0, done.output
    shutil.rmtree(tmp_path / "blobs")
    for graph in (tmp_path / "models").glob("*/1/*.onnx"):
        onnxruntime.InferenceSession(graph)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON with a schema_version"),
        ("[]", "it is not JSON with a schema_version"),
        ("{}", "it is not JSON with a schema_version"),
        ('{"schema_version": 9}', "has schema version 9; this program reads 1"),
        ('{"schema_version": 1, "text": 3}', "damaged: project_version: Field required"),
    ],
)
def test_a_bundle_of_another_shape_is_refused_in_one_sentence(tmp_path, text, message):
    (tmp_path / "bundle.json").write_text(text)
    done = CliRunner().invoke(main, ["export", "triton", str(tmp_path), "--out", "x"])
    assert done.exit_code == 1 and f"{tmp_path / 'bundle.json'}: " in done.output
    assert message in done.output and done.output.count("\n") == 1
