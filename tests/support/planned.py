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

from support import ROOT

RECORD = ROOT / "tests" / "records" / "plan.json"


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
