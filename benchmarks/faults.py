"""Storms of faults, and the table of what came of them.

    python benchmarks/faults.py                              every row
    python benchmarks/faults.py pictures configs=5000        some, with another number of trials
    python benchmarks/faults.py --write docs/reliability.md  into the document, between its marks

Exits with 1 if any trial failed. A row is a function from a number of trials and an empty folder
to a Result; ROWS is the one table of them.
"""

import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
from report import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MAX_SECONDS, MAX_BYTES = 2.0, 500e6  # allowed for one picture
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


class Result(NamedTuple):
    """What a storm did: how many trials, a sentence for each that failed, the figure reached."""

    trials: int
    failures: list[str]
    figure: str


class Row(NamedTuple):
    """One promise."""

    number: str  # as in the goal table
    goal: str
    trials: int  # unless the command line says otherwise
    storm: Callable[[int, Path], Result]


# ------------------------------------------------------------------------------------- pictures


class Outcome(NamedTuple):
    """What one picture cost and gave, measured in a process of its own."""

    seconds: float  # of processor time, whatever else the machine does
    bytes: int
    error: str | None  # why it was refused
    fault: str | None  # what should not have happened


def in_own_process(task: Callable[[], str | None]) -> Outcome:
    """Runs a task that returns the reason of a refusal; a crash is an outcome, too."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(60)  # a hang ends as a crash
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        error = fault = None
        try:
            error = task()
        except BaseException as problem:
            fault = f"{type(problem).__name__}: {problem}"
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writer, json.dumps([seconds, (peak - before) * 1024, error, fault]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if told:
        return Outcome(*json.loads(told))
    return Outcome(0, 0, None, f"killed by {signal.Signals(os.WTERMSIG(status)).name}")


def decode(source, index: int, size: int = 64) -> str | None:
    """Decodes a picture as preparation does; the reason if it is refused."""
    import numpy as np

    from imagen_scale.errors import DataError

    try:
        picture = source.image(index, size)
    except DataError as error:
        return str(error)
    values = picture / np.float32(127.5) - 1
    if picture.shape != (3, size, size) or not np.isfinite(values).all() or abs(values).max() > 1:
        raise ValueError(f"shape {picture.shape}, values to {abs(values).max()}")
    return None


def faults_of(name: str, outcome: Outcome) -> list[str]:
    """What of a picture's outcome breaks the promise."""
    found = [outcome.fault] if outcome.fault else []
    if outcome.seconds > MAX_SECONDS:
        found.append(f"took {outcome.seconds:.1f} s")
    if outcome.bytes > MAX_BYTES:
        found.append(f"took {outcome.bytes / 1e6:.0f} MB")
    return [f"{name}: {fault}" for fault in found]


def pictures(trials: int, folder: Path) -> Result:
    """The 61 malformed pictures, then byte-mutants of good ones."""
    from support.corpus import mutant, write_corpus

    from imagen_scale.config import DataConfig
    from imagen_scale.data.sources.opening import open_source
    from imagen_scale.data.sources.screening import usable_source
    from imagen_scale.errors import DataError

    expected = write_corpus(folder / "set")
    for seed in range(trials - len(expected)):
        expected[f"mutant_{seed}.png"] = None
        (folder / "set" / f"mutant_{seed}.png").write_bytes(mutant(seed))
    rows = (json.dumps({"file_name": name, "text": "a cat"}) + "\n" for name in expected)
    (folder / "set" / "metadata.jsonl").write_text("".join(rows))
    config = DataConfig(source="folder", path=str(folder / "set"), max_bad_fraction=0.99)

    source = open_source(config)
    refused = {skipped.picture.rpartition(": ")[2] for skipped in source.skipped}
    failures, worst_s, worst_bytes = [], 0.0, 0
    for i, name in enumerate(source.keys):
        outcome = in_own_process(lambda i=i: decode(source, i))
        failures += faults_of(name, outcome)
        worst_s, worst_bytes = max(worst_s, outcome.seconds), max(worst_bytes, outcome.bytes)
        if outcome.error:
            refused.add(name)
    failures += [
        f"{name}: {'refused' if name in refused else 'used'}"
        for name, is_usable in expected.items()
        if is_usable is not None and is_usable == (name in refused)
    ]
    # What a run does: the same pictures left out, each named with its reason, or a refusal.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used, report = usable_source(config, folder / "cache")
    entries = json.loads(report.read_text())["skipped"]
    named = {entry["picture"].rpartition(": ")[2]: entry["reason"] for entry in entries}
    is_complete = len(used) + len(named) == len(expected)
    if set(named) != refused or not all(named.values()) or not is_complete:
        failures.append(f"data_report.json: {set(named) ^ refused}")
    try:
        usable_source(config.model_copy(update={"max_bad_fraction": 0.05}), folder / "cache")
        failures.append("more than 5 % were bad and the run was not refused")
    except DataError:
        pass
    figure = (
        f"{len(used)} used, {len(named)} left out and named; at most {1000 * worst_s:.0f} ms and "
        f"{worst_bytes / 1e6:.0f} MB"
    )
    return Result(len(expected), failures, figure)


