"""A run that predicts the noise, trained on until it can teach few steps."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from imagen_scale.config import Config, load_config, parse_config
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.files.atomic import sha256
from imagen_scale.runs.folders import config_path, inference_path
from imagen_scale.runs.inference import InferenceFile, is_finished, read_inference

SHARE = 9  # of its steps one in so many is enough to learn another prediction


class Adaptation(NamedTuple):
    """A run beside another one that starts from its weights and predicts v."""

    run: Path
    config: Config
    reason: str  # why it is needed, in a sentence
    kept: list[InferenceFile]  # of the other one, taken over as they are

    @property
    def by_hand(self) -> list[list[str]]:
        """What each call of training adds that leaves alone the stages that are kept."""
        if not self.kept:
            return [[]]
        kept = {file.unet_number for file in self.kept}
        numbers = [stage.number for stage in self.config.stages()]
        return [["--unet", str(number)] for number in numbers if number not in kept]

    @property
    def is_done(self) -> bool:
        """Whether every stage of it is trained."""
        return all(
            is_finished(inference_path(self.run, stage.number), stage.steps)
            for stage in self.config.stages()
        )

    def lay_out(self, say: Callable[[str], None]) -> None:
        """Makes the run with the stages that are kept, which training then finds trained.

        Args:
            say: Told of each.

        Raises:
            UsageError: If the folder is another thing than a run.
            ConfigError: If it is another run.
        """
        from imagen_scale.training.may_continue import check_run, open_run
        from imagen_scale.training.origin import Origin
        from imagen_scale.training.teacher import take_over

        check_run(self.config, self.run, say, resume=False, fresh=[])
        if not config_path(self.run).is_file():
            open_run(self.config, self.run, fresh=[])
        for file in self.kept:
            if not is_finished(inference_path(self.run, file.unet_number), file.steps):
                take_over(Origin(file, sha256(file.path)), self.run, say)


def adaptation(
    teacher: Path,
    files: Sequence[InferenceFile],
    needed: Sequence[bool],
    overrides: Sequence[str] = (),
) -> Adaptation | None:
    """What has to be trained before a run can teach; None where it can.

    Where a student takes its first step next to nothing of x_t is signal: dividing by it multiplies
    the error of a network that predicts the noise (Salimans & Ho 2022, arXiv:2202.00512, 4).

    Args:
        teacher: The run.
        files: Of its stages.
        needed: Which of them are to teach.
        overrides: Keys to change, as `key=value`; `distill` and its steps are the student's alone.

    Raises:
        UsageError: If it is there already, of other weights than the teacher has or other stages.
    """
    noise = [
        file.unet_number
        for file, is_needed in zip(files, needed, strict=True)
        if is_needed and file.stage.unet.pred_type == "eps"
    ]
    if not noise:
        return None
    data = load_config(config_path(teacher)).model_dump(mode="json")
    # A stage that was kept was trained otherwise than the configuration of its run says.
    data["training"] = files[noise[0] - 1].config.model_dump(mode="json")["training"]
    data["distill"] = None
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
    config = parse_config(
        json.dumps(data),
        source=f"distill {teacher}",
        overrides=tuple(filter(_is_of_both, overrides)),
    )
    _check_origins(run, teacher, files, noise)
    kept = [file for file in files if file.unet_number not in noise]
    return Adaptation(run, config, _reason(teacher, run, config, noise), kept)


def _is_of_both(override: str) -> bool:
    """Whether a change counts here as well; the student has its own steps."""
    key = override.partition("=")[0].strip()
    return key != "training.steps" and key.partition(".")[0] != "distill"


def _reason(teacher: Path, run: Path, config: Config, noise: Sequence[int]) -> str:
    names = " and ".join(f"U-Net {number}" for number in noise)
    most = max(config.stage(number).steps for number in noise)
    return (
        f"{names} of {teacher} predicts the noise, which says nothing of the picture where a "
        f"student's first step is taken: it is trained on as v first, for {most} "
        f"step{'s' if most > 1 else ''}, into {run}"
    )


def _check_origins(
    run: Path, teacher: Path, files: Sequence[InferenceFile], noise: Sequence[int]
) -> None:
    """Refuses an adaptation of weights that the teacher had once, or of other stages of it.

    Raises:
        UsageError: Naming the stage.
    """
    for file in files:
        number = file.unet_number
        try:
            there = read_inference(inference_path(run, number))
        except CheckpointError:
            continue  # training sees to it
        how, origin = "taken over", sha256(there.path)
        if number in noise:
            how, origin = "trained", there.origin_sha256 or ""
        if origin != sha256(file.path):
            raise UsageError(
                f"{run}: its U-Net {number} was not {how} from that of {teacher} as it is now. "
                f"Delete {run} and {run}.json and call this again, which makes them anew; or give "
                f"that run another name."
            )
