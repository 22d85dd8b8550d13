"""What the machine at hand has."""

import json
from pathlib import Path
from typing import NamedTuple

from imagen_scale.planning.cache import plan_dir

# What the rest of a computer needs when its whole memory is stated.
SYSTEM_BYTES = 2_000_000_000


class Machine(NamedTuple):
    """Memory to plan with, in bytes."""

    name: str  # of the card, or "cpu"
    card: int | None  # free on each card; None without a card: all is host memory then
    ram: int  # available to all ranks of this host together
    ranks: int  # on this host


def this_machine(ranks: int) -> Machine:
    """The machine this process runs on."""
    import psutil
    import torch

    ram = psutil.virtual_memory().available
    if not torch.cuda.is_available():
        return Machine("cpu", None, ram, ranks)
    free, _ = torch.cuda.mem_get_info()
    return Machine(torch.cuda.get_device_name(), free, ram, ranks)


def calibration(name: str) -> float:
    """Measured over predicted peak on cards of this name; 1 when none was measured."""
    try:
        return float(json.loads(_calibration_file().read_text())[name])
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0


def keep_calibration(name: str, ratio: float) -> None:
    """Notes what `train --plan-check` measured, for the next plan."""
    path = _calibration_file()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {name: round(ratio, 4)}, indent=1))


def _calibration_file() -> Path:
    return plan_dir() / "calibration.json"
