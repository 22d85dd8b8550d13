"""`imagen-scale distill`: from a trained run to one that takes few steps."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import Number, PerStage, whole_number
from imagen_scale.commands.train import (
    command_here,
    run_launcher,
    start,
    training_words,
)
from imagen_scale.config.distillation import MAX_STEPS
from imagen_scale.errors import ConfigError, UsageError, option

if TYPE_CHECKING:
    from imagen_scale.commands.adapting import Adaptation
    from imagen_scale.config import Config
    from imagen_scale.runs.inference import InferenceFile

SHARE = 0.1  # of the teacher's training, unless it is said
RATE = 0.25  # of the teacher's peak
SHORT = 5000  # steps of a training, up to which the average is short as well
KEEP = "keep"


class Steps(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Steps of a stage, or that it is taken over as it is."""

    name = "steps"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """A number, or None to keep the stage."""
        if value == KEEP:
            return KEEP
        if 1 <= (number := whole_number(str(value))) <= MAX_STEPS:
            return number
        self.fail(f"{value!r}: give 1 to {MAX_STEPS}, or {KEEP}.", param, ctx)


@click.command(short_help="Teach a run's stages to take few steps.")
@click.argument("run")
@click.option(
    "--steps", type=PerStage(Steps()), required=True,
    help=f"Steps that each stage is to take, or {KEEP} to take it over as it is.",
)  # fmt: skip
@click.option(
    "--cond-scale", type=PerStage(Number()),
    help="Guidance that becomes part of a stage; 1 is none. A single value is the base stage's, "
    "and the others take 1. A run of few steps has it built in already.",
)  # fmt: skip
@click.option("--to", help="Name of the new run, beside RUN; default RUN_steps and the steps.")
@click.option(
    "--train-steps", type=click.IntRange(min=1),
    help="Optimizer steps of each stage; default a tenth of its teacher's.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key.")
@click.option("--gpus", type=click.IntRange(min=1), help="As for `train`.")
@click.option(
    "--dry-run", is_flag=True, help="Print the configuration and the launcher's command line."
)
@user_errors
def distill(
    run: str,
    steps: Any,
    cond_scale: Any,
    to: str | None,
    train_steps: int | None,
    overrides: tuple[str, ...],
    gpus: int | None,
    dry_run: bool,
) -> None:
    """Teach the stages of RUN to take few steps, without guidance: a new run, beside it.

    The stages of RUN are the teachers, and what the new ones start from. Its configuration is
    written beside the new run, which is trained like any other; the same command continues it. A
    run of few steps may teach fewer. A stage that is to teach and predicts the noise is trained on
    as v first, for a ninth of its steps, into RUN_v; --set counts there too, but for `distill` and
    `training.steps`.

    \b
        imagen-scale distill runs/emoji_demo --steps 4,keep --cond-scale 2
        imagen-scale distill emoji_demo_steps4-keep --steps 2,keep
    """
    from imagen_scale.runs.folders import find_run

    teacher = find_run(run)
    from imagen_scale.commands.adapting import adaptation
    from imagen_scale.config import dump_config, parse_config
    from imagen_scale.runs.inference import read_stages

    files = read_stages(teacher, allow_unfinished=False)
    wanted = _one_for_each("steps", steps, len(files))
    if to is not None and (to != Path(to).name or to == ".."):
        raise UsageError(f"--to {to}: is a name, of a folder beside {teacher}; leave paths out.")
    folder = teacher.parent / (to or _name(teacher, wanted))
    _guidance(files, wanted, cond_scale)  # refused before anything is trained
    lengths = [train_steps or max(1, round(SHARE * file.steps)) for file in files]
    if first := adaptation(teacher, files, [one != KEEP for one in wanted], overrides):
        click.echo(f"{first.reason}{'; it is there already' if first.is_done else ''}", err=True)
        if not first.is_done:
            _adapt(first, gpus, dry_run=dry_run)
            if dry_run:
                return
        teacher, files = first.run, read_stages(first.run, allow_unfinished=False)
    data = _configuration(teacher, files, wanted, cond_scale, lengths)
    config = parse_config(json.dumps(data), source=f"distill {teacher}", overrides=overrides)
    _check_teachers(config, folder)
    path = folder.with_name(f"{folder.name}.json")
    command = command_here(training_words(path, folder), gpus, folder)
    if dry_run:
        click.echo(dump_config(config), nl=False)
        click.echo(shlex.join(command))
        return
    _keep(path, config)
    start(command, folder)


def _keep(path: Path, config: "Config") -> None:
    """Writes a new run's configuration, where it is not there from an earlier call.

    Raises:
        UsageError: If the file there is another one.
    """
    from imagen_scale.config import dump_config, load_config
    from imagen_scale.files.atomic import write_atomically

    if path.exists():
        try:
            is_same = load_config(path) == config
        except ConfigError:
            is_same = False
        if not is_same:
            raise UsageError(
                f"{path}: exists already and says something else. Train with it as it is, "
                f"`imagen-scale train {shlex.quote(str(path))}`; delete it; or name another run "
                f"with --to."
            )
        return
    text = dump_config(config)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    click.echo(f"written: {path}", err=True)


