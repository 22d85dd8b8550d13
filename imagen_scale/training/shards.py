"""Each rank's share of the training state in one safetensors file that any other share can read.

DeepSpeed's own checkpoints fit the number of ranks and the ZeRO stage they were saved with, and
are pickles. Here every file says which part of which parameter lies where in it, so that a
checkpoint loads on any number of ranks at any stage: a rank copies the pieces of its own share
from whichever files hold them. Where the share is the one that was saved, everything is copied as
it is, and the resumed run is the uninterrupted one bit for bit.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from imagen_scale.errors import CheckpointError
from imagen_scale.files.tensors import write_tensors
from imagen_scale.planning.setup import WHOLE_MATRICES
from imagen_scale.training.ema import EXCHANGE_ELEMENTS, Ema
from imagen_scale.training.engine import Engine, Fragment
from imagen_scale.training.matrix_optimizers import Muon

BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit moments
_MOMENTS = ("exp_avg", "exp_avg_sq")


def file_name(rank: int) -> str:
    """Name of the file with a rank's share inside a checkpoint."""
    return f"rank_{rank:04d}.safetensors"


def state_bytes(engine: Engine, averages: Sequence[Ema]) -> int:
    """Size of this rank's share on disk."""
    return sum(tensor.nbytes for _, tensor in _tensors(engine, averages)[0]) + 2**16


def save_shard(engine: Engine, averages: Sequence[Ema], optimizer: str, path: Path) -> None:
    """Writes this rank's masters, moments and averages; one tensor at a time.

    Args:
        engine: Whose share.
        averages: Of its weights.
        optimizer: Its name in the configuration.
        path: The file.
    """
    tensors, plain = _tensors(engine, averages)
    write_tensors(
        path,
        {key: (tensor.dtype, tensor.shape) for key, tensor in tensors},
        tensors,
        {
            "optimizer": optimizer,
            "fragments": json.dumps(engine.fragments()),
            "plain": json.dumps(plain),
        },
    )


@torch.no_grad()
def load_shards(engine: Engine, averages: Sequence[Ema], optimizer: str, folder: Path) -> None:
    """Takes this rank's share out of a checkpoint, whatever shares it was saved in.

    `Engine.publish` has to follow on every rank.

    Masters and averages are copied; so are moments, unless they were saved in another precision or
    divided otherwise in 8 bits: then they pass through fp32.

    Args:
        engine: Freshly built.
        averages: Of its weights, those that were saved.
        optimizer: Its name in the configuration.
        folder: With every rank's file, all verified.

    Raises:
        CheckpointError: If the checkpoint is of another network, or its moments mean nothing to
            this optimizer.
    """
    with ExitStack() as files:
        saved = _Saved(folder, files)
        if saved.optimizer != optimizer and {saved.optimizer, optimizer} & set(WHOLE_MATRICES):
            raise CheckpointError(
                f"{folder}: saved with training.optimizer {saved.optimizer}, whose state means "
                f"nothing to {optimizer}. Continue it with {saved.optimizer}."
            )
        for i, ours in enumerate(engine.fragments()):
            master, owner = averages[0].masters[i], engine.optimizer_of(i)
            shards = zip(_names(averages), (ema.shards[i] for ema in averages), strict=True)
            state = owner.state[master]
            same = saved.find(ours, master.numel())
            state.clear()
            if same is not None and saved.optimizer == optimizer:
                master.view(-1).copy_(same.get("master").view(-1))
                for name, shard in shards:
                    shard.view(-1).copy_(same.get(name).view(-1))
                for key in same.state_keys():
                    value = same.get(f"state/{key}")
                    state[key] = torch.empty_like(value, device=master.device).copy_(value)
                state |= same.plain
                _give_step(owner, state, state.pop("step", None), master)
            else:
                saved.assemble(ours, "master", master)
                for name, shard in shards:
                    saved.assemble(ours, name, shard)
                if saved.step is not None:
                    _fill_moments(owner, optimizer, saved, ours, master)


# What a rank holds ------------------------------------------------------------------------------


