"""Prompts as the features that stages take, and what of them no stage reads."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from typing import NamedTuple

import numpy as np
import torch

from imagen_scale.data.blank import is_blank
from imagen_scale.data.embeddings import pad_embeddings
from imagen_scale.data.encoder import (
    MAX_TOKENS,
    Embedding,
    TextEncoder,
    encoder_fingerprint,
    encoder_folder,
)
from imagen_scale.errors import CheckpointError, option
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.unread import NotRead, shortened

LendEncoder = Callable[[InferenceFile, torch.device | None], AbstractContextManager[TextEncoder]]


class Prompts(NamedTuple):
    """B encoded prompts."""

    text: Text
    not_read: list[list[NotRead]]  # of each prompt; empty where every U-Net reads all of it


class Encoded(NamedTuple):
    """What B pictures are made from."""

    text: Text
    negative: Text | None  # one prompt that guidance leads away from
    not_read: list[list[NotRead]]  # of each picture's prompts
    notes: tuple[str, ...] = ()  # sentences about what is not read, and about empty prompts


def read_prompts(
    files: Sequence[InferenceFile],
    prompts: Sequence[str],
    negative_prompt: str | None,
    device: torch.device | None = None,
    lend: LendEncoder | None = None,
) -> Encoded:
    """Encodes prompts, and notes what is not read of them.

    Args:
        files: Of the stages that will read them.
        prompts: B captions; an empty one is no text at all.
        negative_prompt: What guidance leads away from.
        device: Where the encoder computes.
        lend: Gives the encoder and takes it back; None loads it for this once.

    Raises:
        CheckpointError: If the encoder at hand is not the one of training.
    """
    groups = {"prompt": prompts}
    if negative_prompt:
        groups["negative_prompt"] = [negative_prompt]
    encoded = encode_groups(files, groups, device, lend)
    sentences = [
        *(cut_sentence(of_option, encoded[what].not_read) for what, of_option in groups.items()),
        blank_sentence(files[0], prompts, is_led=bool(negative_prompt)),
    ]
    notes = tuple(filter(None, sentences))
    text, not_read = encoded["prompt"]
    if not negative_prompt:
        return Encoded(text, None, not_read, notes)
    negative, (lost,) = encoded["negative_prompt"]
    return Encoded(text, negative, [[*of_prompt, *lost] for of_prompt in not_read], notes)


def encode(
    files: Sequence[InferenceFile],
    prompts: Sequence[str],
    what: str = "prompt",
    device: torch.device | None = None,
) -> Prompts:
    """Encodes prompts with the encoder of training; it is freed before a stage is loaded.

    Args:
        files: Of the stages that will read them.
        prompts: B of them; an empty one is the branch without text.
        what: The option they come from.
        device: Where to compute; None takes the first card, if there is one.

    Raises:
        CheckpointError: If the encoder at hand is not the one of training.
    """
    return encode_groups(files, {what: prompts}, device)[what]


def encode_groups(
    files: Sequence[InferenceFile],
    groups: dict[str, Sequence[str]],
    device: torch.device | None = None,
    lend: LendEncoder | None = None,
) -> dict[str, Prompts]:
    """`encode` of several options, with the encoder loaded once.

    What stands beside a prompt in its batch may move the last bits of its features, so the groups
    are encoded one after the other: the later ones leave those before them as they are.

    Raises:
        CheckpointError: If the encoder at hand is not the one of training.
    """
    file = files[0]
    nothing: Embedding = np.zeros((0, file.text_embed_dim), np.float32)
    found = {prompt: nothing for prompts in groups.values() for prompt in prompts
             if is_blank(prompt)}  # fmt: skip
    unread: dict[tuple[str, str], list[NotRead]] = {}
    encoder: TextEncoder | None = None
    with ExitStack() as opened:
        for what, prompts in groups.items():
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
            if new and encoder is None:
                encoder = opened.enter_context((lend or _for_once)(file, device))
            for start in range(0, len(new), file.config.text.batch_size):
                some = new[start : start + file.config.text.batch_size]
                assert encoder is not None
                found |= dict(zip(some, encoder.encode(some), strict=True))
            for prompt in dict.fromkeys(prompts):
                if encoder is not None and not is_blank(prompt):
                    unread[what, prompt] = list(_not_read(encoder, files, what, prompt))
    return {
        what: Prompts(
            Text(*pad_embeddings([found[prompt] for prompt in prompts], MAX_TOKENS)),
            [unread.get((what, prompt), []) for prompt in prompts],
        )
        for what, prompts in groups.items()
    }


def open_encoder(file: InferenceFile, device: torch.device | None) -> TextEncoder:
    """Loads the text encoder that a stage was trained with.

    Raises:
        CheckpointError: If the one at hand is another.
    """
    name = file.config.text_encoder
    folder = encoder_folder(name)
    if encoder_fingerprint(folder) != file.text_fingerprint:
        raise CheckpointError(
            f"{file.path}: trained with another version of the text encoder {name!r} than the "
            f"one in {folder}. Put the original files back, or train again."
        )
    return TextEncoder(folder, device)


def _for_once(file: InferenceFile, device: torch.device | None) -> closing[TextEncoder]:
    # Its memory is the stages' afterwards, whoever allocates it.
    return closing(open_encoder(file, device))


def _not_read(
    encoder: TextEncoder, files: Sequence[InferenceFile], what: str, prompt: str
) -> Iterable[NotRead]:
    for file in files:
        unread = encoder.unread(prompt, file.stage.unet.max_text_len)
        if unread is not None:
            yield NotRead(what, file.unet_number, *unread)


def cut_sentence(prompts: Sequence[str], not_read: Sequence[Sequence[NotRead]]) -> str | None:
    """One sentence about all prompts that are not read to their end; None if there are none.

    Args:
        prompts: B of them.
        not_read: Of each.
    """
    cut = {prompt: lost for prompt, lost in zip(prompts, not_read, strict=True) if lost}
    if not cut:
        return None
    (prompt, lost), *others = cut.items()
    unets: dict[tuple[int, str], list[int]] = {}
    for one in lost:
        unets.setdefault((one.read, one.text), []).append(one.unet)
    parts = [
        f"U-Net {' and '.join(map(str, numbers))} {'read' if len(numbers) > 1 else 'reads'} the "
        f"first {read} of {lost[0].tokens} tokens (max_text_len) and not what begins at "
        f"{shortened(text)!r}"
        for (read, text), numbers in unets.items()
    ]
    more = f"; so it is with {len(others)} more" if others else ""
    return f"{option(lost[0].option)} {shortened(prompt)!r}: {', '.join(parts)}{more}"


def blank_sentence(file: InferenceFile, prompts: Sequence[str], *, is_led: bool) -> str | None:
    """One sentence about empty prompts; None if there are none.

    Args:
        file: Of the first stage.
        prompts: All of them.
        is_led: Whether a negative prompt leads away from another text.
    """
    if not any(map(is_blank, prompts)):
        return None
    share = file.config.imagen.cond_drop_prob
    known = (
        f"as training knew it in {share:.0%} of its samples (imagen.cond_drop_prob)"
        if share
        else "which training never knew (imagen.cond_drop_prob 0)"
    )
    acts = "" if is_led else ": guidance does not act on it"
    return f"an empty {option('prompt')} is no text at all, {known}{acts}"
