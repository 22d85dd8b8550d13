"""What the machine at hand has."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.kept import read_kept
from imagen_scale.models.card import has_bf16
from imagen_scale.models.host import host_memory
from imagen_scale.planning.cache import plan_dir

# What the rest of a computer needs when its whole memory is stated.
SYSTEM_BYTES = 2_000_000_000
# Of CUDA's context, which exists before a process can ask what is free; the plan counts it with
# the rest of what a process takes. Not measured by this project: the least that drivers report.
CONTEXT_BYTES = 300_000_000
# Between cards of one computer without NVLink or peer-to-peer copies: through host memory, half
# of PCIe 4.0 x16. Assumed; training measures it.
LINK_BYTES_PER_S = 6e9


class Machine(NamedTuple):
    """Memory to plan with, in bytes: of one machine, or the least that any of several has."""

    name: str  # of the card, or "cpu"
    card: int | None  # for each process; None without a card: all is host memory then
    ram: int  # available to all processes of one machine together
    ranks: int  # processes of the whole training
    local_ranks: int = 0  # of them on one machine, at most; 0 for all
    auto_precision: str = "bf16"  # what `training.precision` "auto" means
    link: float = LINK_BYTES_PER_S  # what each card sends and receives, bytes per second

    def share(self, nbytes: int) -> int:
        """What one machine holds of something that all ranks hold together."""
        return -(-nbytes * (self.local_ranks or self.ranks) // self.ranks)


def this_machine(ranks: int) -> Machine:
    """The machine this process runs on."""
    import torch

    ram = host_memory().available
    if not torch.cuda.is_available():
        return Machine("cpu", None, ram, ranks, auto_precision="fp32")
    free, _ = torch.cuda.mem_get_info()
    precision = "bf16" if has_bf16() else "fp16"
    return Machine(
        torch.cuda.get_device_name(), free + CONTEXT_BYTES, ram, ranks, auto_precision=precision
    )


def joined(found: Sequence[tuple[str, Machine]]) -> Machine:
    """What a training may count on that runs on all of these.

    Args:
        found: Of every rank the name of its machine and what it sees there.
    """
    hosts = [host for host, _ in found]
    machines = [machine for _, machine in found]
    cards = [machine.card for machine in machines]
    precisions = {machine.auto_precision for machine in machines}
    return machines[0]._replace(
        card=None if None in cards else min(card for card in cards if card is not None),
        ram=min(machine.ram for machine in machines),
        link=min(machine.link for machine in machines),
        local_ranks=max(hosts.count(host) for host in hosts),
        # All compute alike, so the oldest card decides.
        auto_precision=next(p for p in ("fp32", "fp16", "bf16") if p in precisions),
    )


def calibration(name: str) -> float:
    """Measured over predicted peak on cards of this name; 1 when none was measured."""
    return (read_kept(_calibration_file(), dict[str, float]) or {}).get(name, 1.0)


def keep_calibration(name: str, ratio: float) -> None:
    """Notes what `train --plan-check` measured, for the next plan."""
    path = _calibration_file()
    known = read_kept(path, dict[str, float]) or {}
    text = json.dumps(known | {name: round(ratio, 4)}, indent=1)
    with suppress(OSError):  # without a cache the next plan is the prediction again
        write_atomically(path, lambda temporary: temporary.write_text(text))


def _calibration_file() -> Path:
    return plan_dir() / "calibration.json"