def largest(trials: int, folder: Path) -> Result:
    """Pictures as large as are accepted, in the formats and modes that cost most."""
    import numpy as np
    from PIL import Image

    from imagen_scale.config import DataConfig
    from imagen_scale.data.sources.images import MAX_PIXELS, MAX_PIXELS_OF
    from imagen_scale.data.sources.opening import open_source

    Image.MAX_IMAGE_PIXELS = None
    kinds = [
        ("WEBP", "RGB", "lossy.webp", {"method": 0}),
        ("WEBP", "RGBA", "lossless.webp", {"lossless": True, "method": 0, "quality": 0}),
        ("plain JPEG", "RGB", "a.jpg", {}),
        ("progressive JPEG", "RGB", "progressive.jpg", {"progressive": True}),
        ("progressive JPEG", "CMYK", "cmyk.jpg", {"progressive": True}),
        ("PNG", "RGB", "rgb.png", {"compress_level": 1}),
        ("PNG", "RGBA", "rgba.png", {"compress_level": 1}),
        ("PNG", "LA", "la.png", {"compress_level": 1}),
        ("PNG", "I;16", "16_bit.png", {"compress_level": 1}),
        ("PNG", "P", "palette.png", {"transparency": 0, "compress_level": 1}),
        ("TIFF", "RGB", "lzw.tiff", {"compression": "tiff_lzw"}),
        ("GIF", "P", "a.gif", {}),
        ("AVIF", "RGB", "a.avif", {"speed": 10}),
        ("AVIF", "RGBA", "transparent.avif", {"speed": 10}),
    ][:trials]
    failures, worst_s, worst_bytes = [], 0.0, 0
    for kind, mode, name, options in kinds:
        side = int(MAX_PIXELS_OF.get(kind, MAX_PIXELS) ** 0.5)
        # Texture at every scale, so that nothing compresses to next to nothing.
        tile = np.random.default_rng(0).integers(0, 40, (500, 500, 3), np.uint8)
        hill = np.asarray(Image.linear_gradient("L").resize((side, side))) // 2
        texture = np.tile(tile, (side // 500 + 1, side // 500 + 1, 1))[:side, :side]
        image = Image.fromarray(texture + hill[..., None])
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode in ("RGBA", "LA"):
            image = image.convert(mode)
            image.putalpha(Image.fromarray(hill + 100))
        else:
            image = image.convert(mode)
        picture = folder / f"set_{name}" / name
        picture.parent.mkdir()
        image.save(picture, **options)
        picture.with_suffix(".txt").write_text("a cat")
        del image, texture, hill
        config = DataConfig(source="folder", path=str(picture.parent))
        source = open_source(config)
        outcome = in_own_process(lambda source=source: decode(source, 0, 1024))
        failures += faults_of(name, outcome)
        if outcome.error:
            failures.append(f"{name}: {outcome.error}")
        worst_s, worst_bytes = max(worst_s, outcome.seconds), max(worst_bytes, outcome.bytes)
        picture.unlink()
    return Result(
        len(kinds), failures, f"at most {1000 * worst_s:.0f} ms and {worst_bytes / 1e6:.0f} MB"
    )


# ------------------------------------------------------------------- captions, configs, prompts


def captions(trials: int, folder: Path) -> Result:
    """Captions of every kind; those that are used are encoded, too."""
    import numpy as np
    from support.captions import CASES, write_case

    from imagen_scale.config import DataConfig
    from imagen_scale.data.encoder import TextEncoder, encoder_folder
    from imagen_scale.data.sources.opening import open_source
    from imagen_scale.errors import DataError

    failures, used = [], []
    outcomes = {"used": 0, "left out and named": 0, "lists refused": 0}
    for number, case in enumerate(CASES[:trials]):
        write_case(case, folder / str(number) / "set")
        config = DataConfig(source="folder", path=str(folder / str(number) / "set"))
        caption = skipped = refused = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = open_source(config)
            caption = dict(zip(source.keys, source.captions, strict=True)).get("case.png")
            skipped = next((entry.reason for entry in source.skipped), None)
        except DataError as error:
            refused = str(error)
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {error}")
        outcomes["lists refused" if refused else "used" if caption else "left out and named"] += 1
        used += [caption] if caption else []
        follows_rule = (
            caption == case.used
            and (skipped or "").startswith(case.skipped or "")
            and (skipped is None) == (case.skipped is None)
            and (case.refused or "") in (refused or "")
            and (refused is None) == (case.refused is None)
        )
        if not follows_rule:
            failures.append(f"{case.name}: {caption!r}, {skipped!r}, {refused!r}")
    for caption, embed in zip(
        used, TextEncoder(encoder_folder("minilm")).encode(used), strict=True
    ):
        if not np.isfinite(embed).all() or len(embed) > 256:
            failures.append(f"{caption[:40]!r}: {embed.shape} features")
    return Result(trials, failures, ", ".join(f"{n} {what}" for what, n in outcomes.items()))


def configs(trials: int, folder: Path) -> Result:
    """Mutations of the valid configurations and the mistakes people make, before torch."""
    from hypothesis import HealthCheck, Phase, given, settings
    from support.mutations import MISTAKES, fault, mistake_fault, mutants

    tried, slowest, failures = 0, 0.0, []

    @settings(max_examples=trials, database=None, deadline=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(mutants())
    def try_one(mutant):
        nonlocal tried, slowest
        start = time.perf_counter()
        found = fault(mutant)
        slowest = max(slowest, time.perf_counter() - start)
        tried += 1
        if found:
            failures.append(found)

    had_torch = "torch" in sys.modules
    try_one()
    failures += filter(None, map(mistake_fault, MISTAKES))
    if "torch" in sys.modules and not had_torch:
        failures.append("torch was imported")
    if slowest > MAX_SECONDS:
        failures.append(f"one took {slowest:.1f} s")
    figure = (
        f"{tried} mutations, {len(MISTAKES)} mistakes; the slowest took {1000 * slowest:.0f} ms"
    )
    return Result(tried + len(MISTAKES), failures, figure)


def written_paths(event: str, details: tuple) -> list[str]:
    """The file that an audit event of Python opens for writing, or nothing."""
    if event != "open" or not isinstance(details[0], str | bytes | os.PathLike):
        return []
    path, _, flags = details
    return [os.fsdecode(path)] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []


def prompts(trials: int, folder: Path) -> Result:
    """Any text as a prompt of `imagen-scale sample`: a picture each, and nothing elsewhere."""
    from click.testing import CliRunner
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from support.tiny import write_run

    from imagen_scale.commands.main import main

    run = folder / "run"
    write_run(run)
    nasty = ["../up", "/etc/x", "a/b", ".", "..", "", "~", "-x", "CON", "a" * 300, "\u732b" * 200,
             "a\nb", "%s", "$HOME", "`x`", "a.png", "00000", "*", "\u202ex"]  # fmt: skip
    texts: list[str] = []

    @settings(max_examples=trials, database=None, deadline=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(nasty) | st.text(max_size=60) | st.text("./\\~\0 a", max_size=30))
    def collect(text):
        texts.append(text)

    while len(texts) < trials:
        collect()
    del texts[trials:]
    before = {path for path in folder.rglob("*") if path.is_file()}
    failures = []
    opened: set[str] = set()
    os.chdir(folder)
    sys.addaudithook(lambda event, details: opened.update(written_paths(event, details)))
    for start in range(0, trials, 50):
        some = texts[start : start + 50]
        command = ["sample", "--run", str(run), "--out", "out", "--steps", "1", "--", *some]
        done = CliRunner().invoke(main, command)
        if done.exit_code:
            failures.append(f"prompts from {start}: {done.output[-300:]}{done.exception!r}")
    written = {path for path in folder.rglob("*") if path.is_file()} - before
    out = (folder / "out").resolve()
    failures += [f"written elsewhere: {path}" for path in written if path.parent.resolve() != out]
    failures += [f"opened to write: {p}" for p in opened if Path(p).resolve().parent != out]
    kept = [json.loads(file.read_text()).get("prompt") for file in sorted(out.glob("0*.json"))]
    failures += [f"no picture of {text!r}" for text in texts if text not in kept]
    images = len([path for path in written if re.fullmatch(r"\d{5}_[0-9a-f]{8}\.png", path.name)])
    if images != trials:
        failures.append(f"{images} pictures for {trials} prompts")
    return Result(trials, failures, f"{images} pictures in the folder asked for, 0 elsewhere")


# ------------------------------------------------------------------------------- several ranks


def elastic(trials: int, folder: Path) -> Result:
    """Checkpoints of 1, 2 and 4 ranks at every ZeRO stage, loaded on 1, 2 and 4 at every stage."""
    from support import ranks

    counts = (1, 2, 4)
    stages = len(ranks.STAGES)
    # Each number of ranks at another stage first.
    sources = [(count, (i + shift + 2) % stages)
               for shift in range(stages) for i, count in enumerate(counts)]  # fmt: skip
    sources = sources[: max(1, trials // (len(counts) * stages))]
    names = [f"{count}_ranks_zero_{stage}" for count, stage in sources]
    for count in dict(sources):
        ranks.start("save", folder, count)
    found = [pair for count in counts for pair in ranks.start("load", folder, count, *names)]
    failures = [f"{a} -> {b}: other weights" for a, b, same, _ in found if not same]
    failures += [f"{a} -> {b}: losses drift by {d}" for a, b, _, d in found if not d <= 1e-5]
    drift = max(d for *_, d in found)
    return Result(
        len(found), failures,
        f"weights and average bit for bit; 20 losses after it within {drift:.1e}",
    )  # fmt: skip


def nan(trials: int, folder: Path) -> Result:
    """NaN in the data, the loss or the gradient of one rank, at every stage and precision."""
    from support import ranks

    found = [
        [count, *spoiled]
        for count in (1, 2)
        for spoiled in ranks.start("nan", folder, count, str(max(1, trials // 2)))
    ]
    failures = [
        f"{count} ranks, ZeRO-{stage}, {precision}, {where}: not {wanted}"
        for count, where, stage, precision, _, *outcome in found
        for wanted, is_so in zip(("left out", "untouched", "going on"), outcome, strict=True)
        if not is_so
    ]
    return Result(len(found), failures, "every step left out, no bit of weights or average changed")


def elsewhere(module: str, name: str) -> Callable[[int, Path], Result]:
    """A storm of another file, which imports what only its kind needs."""

    def storm(trials: int, folder: Path) -> Result:
        function = getattr(importlib.import_module(module), name)
        return Result(trials, *function(trials, folder))

    return storm


# ---------------------------------------------------------------------------------------- table

ROWS = {
    "kills": Row(
        "1-3",
        "killed with SIGKILL while it trains or saves, on 1 and 2 ranks: every checkpoint loads, "
        "none is lost, and the training continued is the uninterrupted one bit for bit",
        200,
        elsewhere("interruptions", "kills"),
    ),
    "damages": Row(
        "4",
        "a damaged checkpoint is named and the one before it used by all ranks; training never "
        "starts anew unasked",
        100,
        elsewhere("interruptions", "damages"),
    ),
    "full_disk": Row(
        "5",
        "a disk without room: what was saved stays, nothing half written is left, and with room "
        "again training ends as if nothing had been",
        30,
        elsewhere("interruptions", "full_disk"),
    ),
    "stops": Row(
        "6",
        "SIGTERM, SIGUSR1 or SIGINT to any rank: all save at the step's end and leave with "
        "128 + the signal's number; no step is lost",
        100,
        elsewhere("interruptions", "stops"),
    ),
    "elastic": Row(
        "7",
        "a checkpoint of N ranks at one ZeRO stage loads on M ranks at another: masters and "
        "average bit-equal, losses of 20 steps within 1e-5",
        36,
        elastic,
    ),
    "nan": Row(
        "8",
        "a gradient that is not finite reaches neither weights nor average, with ZeRO 0-3, fp32 "
        "and bf16, clipped or not, when one rank alone is at fault",
        84,
        nan,
    ),
    "lost_ranks": Row(
        "10",
        "one of two processes killed or standing still: the other stops within the configured "
        "time and names it and what it did; training continues from the newest checkpoint",
        40,
        elsewhere("interruptions", "lost_ranks"),
    ),
    "pictures": Row(
        "11",
        "61 malformed pictures and byte-mutants: no crash, no NaN, right shape, at most 2 s and "
        "500 MB each; what is left out is named with its reason; above 5 % the run is refused",
        261,
        pictures,
    ),
    "largest": Row(
        "11",
        "the largest pictures accepted, shrunk to 1024 px, take at most 2 s and 500 MB each",
        14,
        largest,
    ),
    "captions": Row("12", "captions of every kind follow a stated rule", 41, captions),
    "configs": Row(
        "13",
        "wrong configurations: no traceback, no unknown key accepted, each explained with key "
        "path and remedy, within 2 s and without torch",
        1000,
        configs,
    ),
    "prompts": Row("15", "any prompt gives its picture, inside the folder asked for", 500, prompts),
    "trackers": Row(
        "17",
        "Weights & Biases out of reach, silent, failing or killed: training ends as without it, "
        "metrics.jsonl is complete, and a step takes no 1 % longer",
        4,
        elsewhere("trackers", "trackers"),
    ),
}
PACKAGES = ("torch", "deepspeed", "pillow", "pydantic", "transformers")
HEADER = ["row", "storm", "goal", "trials", "failures", "figure"]


def write_between_marks(document: Path, header: str, lines: dict[str, str]) -> None:
    """Puts table lines into a document; rows of other storms stay if the machine is the same."""
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise click.UsageError(f"{document} lacks the lines {BEGIN} and {END}.")
    kept = {}
    if header in old:
        found = re.findall(r"^\| \S+ \| (\w+) \|.*$", old, re.M)
        kept = {name: re.search(rf"^\| \S+ \| {name} \|.*$", old, re.M)[0] for name in found}
    merged = kept | lines
    table = [merged[name] for name in ROWS if name in merged]
    document.write_text(f"{before}{begin}\n{page(header, table)}\n{end}{after}")


def page(header: str, table: list[str]) -> str:
    """The machine, then the table."""
    title = f"| {' | '.join(HEADER)} |"
    return "\n".join([header, "", title, "|---" * len(HEADER) + "|", *table])


def run_storm(name: str, trials: int) -> Result:
    """Runs one row in a process of its own, so that no storm meets what another left."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--inside", folder, f"{name}={trials}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return Result(trials, [f"{name}: ended with {done.returncode}"], "")
    return Result(*json.loads(done.stdout.splitlines()[-1]))


@click.command(help=__doc__)
@click.argument("rows", nargs=-1, metavar="[ROW[=TRIALS]]...")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="A document.")
@click.option("--inside", type=click.Path(path_type=Path), hidden=True)
def main(rows: tuple[str, ...], write: Path | None, inside: Path | None) -> None:
    """Runs the rows asked for, prints the table and exits with 1 if any trial failed."""
    asked: dict[str, int] = {}
    for text in rows or ROWS:
        name, _, trials = text.partition("=")
        if name not in ROWS or not (trials or "1").isdecimal():
            raise click.UsageError(f"{text}: give ROW or ROW=TRIALS; rows are {', '.join(ROWS)}.")
        asked[name] = int(trials) if trials else ROWS[name].trials
    if inside is not None:
        ((name, trials),) = asked.items()
        click.echo(json.dumps(ROWS[name].storm(trials, inside)))
        return
    results = {name: run_storm(name, trials) for name, trials in asked.items()}
    lines = {
        name: f"| {ROWS[name].number} | {name} | {ROWS[name].goal} | {result.trials} | "
        f"{len(result.failures)} | {result.figure} |"
        for name, result in results.items()
    }
    click.echo(page(machine(*PACKAGES), list(lines.values())))
    for name, result in results.items():
        for failure in result.failures[:20]:
            click.echo(f"{name}: {failure}", err=True)
    if write is not None:
        write_between_marks(write, machine(*PACKAGES), lines)
    sys.exit(any(result.failures for result in results.values()))


if __name__ == "__main__":
    main()
