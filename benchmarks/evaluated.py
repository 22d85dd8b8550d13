"""What `imagen-scale evaluate` finds of a run."""

import json
import subprocess
from pathlib import Path
from typing import Any

from imagen_scale.runs.folders import evaluation_path


def evaluated(run: Path, num: int, steps: int, *words: str) -> dict[str, Any]:
    """The facts of its evaluation.json, KID included.

    Args:
        run: The run's folder.
        num: Captions at most; held-out ones where there are any.
        steps: Of sampling.
        words: Further options.
    """
    command = ["imagen-scale", "evaluate", "--run", str(run), "--num", str(num), "--steps",
               str(steps), "--features", "efficientnet-lite0", *words]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    facts: dict[str, Any] = json.loads(evaluation_path(run).read_text())
    return facts