def _tensors(
    engine: Engine, averages: Sequence[Ema]
) -> tuple[list[tuple[str, Tensor]], list[dict[str, Any]]]:
    """Everything in the order of the file, and what of the states is no tensor, by master."""
    tensors: list[tuple[str, Tensor]] = []
    plain: list[dict[str, Any]] = []
    for i, master in enumerate(averages[0].masters):
        tensors.append((f"{i}/master", master))
        for name, ema in zip(_names(averages), averages, strict=True):
            tensors.append((f"{i}/{name}", ema.shards[i]))
        plain.append({})
        for key, value in engine.optimizer_of(i).state[master].items():
            if key == "step":
                plain[i][key] = int(value)
            elif isinstance(value, Tensor):
                tensors.append((f"{i}/state/{key}", value))
            else:
                plain[i][key] = value
    return tensors, plain


def _names(averages: Sequence[Ema]) -> list[str]:
    """What each is called in a file: "ema", "ema_1", ..."""
    return ["ema", *(f"ema_{number}" for number in range(1, len(averages)))]


def _give_step(
    optimizer: Optimizer, state: dict[str, Any], step: int | None, master: Tensor
) -> None:
    """Writes the count of updates as the optimizer keeps it: torch's as a tensor."""
    if step is None:
        return
    if isinstance(optimizer, torch.optim.AdamW | Muon):  # a fused one counts where its parameter is
        state["step"] = torch.tensor(float(step), device=master.device)
    elif isinstance(optimizer, torch.optim.Adafactor):
        state["step"] = torch.tensor(float(step))
    else:
        state["step"] = step


# What was saved ---------------------------------------------------------------------------------


class _Group:
    """One master of one file, with its moments and average."""

    def __init__(self, file: Any, index: int, fragments: list[Fragment], keys: list[str],
                 plain: dict[str, Any]) -> None:  # fmt: skip
        self.file, self.index, self.fragments, self.plain = file, index, fragments, plain
        self.keys = keys

    def state_keys(self) -> list[str]:
        return [key.removeprefix("state/") for key in self.keys if key.startswith("state/")]

    def get(self, key: str) -> Tensor:
        return self.file.get_tensor(f"{self.index}/{key}")

    def values(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat "master", an average or a moment of `_MOMENTS`."""
        if key not in _MOMENTS:
            return self._flat(key, start, stop)
        number = _MOMENTS.index(key) + 1
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


class _Saved:
    """Every rank's file of a checkpoint."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        from safetensors import safe_open

        self.groups: list[_Group] = []
        self.places: dict[str, list[tuple[Fragment, _Group]]] = {}
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
                group = _Group(file, i, [Fragment(*p) for p in part], keys[i], values)
                self.groups.append(group)
                self.step = values.get("step", self.step)
                for fragment in group.fragments:
                    self.places.setdefault(fragment.name, []).append((fragment, group))

    def find(self, fragments: list[Fragment], numel: int) -> _Group | None:
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
            for start in range(first, last, EXCHANGE_ELEMENTS):
                stop, shift = min(start + EXCHANGE_ELEMENTS, last), fragment.offset - fragment.start
                yield start, group.values(key, start + shift, stop + shift)
        if covered != wanted.numel:
            raise CheckpointError(
                f"{self.folder}: {wanted.name} has other sizes than the network of this "
                f"configuration. Undo the change of unets, or start anew with --fresh."
            )


def _fill_moments(
    optimizer: Any, kind: str, saved: _Saved, fragments: list[Fragment], master: Tensor
) -> None:
    """Moments of one master, from files where they lie in other pieces or another precision."""
    state = optimizer.state[master]
    if kind != "adamw_8bit":
        dtype = torch.bfloat16 if kind == "adamw_bf16" else torch.float32
        for key in _MOMENTS:
            state[key] = torch.zeros_like(master, dtype=dtype)
            saved.assemble(fragments, key, state[key])
    else:
        from bitsandbytes.functional import quantize_blockwise

        optimizer.init_state(optimizer.param_groups[0], master, 0, 0)
        for number, key in enumerate(_MOMENTS, 1):
            whole = torch.zeros(master.numel(), device=master.device)
            saved.assemble(fragments, key, whole)
            if f"absmax{number}" not in state:  # small tensors stay in fp32
                state[f"state{number}"].view(-1).copy_(whole)
                continue
            for start in range(0, whole.numel(), EXCHANGE_ELEMENTS):
                values = whole[start : start + EXCHANGE_ELEMENTS]
                quantised, scale = quantize_blockwise(
                    values, code=state[f"qmap{number}"], blocksize=BLOCK
                )
                first = start // BLOCK
                state[f"state{number}"].view(-1)[start : start + len(values)] = quantised.view(-1)
                state[f"absmax{number}"][first : first + len(scale.absmax)] = scale.absmax
    _give_step(optimizer, state, saved.step, master)
