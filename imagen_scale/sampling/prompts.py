"""Prompts as the features that stages take."""

from collections.abc import Sequence

from imagen_scale.data.embeddings import pad_embeddings
from imagen_scale.data.encoder import (
    MAX_TOKENS,
    Embedding,
    TextEncoder,
    encoder_fingerprint,
    encoder_folder,
)
from imagen_scale.errors import CheckpointError
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.contract import Text


def encode(file: InferenceFile, prompts: Sequence[str]) -> Text:
    """Encodes prompts with the encoder of training; it is freed before a stage is loaded.

    Raises:
        CheckpointError: If the encoder at hand is not the one of training.
    """
    return encode_groups(file, [prompts])[0]


def encode_groups(file: InferenceFile, groups: Sequence[Sequence[str]]) -> list[Text]:
    """`encode` of several groups, with the encoder loaded once.

    What stands beside a prompt in its batch may move the last bits of its features, so the groups
    are encoded one after the other: the later ones leave those before them as they are.

    Raises:
        CheckpointError: If the encoder at hand is not the one of training.
    """
    name = file.config.text_encoder
    folder = encoder_folder(name)
    if encoder_fingerprint(folder) != file.text_fingerprint:
        raise CheckpointError(
            f"{file.path}: trained with another version of the text encoder {name!r} than the "
            f"one in {folder}. Put the original files back, or train again."
        )
    encoder, together = TextEncoder(folder), file.config.text.batch_size
    found: dict[str, Embedding] = {}
    for prompts in groups:
        unique = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        for start in range(0, len(unique), together):
            some = unique[start : start + together]
            found |= dict(zip(some, encoder.encode(some), strict=True))
    return [
        Text(*pad_embeddings([found[prompt] for prompt in prompts], MAX_TOKENS))
        for prompts in groups
    ]
