"""imagen-scale-runtime "a prompt" --bundle DIR: pictures from a bundle."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cascade import Cascade, Sample
from .errors import ImagenScaleError, UsageError, exit_code_of, of_system, spelled
from .files.numbers import taken_number
from .files.picture_files import save_sample
from .files.places import check_folder
from .files.system_text import typed
from .graphs import CPU
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 2 for wrong use, 1 for a failure."""
    try:
        _run(_parser().parse_args(arguments))
    except KeyboardInterrupt as error:
        sys.exit(exit_code_of(error))
    except ImagenScaleError as error:
        message = spelled(error.marked, lambda name: f"--{name.replace('_', '-')}")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {of_system(error)}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imagen-scale-runtime",
        description="Make pictures from prompts with a bundle of `imagen-scale export --bundle`. "
        "Options of stages take one value for all, or one for each, as in --steps 25,10.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--bundle", required=True, type=Path, help="The bundle's folder.")
    parser.add_argument("--from-file", type=Path, help="One prompt per line.")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="Default: pictures/")
    parser.add_argument("--seed", type=int, default=0, help="Same seed, same picture.")
    parser.add_argument("--num", type=int, default=1, help="Pictures per prompt.")
    parser.add_argument("--negative-prompt", help="What guidance leads away from.")
    parser.add_argument("--steps", type=_per_stage(int), help="Sampling steps.")
    parser.add_argument(
        "--cond-scale", type=_per_stage(float), help="Guidance; a single value is the base's."
    )
    parser.add_argument("--sampler", type=_per_stage(str), help="Solver.")
    parser.add_argument("--spacing", type=_per_stage(str), help="Which times are visited.")
    parser.add_argument("--eta", type=_per_stage(float), help="Share of DDPM's noise, for ddim.")
    parser.add_argument("--threshold", type=_per_stage(float, or_none=True), help="Percentile.")
    parser.add_argument(
        "--guidance-interval", type=_per_stage(str, or_none=True),
        metavar="FROM:UNTIL[,FROM:UNTIL...]", help="Shares of the steps in which guidance acts.",
    )  # fmt: skip
    parser.add_argument(
        "--cache-interval", type=_per_stage(int), help="One evaluation of so many is whole."
    )
    parser.add_argument("--tile", type=int, help="Compute larger stages in tiles of this side.")
    parser.add_argument("--at-once", type=int, help="Pictures computed together.")
    parser.add_argument("--runtime", default="onnx", help="onnx or openvino.")
    parser.add_argument("--provider", default=CPU, help=f"Of ONNX Runtime; default {CPU}.")
    parser.add_argument("--threads", type=int, default=0, help="On the CPU.")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _per_stage(kind: Callable[[str], Any], *, or_none: bool = False) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        parts = [part.strip() for part in text.split(",")]
        values = [None if or_none and part == "none" else kind(part) for part in parts]
        return values if len(values) > 1 else values[0]

    read.__name__ = f"{kind.__name__}[,{kind.__name__}...]"  # argparse names it so
    return read


def _run(asked: argparse.Namespace) -> None:
    asked.negative_prompt = asked.negative_prompt and typed(asked.negative_prompt)
    prompts = [
        *map(typed, asked.prompts),
        *(_prompts_of(asked.from_file) if asked.from_file else []),
    ]
    if not prompts:
        raise UsageError("no prompt: give one or more in quotes, or a file with --from-file.")
    names = ("seed", "num", "negative_prompt", "steps", "cond_scale", "sampler", "spacing", "eta",
             "threshold", "guidance_interval", "cache_interval", "tile", "at_once")  # fmt: skip
    options = {name: getattr(asked, name) for name in names}
    check_folder(asked.out)
    cascade = Cascade(
        asked.bundle, runtime=asked.runtime, provider=asked.provider, threads=asked.threads,
        keep=False, say=_say,
    )  # fmt: skip
    settings = cascade.settings(**options)
    made = cascade.stream(prompts, on_step=_progress(), **options)
    facts = {
        "negative_prompt": asked.negative_prompt,
        "tile": asked.tile,
        "stages": [of_stage._asdict() for of_stage in settings],
        "bundle": str(asked.bundle),
        "runtime": asked.runtime,
        "version": __version__,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    total, written = len(prompts) * asked.num, 0
    try:
        for sample in made:
            _write(asked.out, sample, facts)
            written += 1
    except BaseException:
        if written:
            print(f"{written} of {total} pictures are in {asked.out}", file=sys.stderr)
        raise
    print(f"{written} pictures in {asked.out}")


def _write(folder: Path, sample: Sample, facts: dict[str, Any]) -> None:
    beside = {"prompt": sample.prompt, "seed": sample.seed, **facts}
    with taken_number(folder) as number:
        save_sample(folder, number, np.asarray(sample.image), beside)


def _prompts_of(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--from-file {path}: cannot be read: {reason}.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--from-file {path}: holds no prompt; write one per line.")
    return prompts


def _say(sentence: str) -> None:
    print(spelled(sentence, lambda name: f"--{name.replace('_', '-')}"), file=sys.stderr)


def _progress() -> Callable[[int, int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(unet: int, done: int, steps: int) -> None:
        end = "\n" if done == steps else ""
        print(f"\rU-Net {unet}: step {done} of {steps}", end=end, file=sys.stderr, flush=True)

    return show
