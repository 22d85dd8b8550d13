"""The `imagen-scale` command; torch is imported only inside the commands that need it."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from imagen_scale_export.cli import export

from imagen_scale import __version__
from imagen_scale.command_errors import user_errors
from imagen_scale.commands.config import config, set_option
from imagen_scale.commands.doctor import doctor
from imagen_scale.commands.group import CommandGroup
from imagen_scale.commands.importing import import_config, import_run
from imagen_scale.commands.runs import runs
from imagen_scale.commands.train import train
from imagen_scale.commands.ui import ui
from imagen_scale.errors import UsageError


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train, on the hardware you have, a cascade that turns text into pictures; then sample it.

    \b
        imagen-scale doctor                           # is this machine ready?
        imagen-scale train configs/emoji_demo.json    # train every stage
        imagen-scale sample "red heart"               # make a picture

    Exit codes: 0 done, 1 a failure, 2 wrong use, 3 an export differs from the network, 130
    interrupted. NO_COLOR turns colours off; output that is piped is plain.
    """


for command in (config, doctor, export, import_config, import_run, runs, train, ui):
    main.add_command(command)

run_option = click.option("--run", help="Folder of the run; default the newest under runs/.")
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Same seed, same picture.",
)
unfinished_option = click.option(
    "--allow-unfinished", is_flag=True, help="Accept stages whose training has not ended."
)


