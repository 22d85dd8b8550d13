"""The training state in a checkpoint: a safetensors file for each rank, read by anybody.

DeepSpeed's own checkpoints fit the number of ranks and the ZeRO stage they were saved with, and
are pickles. Here every file says which part of which parameter lies where in it, so that a
checkpoint loads on any number of ranks at any stage, and without DeepSpeed.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagen_scale.errors import CheckpointError

BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit moments
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2**20  # elements that are read at a time


class Fragment(NamedTuple):
    """A run of a parameter's elements and its place in one of a rank's masters."""

    name: str
    start: int  # in the flattened parameter
    numel: int
    offset: int  # in the flattened master


class Share:
    """One master of one file, with its moments and average."""

    def __init__(self, file: Any, index: int, fragments: list[Fragment], keys: list[str],
                 plain: dict[str, Any]) -> None:  # fmt: skip
        self.file, self.index, self.fragments, self.plain = file, index, fragments, plain
        self.keys = keys

    def state_keys(self) -> list[str]:
        """Of the tensors that the optimizer keeps for it."""
        return [key.removeprefix("state/") for key in self.keys if key.startswith("state/")]

    def get(self, key: str) -> Tensor:
        """One tensor: "master", "ema" or "state/..."."""
        return self.file.get_tensor(f"{self.index}/{key}")

    def values(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat "master", an average or a moment of `MOMENTS`."""
        if key not in MOMENTS:
            return self._flat(key, start, stop)
        number = MOMENTS.index(key) + 1
        if f"state/{key}" in self.keys:
            return self._flat(f"state/{key}", start, stop)
        codes = self._flat(f"state/state{number}", start, stop)
        if codes.dtype != torch.uint8:  # bitsandbytes keeps small tensors in fp32
            return codes
        scales = self._flat(f"state/absmax{number}", start // BLOCK, -(-stop // BLOCK))
        scales = scales.repeat_interleave(BLOCK)[start % BLOCK :][: stop - start]
        return self.get(f"state/qmap{number}")[codes.int()] * scales

    def _flat(self, key: str, start: int, stop: int) -> Tensor:
        return self.get(key).view(-1)[start:stop]  # mapped: nothing else of it is read


class SavedShares:
    """Every rank's file of a checkpoint.

    Args:
        folder: The checkpoint, verified.
        files: Closes them.
    """

    def __init__(self, folder: Path, files: ExitStack) -> None:
        from safetensors import safe_open

        self.groups: list[Share] = []
        self.places: dict[str, list[tuple[Fragment, Share]]] = {}
        self.step: int | None = None  # updates made; None before the first
        self.folder = folder
        for path in sorted(folder.glob("rank_*.safetensors")):
            file = files.enter_context(safe_open(path, "pt"))
            facts = file.metadata()
            self.optimizer = facts["optimizer"]
            keys: dict[int, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                index, _, name = key.partition("/")
                keys.setdefault(int(index), []).append(name)
            parts, plain = json.loads(facts["fragments"]), json.loads(facts["plain"])
            for i, (part, values) in enumerate(zip(parts, plain, strict=True)):
                group = Share(file, i, [Fragment(*p) for p in part], keys[i], values)
                self.groups.append(group)
                self.step = values.get("step", self.step)
                for fragment in group.fragments:
                    self.places.setdefault(fragment.name, []).append((fragment, group))

    def find(self, fragments: list[Fragment], numel: int) -> Share | None:
        """The group that is made of just these fragments, with the same padding."""
        for _, group in self.places.get(fragments[0].name, []) if fragments else []:
            if group.fragments == fragments and group.get("master").numel() == numel:
                return group
        return None

    def assemble(self, fragments: list[Fragment], key: str, out: Tensor) -> None:
        """Fills the flat `out` with what its fragments hold; the padding is left as it is."""
        flat = out.view(-1)
        for fragment in fragments:
            for start, values in self._parts(fragment, key):
                place = fragment.offset + start - fragment.start
                flat[place : place + len(values)] = values.to(flat)

    def _parts(self, wanted: Fragment, key: str) -> Iterator[tuple[int, Tensor]]:
        """(First element, values) of pieces that cover a fragment of a parameter."""
        end, covered = wanted.start + wanted.numel, 0
        for fragment, group in self.places.get(wanted.name, []):
            first = max(wanted.start, fragment.start)
            last = min(end, fragment.start + fragment.numel)
            covered += max(0, last - first)
            for start in range(first, last, PIECE):
                stop, shift = min(start + PIECE, last), fragment.offset - fragment.start
                yield start, group.values(key, start + shift, stop + shift)
        if covered != wanted.numel:
            raise CheckpointError(
                f"{self.folder}: {wanted.name} has other sizes than the network of this "
                f"configuration. Undo the change of unets, or start anew with --fresh."
            )
