"""The `imagen-scale` command; torch is imported only inside the commands that need it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from imagen_scale_export.cli import export

from imagen_scale import __version__
from imagen_scale.command_errors import user_errors
from imagen_scale.errors import UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    r"""Train, on the hardware you have, a cascade that turns text into pictures; then sample it.

    Training itself starts with DeepSpeed's launcher:

    \b
        deepspeed launch/train.py --config configs/cascade_64_256.json
    """


main.add_command(export)

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key, e.g. data.flip=true.",
)
run_option = click.option("--run", help="Folder of the run; default the newest under runs/.")
unfinished_option = click.option(
    "--allow-unfinished", is_flag=True, help="Accept stages whose training has not ended."
)

steps_option = click.option(
    "--steps", type=click.IntRange(min=1), default=50, show_default=True, help="Steps per stage."
)
cond_scale_option = click.option(
    "--cond-scale", type=float, default=3.0, show_default=True, help="Guidance of the base stage."
)


@main.group()
def config() -> None:
    """Check a configuration file, or print what one may hold."""


@config.command("check")
@click.argument("file")
@set_option
@user_errors
def config_check(file: str, overrides: tuple[str, ...]) -> None:
    """Say whether FILE is a valid configuration; every problem is listed at once."""
    from imagen_scale.config import load_config

    checked = load_config(file, overrides)
    sizes = " -> ".join(map(str, checked.imagen.image_sizes))
    click.echo(f"{file}: valid; {len(checked.unets)} U-Net(s), {sizes} px.")


@config.command("schema")
@user_errors
def config_schema() -> None:
    """Print the JSON schema of a configuration, for editors."""
    from imagen_scale.config import Config

    click.echo(json.dumps(Config.model_json_schema(), indent=2))


@main.command()
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@set_option
@user_errors
def prepare(config_path: str, overrides: tuple[str, ...]) -> None:
    """Resize pictures and encode captions once, before training needs them."""
    from imagen_scale.config import load_config

    checked = load_config(config_path, overrides)
    from imagen_scale.data.dataset import cache_dir, split_indices
    from imagen_scale.data.dataset import prepare as prepare_data

    with _Progress() as progress:
        prepared = prepare_data(checked, progress=progress)
    train, val = split_indices(prepared.source.keys, checked.data.val_fraction)
    unique = len(set(prepared.source.captions))
    click.echo(
        f"{len(prepared.source)} pictures ({len(train)} to train on, {len(val)} held out), "
        f"{unique} distinct captions, prepared in {cache_dir(checked)}"
    )
    click.echo(f"which pictures were left out, and why: {prepared.report}")
    if prepared.source.attribution:
        click.echo(prepared.source.attribution)


@main.command()
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@set_option
@click.option("--memory", help="Memory of each card, e.g. 12GB; default what this one has free.")
@click.option("--ram", help="Memory of the computer, e.g. 32GB; default what is available here.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--unet", type=click.IntRange(min=1), help="Plan this U-Net only.")
@click.option("--explain", is_flag=True, help="Say what was not chosen, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--write", type=click.Path(), help="Folder for DeepSpeed's JSON of each U-Net.")
@user_errors
def plan(
    config_path: str,
    overrides: tuple[str, ...],
    memory: str | None,
    ram: str | None,
    gpus: int,
    unet: int | None,
    explain: bool,
    as_json: bool,
    write: str | None,
) -> None:
    r"""Say how much memory training will take, and choose what fits, before it is spent.

    What the configuration writes is kept; what it leaves null is chosen. Exit code 1 when a stage
    does not fit.

    \b
        imagen-scale plan --config configs/cascade_64_256.json --memory 12GB --ram 32GB
    """
    from imagen_scale.config import load_config

    checked = load_config(config_path, overrides)
    card_bytes, ram_bytes = _size("--memory", memory), _size("--ram", ram)
    numbers = [unet] if unet else list(range(1, len(checked.unets) + 1))
    if unet is not None and unet > len(checked.unets):
        raise UsageError(f"--unet {unet}: this cascade has U-Nets 1 to {len(checked.unets)}.")
    from imagen_scale.planning.machine import SYSTEM_BYTES, calibration, this_machine
    from imagen_scale.planning.planner import Planner, text_width
    from imagen_scale.planning.report import as_dict, print_plan

    machine = this_machine(gpus)
    if card_bytes is not None:
        machine = machine._replace(card=card_bytes)
    if ram_bytes is not None:
        machine = machine._replace(ram=ram_bytes - SYSTEM_BYTES)
    ratio = calibration(machine.name)
    width = text_width(checked)
    plans = []
    with _Progress() as progress:
        for done, number in enumerate(numbers):
            progress("planning", done, len(numbers))
            plans.append(Planner(checked, number - 1, width, machine, ratio=ratio).plan())
    if write is not None:
        _write_deepspeed(Path(write), checked, plans)
    if as_json:
        click.echo(json.dumps([as_dict(plan, ratio) for plan in plans], indent=1))
    else:
        from rich.console import Console

        print_plan(
            plans, checked, machine, Console(highlight=False, soft_wrap=True),
            ratio=ratio, explain=explain,
        )  # fmt: skip
    if any(plan.fault for plan in plans):
        sys.exit(1)


def _size(option: str, text: str | None) -> int | None:
    from imagen_scale.config import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from None


def _write_deepspeed(folder: Path, checked: Any, plans: list[Any]) -> None:
    from imagen_scale.training.distributed import engine_config

    folder.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        settings = engine_config(checked, plan.choice.setup, plan.choice.activations.num_parameters)
        path = folder / f"unet{plan.unet_number}_deepspeed.json"
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        click.echo(f"written: {path}", err=True)


@main.command()
@click.argument("prompts", nargs=-1)
@run_option
@click.option("--from-file", type=click.Path(), help="One prompt per line.")
@click.option("--out", help="Folder for the pictures; default samples/ in the run.")
@click.option(
    "--num", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures per prompt."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Same seed, same picture.",
)
@steps_option
@cond_scale_option
@click.option(
    "--sr-cond-scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Guidance of the other stages.",
)
@click.option("--sampler", type=click.Choice(["ddim", "ddpm"]), default="ddim", show_default=True)
@click.option("--unet-limit", type=int, help="Stop after this U-Net.")
@unfinished_option
@user_errors
def sample(
    prompts: tuple[str, ...],
    run: str | None,
    from_file: str | None,
    out: str | None,
    num: int,
    seed: int,
    steps: int,
    cond_scale: float,
    sr_cond_scale: float,
    sampler: Any,
    unet_limit: int | None,
    allow_unfinished: bool,
) -> None:
    r"""Make pictures from PROMPTS with a trained run.

    \b
        imagen-scale sample "red heart" "grinning cat" --cond-scale 3
    """
    all_prompts = [*prompts, *(_read_prompts(from_file) if from_file else [])]
    if not all_prompts:
        raise UsageError("no prompt: give one or more in quotes, or a file with --from-file.")
    from imagen_scale.checkpoint import find_run

    run_dir = find_run(run)
    from imagen_scale.cascade import Cascade, to_uint8
    from imagen_scale.pictures import save_grid, save_png

    cascade = Cascade.load(run_dir, unet_limit=unet_limit, allow_unfinished=allow_unfinished)
    folder = Path(out) if out else run_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)  # refused now rather than after the work
    with _Progress() as progress:
        outputs = cascade.sample(
            all_prompts,
            seed=seed,
            num=num,
            steps=steps,
            cond_scale=cond_scale,
            sr_cond_scale=sr_cond_scale,
            sampler=sampler,
            on_step=lambda unet, done, total: progress(f"U-Net {unet}", done, total),
        )
    captions = [prompt for prompt in all_prompts for _ in range(num)]
    stages = [to_uint8(images) for images in outputs]
    first = _next_number(folder)
    for i, (caption, image) in enumerate(zip(captions, stages[-1], strict=True)):
        path = folder / f"{first + i:05d}.png"
        save_png(path, image)
        facts = {"prompt": caption, "seed": seed + i % num, "steps": steps, "sampler": sampler,
                 "cond_scale": cond_scale, "sr_cond_scale": sr_cond_scale}  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(facts, ensure_ascii=False, indent=1))
    grid = folder / f"grid_{first:05d}.png"
    save_grid(grid, stages, captions)
    click.echo(f"{len(captions)} pictures in {folder}, all of them in {grid}")


@main.command()
@run_option
@click.option(
    "--num",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Captions used at most.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@steps_option
@cond_scale_option
@unfinished_option
@user_errors
def evaluate(
    run: str | None, num: int, seed: int, steps: int, cond_scale: float, allow_unfinished: bool
) -> None:
    """Measure a trained run on its own training captions; writes evaluation.json."""
    from imagen_scale.checkpoint import find_run, write_atomically

    run_dir = find_run(run)
    from imagen_scale.cascade import Cascade
    from imagen_scale.data.dataset import prepare as prepare_data
    from imagen_scale.data.dataset import split_indices
    from imagen_scale.evaluation import evaluate as measure

    cascade = Cascade.load(run_dir, allow_unfinished=allow_unfinished)
    run_config = cascade.files[0].config
    with _Progress() as progress:
        prepared = prepare_data(run_config, progress=progress)
        indices = split_indices(prepared.source.keys, run_config.data.val_fraction)[0][:num]
        result = measure(
            cascade, prepared, indices, seed=seed, steps=steps, cond_scale=cond_scale,
            on_step=lambda unet, done, total: progress(f"U-Net {unet}", done, total),
        )  # fmt: skip
    report = run_dir / "evaluation.json"
    facts = {**result._asdict(), "seed": seed, "steps": steps, "cond_scale": cond_scale}
    write_atomically(report, lambda temporary: temporary.write_text(json.dumps(facts, indent=1)))
    for stage, accuracy in enumerate(result.retrieval_accuracy, start=1):
        click.echo(
            f"U-Net {stage}: the nearest real picture is the prompted one for {accuracy:.1%} of "
            f"{result.captions} captions (chance {result.retrieval_chance:.1%})"
        )
    both = zip(result.sr_psnr_db, result.bicubic_psnr_db, strict=True)
    for stage, (ours, bicubic) in enumerate(both, start=2):
        click.echo(
            f"U-Net {stage}: super-resolution {ours:.2f} dB PSNR, bicubic {bicubic:.2f} dB "
            f"({ours - bicubic:+.2f} dB)"
        )
    click.echo(f"written to {report}")


def _read_prompts(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--from-file {path}: cannot be read: {reason}.") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--from-file {path}: holds no prompt; write one per line.")
    return prompts


def _next_number(folder: Path) -> int:
    """One above the highest picture number in a folder, so that nothing is overwritten."""
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()]
    return max(numbers, default=-1) + 1


class _Progress:
    """A progress bar for each named piece of work; silent when the output is not a terminal."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._progress = Progress(console=console, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._progress.start()
        return self._advance

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _advance(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)
