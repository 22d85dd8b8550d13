"""A run that predicts the noise, trained on until it can teach few steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from imagen_scale.config import Config, load_config, parse_config
from imagen_scale.runs.folders import config_path, inference_path
from imagen_scale.runs.inference import is_finished

if TYPE_CHECKING:
    from imagen_scale.runs.inference import InferenceFile

SHARE = 9  # of its steps one in so many is enough to learn another prediction


class Adaptation(NamedTuple):
    """A run beside another one that starts from its weights and predicts v."""

    run: Path
    config: Config
    reason: str  # why it is needed, in a sentence

    @property
    def is_done(self) -> bool:
        """Whether every stage of it is trained."""
        return all(
            is_finished(inference_path(self.run, stage.number), stage.steps)
            for stage in self.config.stages()
        )


def adaptation(
    teacher: Path, files: "Sequence[InferenceFile]", needed: Sequence[bool]
) -> Adaptation | None:
    """What has to be trained before a run can teach; None where it can.

    Where a student takes its first step next to nothing of x_t is signal: dividing by it multiplies
    the error of a network that predicts the noise (Salimans & Ho 2022, arXiv:2202.00512, 4).

    Args:
        teacher: The run.
        files: Of its stages.
        needed: Which of them are to teach.
    """
    noise = [
        file.unet_number
        for file, is_needed in zip(files, needed, strict=True)
        if is_needed and file.stage.unet.pred_type == "eps"
    ]
    if not noise:
        return None
    data = load_config(config_path(teacher)).model_dump(mode="json")
    steps = [-(-file.steps // SHARE) for file in files]
    for number in noise:
        data["unets"][number - 1]["pred_type"] = "v"
    data["training"] |= {
        "recipe": None, "start_from": str(teacher), "steps": steps, "warmup_steps": None,
        "ema_widths": [],
    }  # fmt: skip
    data["logging"] |= {"run_dir": None}
    data["imagen"]["only_train_unet_number"] = None
    run = teacher.with_name(f"{teacher.name}_v")
    names = " and ".join(f"U-Net {number}" for number in noise)
    reason = (
        f"{names} of {teacher} predicts the noise, which says nothing of the picture where a "
        f"student's first step is taken: it is trained on as v first, for {max(steps)} "
        f"step{'s' if max(steps) > 1 else ''}, into {run}"
    )
    return Adaptation(run, parse_config(json.dumps(data), source=f"distill {teacher}"), reason)
