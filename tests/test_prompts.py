"""Prompts that are too long, and those that are empty: what is made of them is told everywhere."""

import json
import re
import threading
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support.tiny import write_stage

from imagen_scale import Cascade
from imagen_scale.commands.main import main
from imagen_scale.data.encoder import TextEncoder, encoder_folder
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.ui.generation import Generator, Made, Request, Said

# Eight tokens are read: the mark of the beginning and seven words.
LONG = "a red heart beside a yellow sun, and two green keys"
UNREAD = ", and two green keys"
LOST = {"read": 8, "tokens": 14, "text": UNREAD}
SENTENCE = (
    f"prompt {LONG!r}: U-Net 1 and 2 read the first 8 of 14 tokens (max_text_len) and not what "
    f"begins at {UNREAD!r}"
)
BLANK = ["", "   ", "\t\n", "\u200b\ufeff"]


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def facts_in(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("0*.json"))]


def quiet(run, **options):
    """Both branches of guidance in passes of their own, so that equal inputs give equal bits."""
    runtime = RuntimeOptions(**{"runtime": "torch", "sequential": True} | options)
    return TrainedStages.load(run, runtime=runtime)


make = SamplingOptions.make


# ------------------------------------------------------------------------------- what is unread


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder(encoder_folder("minilm"))


@pytest.mark.parametrize(
    ("limit", "unread"),
    [
        (1, "one two, three"),  # of six tokens with both marks and the comma
        (3, ", three"),
        (4, "three"),
        (5, None),  # the mark of the end is no text
        (256, None),
    ],
)
def test_what_begins_after_the_last_token_that_is_read(minilm, limit, unread):
    found = minilm.unread("one two, three", limit)
    assert found == (None if unread is None else (limit, 6, unread))


@pytest.mark.parametrize("prompt", ["a \u2764\ufe0f", "cafe\u0301", "sun\u200b", "sun \n"])
def test_what_a_tokenizer_drops_at_the_end_is_not_missed(minilm, prompt):
    tokens = len(minilm.encode([prompt])[0])
    assert minilm.unread(prompt, tokens) is None
    assert minilm.unread(prompt, tokens - 1) is None  # but for the mark of the end
    read, *_, text = minilm.unread(f"{prompt} key", tokens - 1)
    assert read == tokens - 1 and text.endswith("key")


def test_the_encoder_has_a_limit_of_its_own(minilm):
    words = ["sun"] * 300
    assert minilm.unread(" ".join(words), 1000) == (256, 302, " ".join(["sun"] * 46))
    assert minilm.unread(" ".join(words[:254]), 1000) is None


def test_an_encoder_whose_tokens_have_no_places_in_the_text(tmp_path):
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    ByT5Tokenizer().save_pretrained(tmp_path)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=384, **sizes)).save_pretrained(tmp_path)
    encoder = TextEncoder(tmp_path)  # a token for each byte
    assert encoder.unread("red heart", 4) == (4, 10, "heart")
    assert encoder.unread("red heart", 9) is None


# ----------------------------------------------------------------------------------- it is told


def test_the_command_says_it_once_and_the_facts_hold_it(run, tmp_path):
    done = cli("sample", LONG, "sun", "--run", run, "--out", tmp_path, "--steps", 1, "--num", 2)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("max_text_len") == 1
    assert SENTENCE.replace("prompt", "--prompt", 1) in done.stderr.splitlines()
    long, again, short, _ = facts_in(tmp_path)
    assert long["not_read"] == [{"option": "prompt", "unet": n, **LOST} for n in (1, 2)]
    assert again["not_read"] == long["not_read"] and short["not_read"] == []


def test_a_file_of_prompts_is_one_sentence_too(run, tmp_path):
    lines = [f"{LONG} {n}" for n in range(5)]
    (tmp_path / "prompts.txt").write_text("\n".join([*lines, "sun"]))
    flags = "--run", run, "--out", tmp_path, "--steps", 1, "--unet-limit", 1
    done = cli("sample", "--from-file", tmp_path / "prompts.txt", *flags)
    (sentence,) = [line for line in done.stderr.splitlines() if "max_text_len" in line]
    assert sentence.startswith(f"--prompt {lines[0]!r}: U-Net 1 reads the first 8 of 15 tokens")
    assert sentence.endswith("; so it is with 4 more")
    assert [len(facts["not_read"]) for facts in facts_in(tmp_path)] == [1, 1, 1, 1, 1, 0]


def test_the_negative_prompt_is_told_of_by_its_name(run, tmp_path):
    flags = "--run", run, "--out", tmp_path, "--steps", 1
    done = cli("sample", "sun", "--negative-prompt", LONG, *flags)
    assert SENTENCE.replace("prompt", "--negative-prompt", 1) in done.stderr.splitlines()
    (facts,) = facts_in(tmp_path)
    assert {lost["option"] for lost in facts["not_read"]} == {"negative_prompt"}