class PerStage(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """One value, or one per stage separated by commas."""

    def __init__(self, item: Any) -> None:
        self.item = item
        self.name = item.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """What the help shows."""
        return f"{self.name.upper()}[,...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """A value, or a list where there is a comma."""
        if not isinstance(value, str):
            return value
        values = [self.item.convert(part.strip(), param, ctx) for part in value.split(",")]
        return values if len(values) > 1 else values[0]

    def shell_complete(self, ctx: click.Context, param: Any, incomplete: str) -> list[Any]:
        """What the value after the last comma may be."""
        before, comma, last = incomplete.rpartition(",")
        found = self.item.shell_complete(ctx, param, last)
        for item in found:
            item.value = f"{before}{comma}{item.value}"
        return found


# The names stand in imagen_scale.diffusion and imagen_scale.runtimes, whose import loads torch.
SAMPLER_NAMES = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun")
SPACING_NAMES = ("linear", "trailing", "logsnr", "karras")
RUNTIME_NAMES = ("auto", "torch", "compile", "onnx", "tensorrt", "openvino")

SETTING_OPTIONS = (
    click.option(
        "--steps", type=PerStage(click.IntRange(min=1)), help="Steps per stage; default 25."
    ),
    click.option(
        "--cond-scale",
        type=PerStage(click.FLOAT),
        help="Guidance; a single value is the base stage's, the others take 1. Default 3.",
    ),
    click.option(
        "--sampler",
        type=PerStage(click.Choice(SAMPLER_NAMES)),
        help=f"One of {', '.join(SAMPLER_NAMES)}; default dpmpp_2m.",
    ),
    click.option(
        "--spacing",
        type=PerStage(click.Choice(SPACING_NAMES)),
        help=f"Which times are visited: {', '.join(SPACING_NAMES)}.",
    ),
    click.option("--eta", type=PerStage(click.FLOAT), help="Noise of --sampler ddim, 0 to 1."),
    click.option(
        "--threshold",
        type=PerStage(click.FLOAT),
        help="Percentile of dynamic thresholding, 0 to 1; default the configuration's.",
    ),
)
RUNTIME_OPTIONS = (
    click.option(
        "--runtime",
        type=click.Choice(RUNTIME_NAMES),
        default="auto",
        show_default=True,
        help="What computes the U-Nets; auto says what it took and why.",
    ),
    click.option(
        "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default by the device."
    ),
    click.option("--channels-last", is_flag=True, help="Memory layout for torch."),
    click.option(
        "--sequential", is_flag=True, help="Two passes for guidance: less memory, more time."
    ),
)


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """What all commands that sample take; settings that are not given are left out."""

    @wraps(command)
    def wrapped(**options: Any) -> None:
        names = ("steps", "cond_scale", "sampler", "spacing", "eta", "threshold")
        given = {name: options.pop(name) for name in names}
        how = {name: options.pop(name) for name in ("precision", "channels_last", "sequential")}
        settings = {name: value for name, value in given.items() if value is not None}
        command(settings=settings, how=how, **options)

    for option in reversed((*SETTING_OPTIONS, *RUNTIME_OPTIONS)):
        wrapped = option(wrapped)
    return wrapped


@main.command(short_help="Check and resize pictures, encode captions.")
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@set_option
@click.option("--estimate", is_flag=True, help="Say what it would take in time and disk, and stop.")
@click.option("--sheet", type=click.Path(), help="PNG of the contact sheet; default in the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@user_errors
def prepare(
    config_path: str,
    overrides: tuple[str, ...],
    estimate: bool,
    sheet: str | None,
    as_json: bool,
) -> None:
    """Check and resize pictures and encode captions, before training needs them.

    Tells what the data set is like, names what is left out, and draws a contact sheet.

    \b
        imagen-scale prepare --config configs/cascade_64_256.json --sheet sheet.png
    """
    from imagen_scale.config import load_config

    checked = load_config(config_path, overrides)
    if sheet is not None and Path(sheet).suffix.lower() != ".png":
        raise UsageError(f"--sheet {sheet}: it is written as PNG; name it {Path(sheet).stem}.png.")
    from imagen_scale import preparation

    console = _console()
    with _Progress() as progress:
        if estimate:
            planned = preparation.estimate(checked, progress)
        else:
            done = preparation.prepare_data(checked, Path(sheet) if sheet else None, progress)
    if as_json:
        facts = planned._asdict() if estimate else preparation.as_dict(done)
        click.echo(json.dumps(facts, indent=1))
    elif estimate:
        preparation.print_estimate(planned, console)
    else:
        preparation.print_preparation(done, console)


@main.command(short_help="How much memory training will take.")
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
    """Say how much memory training will take, and choose what fits, before it is spent.

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


@main.command(short_help="Make pictures from prompts.")
@click.argument("prompts", nargs=-1)
@run_option
@click.option("--from-file", type=click.Path(), help="One prompt per line.")
@click.option("--out", help="Folder for the pictures; default samples/ in the run.")
@click.option(
    "--num", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures per prompt."
)
@seed_option
@click.option("--negative-prompt", help="What guidance leads away from; torch computes it.")
@click.option("--unet-limit", type=int, help="Stop after this U-Net.")
@click.option("--tile", type=click.IntRange(min=1), help="Compute stages above this in tiles.")
@click.option("--at-once", type=click.IntRange(min=1), help="Pictures computed together.")
@unfinished_option
@user_errors
@sampling_options
def sample(
    prompts: tuple[str, ...],
    run: str | None,
    from_file: str | None,
    out: str | None,
    num: int,
    seed: int,
    negative_prompt: str | None,
    unet_limit: int | None,
    tile: int | None,
    at_once: int | None,
    allow_unfinished: bool,
    runtime: Any,
    settings: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """Make pictures from PROMPTS with a trained run; each is written as soon as it is finished.

    \b
        imagen-scale sample "red heart" "grinning cat" --cond-scale 3 --steps 25,10
        imagen-scale sample "red heart" --negative-prompt "black outline"
    """
    all_prompts = [*prompts, *(_read_prompts(from_file) if from_file else [])]
    if not all_prompts:
        raise UsageError("no prompt: give one or more in quotes, or a file with --from-file.")
    from imagen_scale.checkpoint import find_run

    run_dir = find_run(run)
    from imagen_scale.cascade import Cascade, to_uint8
    from imagen_scale.pictures import GRID_LIMIT, save_grid
    from imagen_scale.runtimes import Options
    from imagen_scale.sample_folder import SampleFolder

    cascade = Cascade.load(
        run_dir, unet_limit=unet_limit, allow_unfinished=allow_unfinished,
        runtime=runtime, options=Options(**how), say=_say,
    )  # fmt: skip
    folder = Path(out) if out else run_dir / "samples"
    made = SampleFolder(
        folder, cascade, cascade.settings(**settings), tile=tile, negative_prompt=negative_prompt
    )
    total = len(all_prompts) * num
    shown: list[tuple[str, list[Any]]] = []
    try:
        with _Progress() as progress:
            pictures = cascade.stream(
                all_prompts, seed=seed, num=num, tile=tile, at_once=at_once,
                on_step=lambda unet, done, total: progress(f"U-Net {unet}", done, total),
                negative_prompt=negative_prompt, **settings,
            )  # fmt: skip
            for picture in pictures:
                made.write(picture)
                progress("pictures", made.written, total)
                if len(shown) < GRID_LIMIT:
                    images = [to_uint8(image[None])[0] for image in picture.stages]
                    shown.append((picture.prompt, images))
    except KeyboardInterrupt:
        click.echo(f"interrupted: {made.written} of {total} pictures are in {folder}", err=True)
        sys.exit(130)
    grid = folder / f"grid_{made.first:05d}.png"
    rows = list(zip(*(images for _, images in shown), strict=True))
    save_grid(grid, rows, [caption for caption, _ in shown])
    which = "all of them" if len(shown) == made.written else f"the first {len(shown)}"
    click.echo(f"{made.written} pictures in {folder}, {which} in {grid}")


@main.command(short_help="Enlarge any picture.")
@click.argument("file", type=click.Path())
@run_option
@click.option("--prompt", help="What the picture shows; without it the text is left out.")
@click.option("--unet", type=int, help="Which super-resolution U-Net; default the last.")
@click.option("--tile", type=click.IntRange(min=1), help="Default the U-Net's own size.")
@click.option("--out", type=click.Path(), help="PNG file; default FILE_xN.png beside FILE.")
@seed_option
@unfinished_option
@user_errors
@sampling_options
def upscale(
    file: str,
    run: str | None,
    prompt: str | None,
    unet: int | None,
    tile: int | None,
    out: str | None,
    seed: int,
    allow_unfinished: bool,
    runtime: Any,
    settings: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """Enlarge the picture FILE, of any size and shape, with a super-resolution stage.

    \b
        imagen-scale upscale photo.jpg --prompt "a lighthouse at dusk"
    """
    from imagen_scale.checkpoint import find_run, sha256
    from imagen_scale.config import load_config

    run_dir = find_run(run)
    number = unet or len(load_config(run_dir / "config.json").unets)
    from imagen_scale.upscale import Upscaler, read_picture

    picture = read_picture(Path(file))
    from imagen_scale.cascade import to_uint8
    from imagen_scale.pictures import save_picture
    from imagen_scale.runtimes import Options

    upscaler = Upscaler(
        run_dir, number, allow_unfinished=allow_unfinished, tile=tile,
        runtime=runtime, options=Options(**how), say=_say,
    )  # fmt: skip
    path = Path(out) if out else Path(file).with_name(f"{Path(file).stem}_x{upscaler.factor:g}.png")
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: pictures are written as PNG; name it {path.stem}.png.")
    if path.exists():
        raise UsageError(f"{path}: exists already; name another file with --out.")
    with _Progress() as progress:
        image, one, name = upscaler(
            picture, prompt, seed=seed, settings=settings,
            on_step=lambda unet, done, total: progress(f"U-Net {unet}", done, total),
        )  # fmt: skip
    facts = {"file": Path(file).name, "prompt": prompt, "seed": seed, "unet": number, "tile": tile,
             **one._asdict(), "runtime": name, "version": __version__,
             "model_sha256": sha256(upscaler.file.path)}  # fmt: skip
    save_picture(path, to_uint8(image[None])[0], facts)
    click.echo(f"{image.shape[2]} x {image.shape[1]} px: {path}")


@main.command(short_help="Measure a trained run.")
@run_option
@click.option(
    "--num",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Captions used at most.",
)
@click.option(
    "--split",
    type=click.Choice(["held-out", "train"]),
    help="Which pictures; default held-out where there are any.",
)
@click.option("--features", help="Network for FID and KID: see above.")
@click.option("--clip", help="CLIP model for the CLIP score: a folder, or a name on the hub.")
@click.option("--unet-limit", type=int, help="Measure only the first so many U-Nets.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@seed_option
@unfinished_option
@user_errors
@sampling_options
def evaluate(
    run: str | None,
    num: int,
    split: Any,
    features: str | None,
    clip: str | None,
    unet_limit: int | None,
    as_json: bool,
    seed: int,
    allow_unfinished: bool,
    runtime: Any,
    settings: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """Measure a trained run on captions of its data; writes evaluation.json into the run.

    Retrieval, colours, faithfulness to the low-resolution picture, and PSNR and SSIM against
    bicubic need nothing else. --features adds FID and KID: a vision model of transformers (folder
    or name, e.g. facebook/dinov2-base), `inception`, or the path of Inception's weights. --clip
    adds the CLIP score.

    \b
        imagen-scale evaluate --num 64
        imagen-scale evaluate --num 1000 --features models/dinov2-base --clip models/clip
    """
    from imagen_scale.checkpoint import find_run

    run_dir = find_run(run)
    from imagen_scale.evaluation.command import evaluate_run
    from imagen_scale.evaluation.report import print_table
    from imagen_scale.runtimes import Options

    with _Progress() as progress:
        report = evaluate_run(
            run_dir, num=num, seed=seed, split=split, features=features, clip=clip,
            unet_limit=unet_limit, allow_unfinished=allow_unfinished,
            runtime=runtime, options=Options(**how),
            settings=settings, progress=progress, say=_say,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report.facts, indent=1))
        return
    click.echo(f"{report.facts['captions']} captions, {report.facts['split']} pictures")
    print_table(report.result, _console())
    click.echo(f"written to {report.file}")


@main.command(short_help="Write one page about a run.")
@click.argument("run", required=False)
@click.option("--out", type=click.Path(), help="HTML file; default report.html in the run.")
@click.option("--no-verify", is_flag=True, help="Leave checkpoints unread, which may be large.")
@user_errors
def report(run: str | None, out: str | None, no_verify: bool) -> None:
    """Write one HTML page about RUN, by default the newest under runs/.

    State of each stage, curves, pictures over time, data, checkpoints, evaluation, exports and
    configuration; it needs no network, and the run may still be in training.

    \b
        imagen-scale report runs/emoji_demo --out report.html
    """
    from imagen_scale.checkpoint import find_run

    run_dir = find_run(run)
    path = Path(out) if out else run_dir / "report.html"
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(f"--out {path}: the page is an HTML file; name it {path.name}.html.")
    from imagen_scale.report.page import write_report

    with _Progress() as progress:
        facts = write_report(run_dir, path, check=not no_verify, progress=progress)
    for problem in facts.problems:
        _say(f"missing or damaged: {problem}")
    click.echo(f"written to {path}")


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


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)


def _console() -> Any:
    """For tables; where they are piped, lines are not broken."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


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
