"""Each rank's share of the training state, saved and taken up again.

A rank copies the pieces of its own share from whichever files hold them (`runs/shares.py`). Where
the share is the one that was saved, everything is copied as it is, and the resumed run is the
uninterrupted one bit for bit.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from imagen_scale.errors import CheckpointError
from imagen_scale.files.tensors import write_tensors
from imagen_scale.planning.setup import WHOLE_MATRICES
from imagen_scale.runs.shares import BLOCK, MOMENTS, Fragment, SavedShares
from imagen_scale.training.ema import EXCHANGE_ELEMENTS, Ema
from imagen_scale.training.engine import Engine
from imagen_scale.training.matrix_optimizers import Muon


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
        saved = SavedShares(folder, files)
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


# Moments in other pieces ------------------------------------------------------------


def _fill_moments(
    optimizer: Any, kind: str, saved: SavedShares, fragments: list[Fragment], master: Tensor
) -> None:
    """Moments of one master, from files where they lie in other pieces or another precision."""
    state = optimizer.state[master]
    if kind != "adamw_8bit":
        dtype = torch.bfloat16 if kind == "adamw_bf16" else torch.float32
        for key in MOMENTS:
            state[key] = torch.zeros_like(master, dtype=dtype)
            saved.assemble(fragments, key, state[key])
    else:
        from bitsandbytes.functional import quantize_blockwise

        optimizer.init_state(optimizer.param_groups[0], master, 0, 0)
        for number, key in enumerate(MOMENTS, 1):
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