def test_python_warns_unless_somebody_listens(run):
    with pytest.warns(UserWarning, match=re.escape(SENTENCE)):
        Cascade.load(run).sample(LONG, steps=1)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cascade.load(run).sample("sun", steps=1)
        Cascade.load(run, say=said.append).sample(LONG, steps=1)
    assert SENTENCE in said


def test_the_page_says_it_of_every_picture(run):
    """Though the features of a prompt that was read before are kept."""
    generator = Generator(run)
    for seed in range(2):
        request = Request(LONG, {"seed": seed, "steps": [1, 1]}, "torch")
        told = list(generator.generate(request, threading.Event()))
        assert SENTENCE in [event.sentence for event in told if isinstance(event, Said)]


def test_enlarging_says_it(run, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    done = cli("upscale", tmp_path / "in.png", "--run", run, "--steps", 1, "--prompt", LONG)
    assert done.exit_code == 0, done.output
    assert "U-Net 2 reads the first 8 of 14 tokens" in done.stderr
    facts = json.loads((tmp_path / "in_x2.json").read_text())
    assert facts["not_read"] == [{"option": "prompt", "unet": 2, **LOST}]


def test_measuring_counts_captions(tmp_path):
    """Five names of emoji are [CLS], a word and [SEP]; of "red heart" only "red" is read."""
    for number in (1, 2):
        limits = [f"unets.{unet}.max_text_len=2" for unet in (0, 1)]
        write_stage(tmp_path / "run", number, overrides=["data.val_fraction=0", *limits])
    done = cli("evaluate", "--run", tmp_path / "run", "--num", 6, "--steps", 1)
    assert done.exit_code == 0, done.output
    (sentence,) = [line for line in done.stderr.splitlines() if "max_text_len" in line]
    assert sentence == "1 of 6 captions are read to max_text_len only, as in training"
    facts = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert facts["cut_captions"] == 1


# ------------------------------------------------------------------------------ an empty prompt


@pytest.mark.parametrize("prompt", BLANK)
def test_no_text_is_the_branch_that_training_knew(run, prompt):
    without = quiet(run).sample(["sun"], make(steps=3, cond_scale=[0.0, 0.0]))
    found = quiet(run).sample([prompt], make(steps=3, cond_scale=[4.0, 1.0]))
    for one, other in zip(found, without, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cond_scale", [[3.0, 1.0], [1.0, 1.0]])
def test_it_stands_among_others_and_in_graphs(exported, cond_scale):
    options = make(steps=2, cond_scale=cond_scale)
    alone = [quiet(exported).sample([text], options) for text in ("", "sun")]
    for runtime in ({}, {"runtime": "onnx", "sequential": False}):
        together = quiet(exported, **runtime).sample(["", "sun"], options)
        for stage, images in enumerate(together):
            for image, pictures in zip(images, alone, strict=True):
                torch.testing.assert_close(image, pictures[stage][0], atol=2e-3, rtol=0)
    assert (alone[0][0] - alone[1][0]).abs().max() > 0.01


def test_it_is_said(run, tmp_path):
    done = cli("sample", "", "sun", "--run", run, "--out", tmp_path, "--steps", 1)
    assert done.exit_code == 0, done.output
    line = (
        "an empty --prompt is no text at all, as training knew it in 10% of its samples "
        "(imagen.cond_drop_prob): guidance does not act on it"
    )
    assert done.stderr.splitlines().count(line) == 1
    assert [facts["prompt"] for facts in facts_in(tmp_path)] == ["", "sun"]
    with pytest.warns(UserWarning, match="an empty prompt is no text at all"):
        Cascade.load(run).sample("  ", steps=1)
    done = cli("sample", "", "--negative-prompt", "sun", "--run", run, "--out", tmp_path / "led",
               "--steps", 1)  # fmt: skip
    assert line.partition(": guidance")[0] in done.stderr.splitlines()  # from "sun" it leads away


def test_the_page_makes_it_too(run):
    request = Request(" ", {"seed": 0, "steps": [1, 1]}, "torch")
    told = list(Generator(run).generate(request, threading.Event()))
    assert isinstance(told[-1], Made)
    assert any("no text at all" in event.sentence for event in told if isinstance(event, Said))


def test_enlarging_without_words_is_the_same_branch(run, tmp_path):
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "in.png")
    pixels = []
    for i, flags in enumerate([(), ("--prompt", ""), ("--prompt", " ")]):
        out = tmp_path / f"{i}.png"
        done = cli("upscale", tmp_path / "in.png", "--run", run, "--steps", 2, "--out", out, *flags)
        assert done.exit_code == 0, done.output
        assert "no text at all" in done.stderr
        pixels.append(np.asarray(Image.open(out)))
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()


@pytest.mark.parametrize("negative", BLANK)
def test_a_negative_prompt_without_words_is_none(run, negative):
    assert make(negative_prompt=negative).negative_prompt is None
    assert make(negative_prompt=negative, cond_scale=1.0) == make(cond_scale=1.0)
