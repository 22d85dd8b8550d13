"""What the planner measures of the shipped configurations, so that nobody waits for it.

    python benchmarks/plan_figures.py

writes imagen_scale/planning/figures.json, from nothing, some minutes; a test holds it to what would
be found today. With names of configurations it adds theirs to what is there.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIGS = ("emoji_demo", "pokemon_64", "pokemon_64_256", "cascade_64_256", "imagen_64_256_1024")


def main() -> None:
    """Plans every stage at both widths."""
    names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IMAGEN_SCALE_CACHE"] = folder
        from imagen_scale.planning.cache import FIGURES, plan_dir

        kept = json.loads(FIGURES.read_text()) if names else {}
        FIGURES.unlink(missing_ok=True)
        for name in names or CONFIGS:
            measure(ROOT / "configs" / f"{name}.json")
        found = kept | {
            path.stem: json.loads(path.read_text()) for path in plan_dir().glob("*.json")
        }
        lines = (
            f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(found.items())
        )
        FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{FIGURES}: {len(found)} figures")


def measure(path: Path) -> None:
    """Everything that any plan of a configuration looks up."""
    from imagen_scale.config import load_config
    from imagen_scale.planning.cache import cached_flops, cached_measure
    from imagen_scale.planning.choices import Choices
    from imagen_scale.planning.machine import Machine
    from imagen_scale.planning.planner import MEASURED_BATCHES

    config = load_config(path)
    unset = config.memory.model_copy(update={"checkpointing": None, "offload_activations": None})
    for stage in config.model_copy(update={"memory": unset}).stages():
        for levels, offload in Choices(stage, Machine("", None, 0, 1)).checkpointings():
            cached_flops(stage, checkpointing=levels)
            for precision in ("bf16", "fp32"):
                for batch in MEASURED_BATCHES:
                    cached_measure(
                        stage, precision=precision, micro_batch=batch, checkpointing=levels,
                        offload_activations=offload,
                    )  # fmt: skip
        print(f"{path.name}: {stage.name}", flush=True)


if __name__ == "__main__":
    main()
