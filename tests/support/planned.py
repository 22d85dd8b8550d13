"""What the planner found for the networks of the tests, which would take minutes to find anew.

It is looked up by everything that decides it but the code: as for users, `FORMAT` of
imagen_scale/planning/cache.py stands for that, and a test finds some of it anew. To write it after
a change there or to the tests' networks:

    rm -rf tests/records/plan.json .pytest_cache/imagen-scale/prepared/plan
    make pytest
    PYTHONPATH=tests python -m support.planned
"""

import json
from pathlib import Path

from imagen_scale.config import parse_config
from imagen_scale.planning.activations import Activations
from imagen_scale.planning.cost import step_cost
from imagen_scale.planning.machine import Machine
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.setup import Setup
from support import ROOT
from support.tiny import TINY

RECORD = ROOT / "tests" / "records" / "plan.json"


GB = 10**9
SMALL_CARD = Machine("a 12 GB card", 12 * GB, 62 * GB, 1)


def plan(config, index=0, machine=SMALL_CARD, **options):
    return Planner(config.stage(index + 1), machine, **options).plan()


def tiny(*overrides):
    return parse_config(json.dumps(TINY), overrides=("imagen.image_sizes=[16,32]", *overrides))


def cost_of(teacher_forward=None, **changes):
    activations = Activations(1000, 10, 300, 500, 900, 0)
    base = {
        "ranks": 1, "micro_batch": 2, "accumulation": 1, "precision": "bf16",
        "checkpointing": ("norms",), "offload_activations": False, "optimizer": "adamw",
        "in_backward": False, "ema_offload": False,
        "zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 100},
    }  # fmt: skip
    setup = Setup(**base | changes)
    return step_cost(setup, activations, on_card=False, teacher_forward=teacher_forward)


def recorded() -> dict[str, object]:
    """Figures by the name of the planner's file."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def lay_out(folder: Path) -> None:
    """Writes the planner's files where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in recorded().items():
        if not (folder / f"{name}.json").exists():
            (folder / f"{name}.json").write_text(json.dumps(value))


def record(folder: Path) -> None:
    """Writes the record from the planner's files."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("?" * 32 + ".json")}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(found.items()))
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record(ROOT / ".pytest_cache" / "imagen-scale" / "prepared" / "plan")
