"""Rules of the section `distill`, as far as the configuration alone tells."""

import json

from imagen_scale.config.distillation import MAX_STEPS, FewSteps
from imagen_scale.config.schema import Config
from imagen_scale.config.stage import StageConfig


def distill_checks(config: Config) -> list[str]:
    """Every problem of a valid section, in a sentence."""
    if config.distill is None:
        return []
    found = [(stage, stage.few_steps) for stage in config.stages()]
    problems = []
    if all(few is None for _, few in found):
        problems.append(
            "distill.steps: null for every U-Net, so there is nothing to train; give a number."
        )
    for stage, few in found:
        if stage.start_from is not None:
            problems.append(
                f"training.start_from: a student starts from its teacher, {config.distill.teacher}"
                f"; set it to null beside distill."
            )
        if few is not None:
            problems += _of_steps(stage, few) + _of_training(stage)
    return list(dict.fromkeys(problems))


def _of_steps(stage: StageConfig, few: FewSteps) -> list[str]:
    if few.steps > MAX_STEPS:
        return [
            f"distill.steps: {few.steps} for {stage.name}, where an ordinary stage is as good "
            f"untaught; at most {MAX_STEPS}."
        ]
    total = few.steps_of_ordinary_teacher
    if total % few.steps:
        return [
            f"distill.teacher_steps: {total} is no multiple of the {few.steps} steps of "
            f"{stage.name}; write {-(-total // few.steps) * few.steps}, or null."
        ]
    if total > stage.timesteps:
        return [
            f"distill.teacher_steps: {total}, but {stage.name} has {stage.timesteps} times "
            f"(imagen.timesteps); lower it."
        ]
    return []


def _of_training(stage: StageConfig) -> list[str]:
    entry, problems = stage.number - 1, []
    if stage.unet.pred_type == "eps":
        problems.append(
            f"unets.{entry}.pred_type: eps, but where the first step of a student is taken the "
            f"noise says nothing of the picture; distil a teacher that predicts v or x0. One that "
            f"predicts the noise learns v by training.start_from."
        )
    if stage.imagen.loss_type != "l2":
        problems.append(
            f"imagen.loss_type: {stage.imagen.loss_type}, but a student's loss is one of weighted "
            f"squared errors; set it to l2."
        )
    if stage.loss_weight in ("eps", "min_snr", "sigmoid"):
        problems.append(
            f"training.loss_weight: {json.dumps(stage.loss_weight)} counts the first step, from "
            f"noise alone, for nothing; for {stage.name} write null, x0, v or v_clipped."
        )
    return problems