def _adapt(first: "Adaptation", gpus: int | None, *, dry_run: bool) -> None:
    """Trains what can teach, or shows how; this program ends with a training that fails."""
    from imagen_scale.config import dump_config

    path = first.run.with_name(f"{first.run.name}.json")
    command = command_here(training_words(path, first.run), gpus, first.run)
    if dry_run:
        click.echo(dump_config(first.config), nl=False)
        for words in first.by_hand:
            click.echo(shlex.join([*command, *words]))
        return
    _keep(path, first.config)
    first.lay_out(lambda said: click.echo(said, err=True))
    if code := run_launcher(command, first.run):
        sys.exit(code)


def _name(teacher: Path, wanted: list[Any]) -> str:
    """A name that says what the steps are, and not those of the teacher."""
    return re.sub(r"_steps[\w-]+$", "", teacher.name) + "_steps" + "-".join(map(str, wanted))


def _one_for_each(name: str, value: Any, count: int) -> list[Any]:
    """A value for each stage, where one counts for all.

    Raises:
        UsageError: If there are more or fewer.
    """
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise UsageError(
            f"{option(name)}: {len(values)} values for {count} stages. Give one per stage, or a "
            f"single one."
        )
    return values


def _guidance(files: "list[InferenceFile]", wanted: list[Any], given: Any) -> list[float]:
    """What is built into each stage.

    Raises:
        UsageError: If it is not said for the base, where it matters most, or another one is built
            in already.
    """
    own = [file.stage.few_steps for file in files]
    values = given if isinstance(given, list) else [given, *[None] * (len(files) - 1)]
    values = _one_for_each("cond_scale", values, len(files))
    if values[0] is None and wanted[0] != KEEP and own[0] is None:
        raise UsageError(
            f"{option('cond_scale')}: say the guidance that becomes part of U-Net 1, e.g. 3; 1 is "
            f"none. It cannot be chosen any more when pictures are made."
        )
    for number, (few, value) in enumerate(zip(own, values, strict=True), start=1):
        if few and value not in (None, few.cond_scale):
            raise UsageError(
                f"{option('cond_scale')}: {value:g} for U-Net {number}, but guidance "
                f"{few.cond_scale:g} is built into it already; leave it out, or distil the run "
                f"that it learned from, {few.teacher}."
            )
    return [
        few.cond_scale if few else 1.0 if value is None else value
        for few, value in zip(own, values, strict=True)
    ]


def _configuration(
    teacher: Path,
    files: "list[InferenceFile]",
    wanted: list[Any],
    cond_scale: Any,
    lengths: list[int],
) -> dict[str, Any]:
    """The teacher's configuration with what makes it a student's, to be trained for `lengths`."""
    from imagen_scale.config import load_config
    from imagen_scale.runs.folders import config_path

    config = load_config(config_path(teacher))
    data: dict[str, Any] = config.model_dump(mode="json")
    count = [
        # What is taken over is trained as it was.
        file.steps if steps == KEEP else length
        for file, steps, length in zip(files, wanted, lengths, strict=True)
    ]
    learned = [n for n, steps in zip(count, wanted, strict=True) if steps != KEEP]
    longest = max(learned, default=1)
    taught = [
        file.stage.few_steps for file, steps in zip(files, wanted, strict=True) if steps != KEEP
    ]
    data["distill"] = {
        "teacher": str(teacher),
        "steps": [None if steps == KEEP else steps for steps in wanted],
        "cond_scale": _guidance(files, wanted, cond_scale),
        "spacing": next((few.spacing for few in taught if few), "middle"),
    }
    data["training"] |= {
        "recipe": None,
        "loss_weight": "v_clipped",
        "start_from": None,
        "steps": count,
        # A student's teacher was trained at a small rate already.
        "lr": [stage.lr * (RATE if config.distill is None else 1) for stage in config.stages()],
        "weight_decay": 0.0,
        "warmup_steps": None,
        "lr_schedule": "cosine",
        "ema_decay": 0.99 if longest <= SHORT else 0.999,
        "ema_widths": [],
        # The other measure is of noise levels that few steps do not know.
        "keep_best": config.training.keep_best and "val_loss",
    }
    often = max(1, longest // 20)
    data["logging"] |= {"run_dir": None, "log_every": min(config.logging.log_every, often)}
    data["imagen"] |= {"only_train_unet_number": None, "loss_type": "l2"}  # which is weighted
    return data


def _check_teachers(config: "Config", folder: Path) -> None:
    """Refuses here, in one sentence, what every process of the training would refuse."""
    from imagen_scale.training.teacher import find_teacher

    for number in range(1, len(config.unets) + 1):
        find_teacher(config, number, folder)
