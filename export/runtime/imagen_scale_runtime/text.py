"""Prompts as the denoisers take them."""

from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from .blank import is_blank, says_nothing
from .bundle import Bundle, Conditioned, StageFacts
from .errors import DataError, option
from .graphs import Engine, Graph
from .sampling.unread import NotRead, shortened

REMEMBERED = 256  # prompts


class Features(NamedTuple):
    """A prompt's features, (L, D) float32: of each token, with the marks of its ends."""

    embeds: np.ndarray
    tokens: int  # of the whole prompt
    ends: tuple[int, ...]  # where each token ends in the prompt


class TextReader:
    """The text encoder and the stages' conditioners; the last prompts are remembered.

    Args:
        bundle: Of both.
        engine: Computes them.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine = bundle, engine
        self._tokenizer = Tokenizer.from_file(str(bundle.folder / "tokenizer.json"))
        self._graphs: dict[str, Graph] = {}
        self._features: dict[str, Features] = {}

    def close(self) -> None:
        """Frees the graphs; features stay."""
        self._graphs.clear()

    def read(self, prompt: str) -> Features | None:
        """A prompt's features; None of one without a visible character, which is no text.

        Raises:
            DataError: If it is not Unicode text.
        """
        if is_blank(prompt):
            return None
        if prompt not in self._features:
            if len(self._features) >= REMEMBERED:
                self._features.pop(next(iter(self._features)))
            self._features[prompt] = self._encode(prompt)
        return self._features[prompt]

    def conditioned(self, stage: StageFacts, prompt: str) -> Conditioned:
        """What a stage takes as text, for one picture."""
        features = self.read(prompt)
        if features is None:
            return stage.null_text
        length = stage["max_text_len"]
        kept = features.embeds[:length]
        embeds = np.zeros((1, length, kept.shape[1]), np.float32)
        embeds[0, : len(kept)] = kept
        mask = np.arange(length)[None] < len(kept)
        graph = self._graph(f"{stage['folder']}/conditioner.onnx")
        return Conditioned(*graph({"text_embeds": embeds, "text_mask": mask}))

    def not_read(self, what: str, prompt: str, stages: int) -> list[NotRead]:
        """What stages do not read of a prompt.

        Args:
            what: The option it comes from.
            prompt: That is read.
            stages: How many of them, from the first.
        """
        features = self.read(prompt)
        if features is None:
            return []
        lost = []
        for stage in self.bundle.stages[:stages]:
            read = min(stage["max_text_len"], len(features.ends))
            unread = prompt[max(features.ends[:read]) :]
            if read < features.tokens and not says_nothing(unread):
                lost.append(NotRead(what, stage.number, read, features.tokens, unread.strip()))
        return lost

    def sentences(self, what: str, prompt: str) -> list[str]:
        """The same of all stages, in words."""
        return [
            f"{option(what)} {shortened(prompt)!r}: U-Net {lost.unet} reads the first {lost.read} "
            f"of {lost.tokens} tokens and not what begins at {shortened(lost.text)!r}."
            for lost in self.not_read(what, prompt, len(self.bundle.stages))
        ]

    def _encode(self, prompt: str) -> Features:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{prompt!a}: is not UTF-8 text; write it in UTF-8.") from None
        self._tokenizer.no_truncation()
        whole: Encoding = self._tokenizer.encode(prompt)
        self._tokenizer.enable_truncation(self.bundle.text["max_tokens"])
        read: Encoding = self._tokenizer.encode(prompt)
        ids = np.array([read.ids], np.int64)
        graph = self._graph("text_encoder.onnx")
        (embeds,) = graph({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        ends = tuple(end for _, end in read.offsets)
        return Features(embeds[0], len(whole.ids), ends)

    def _graph(self, name: str) -> Graph:
        if name not in self._graphs:
            self._graphs[name] = self.engine.open(self.bundle.folder / name)
        return self._graphs[name]
