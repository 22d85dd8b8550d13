"""Pictures a second and what callers wait for: `serve` beside one call of the command each.

    python benchmarks/serving.py --run runs/emoji_demo
    python benchmarks/serving.py                           a small run that was never trained
    python benchmarks/serving.py --run runs/emoji_demo --write docs/serving.md

For each number of callers, in turn: all ask the server at once, each for one picture after the
other; then each calls `imagen-scale sample` once, as many at a time as there are cores. Equal run,
prompts, seeds, steps and threads. Wall time: nothing else should run on the machine.
"""

import http.client
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
from report import machine, publish, table, write_option

ROOT = Path(__file__).resolve().parent.parent
MARK = "serving"
PROGRAM = [sys.executable, "-c", "from imagen_scale.commands.main import main; main()"]
PROMPTS = ("red heart", "sun", "pizza", "rocket")
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


class Measured(NamedTuple):
    """Some callers, each with one picture or several."""

    seconds: float  # from the first question to the last picture
    waits: list[float]  # seconds of each picture

    @property
    def cells(self) -> list[str]:
        """Pictures a second, p50 and p99."""
        rate = len(self.waits) / self.seconds
        return [f"{rate:.2f}", *(f"{percentile(self.waits, p):.2f} s" for p in (50, 99))]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def measured(callers: int, at_once: int, each: int, ask: Callable[[int], None]) -> Measured:
    """Lets callers ask.

    Args:
        callers: How many.
        at_once: How many of them may be at it; the others wait, which counts.
        each: Pictures of each, one after the other.
        ask: Asks for the picture of that number, and waits for it.
    """
    start = time.perf_counter()

    def call(caller: int) -> list[float]:
        waits, asked = [], start
        for number in range(each):
            ask(caller * each + number)
            waits.append(time.perf_counter() - asked)
            asked = time.perf_counter()
        return waits

    with ThreadPoolExecutor(at_once) as threads:
        waits = [wait for waits in threads.map(call, range(callers)) for wait in waits]
    return Measured(time.perf_counter() - start, waits)


def untrained(run: Path) -> Path:
    """Writes a run of the demo's networks with random weights: their time is that of any."""
    import torch

    from imagen_scale.config import dump_config, load_config
    from imagen_scale.data.encoder import encoder_dim, encoder_fingerprint, encoder_folder
    from imagen_scale.models.unet import UNet
    from imagen_scale.runs.folders import inference_path
    from imagen_scale.runs.inference import InferenceFile, save_inference

    config = load_config(ROOT / "configs" / "emoji_demo.json")
    run.mkdir(parents=True)
    (run / "config.json").write_text(dump_config(config))
    width = encoder_dim(config.text_encoder)
    for number in range(1, len(config.unets) + 1):
        torch.manual_seed(number)
        stage = config.stage(number, width)
        file = InferenceFile(
            inference_path(run, number), config, number, text_embed_dim=width,
            text_fingerprint=encoder_fingerprint(encoder_folder(config.text_encoder)),
            step=1, steps=1,
        )  # fmt: skip
        save_inference(file, UNet(stage.network).state_dict())
    return run


@contextmanager
def serving(run: Path, flags: Sequence[str]) -> Iterator[int]:
    """A server with its stages loaded; gives its port."""
    command = [*PROGRAM, "serve", str(run), "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
        if found is None:
            raise click.ClickException(f"the server does not start: {said}{process.stderr.read()}")
        port = int(found[1])
        while "loading" in get(port, "/readyz"):
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.communicate()


def get(port: int, path: str, body: dict[str, object] | None = None) -> str:
    """What the server answers.

    Raises:
        click.ClickException: If it refuses.
    """
    line = http.client.HTTPConnection("127.0.0.1", port)
    text = None if body is None else json.dumps(body)
    line.request("POST" if body else "GET", path, text, {"content-type": "application/json"})
    answer = line.getresponse()
    told = answer.read().decode()
    line.close()
    if answer.status != 200 and path != "/readyz":
        raise click.ClickException(f"{path}: {answer.status} {told}")
    return told


def batches(port: int) -> tuple[float, float]:
    """Batches and pictures so far."""
    found = re.findall(
        r"^imagen_scale_batch_pictures_(?:count|sum) (\S+)", get(port, "/metrics"), re.M
    )
    return float(found[0]), float(found[1])


@click.command(help=__doc__)
@click.option("--run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--callers",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 8, 32),
    show_default=True,
    help="How many ask at once; may be given several times.",
)
@click.option(
    "--each",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Pictures of each caller of the server; of the command it is one.",
)
@click.option("--steps", default="25", show_default=True, help="As `imagen-scale sample` takes it.")
@click.option("--runtime", default="torch", show_default=True)
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True)
@write_option(MARK)
def main(
    run: Path | None, callers: Sequence[int], each: int, steps: str, runtime: str, max_batch: int,
    write: Path | None,
) -> None:  # fmt: skip
    """See the module."""
    cores = len(os.sched_getaffinity(0))
    values = [int(value) for value in steps.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        named = run or untrained(Path(folder) / "run")
        flags = ["--runtime", runtime]

        def command(number: int) -> None:
            prompt = PROMPTS[number % len(PROMPTS)]
            subprocess.run(
                [*PROGRAM, "sample", prompt, "--run", str(named), "--seed", str(number), "--steps",
                 steps, "--out", str(Path(folder) / "out"), *flags],
                check=True, capture_output=True, env=ENVIRONMENT,
            )  # fmt: skip

        with serving(named, [*flags, "--max-batch", str(max_batch)]) as port:

            def ask(number: int) -> None:
                asked = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number}
                body = {**asked, "steps": values if len(values) > 1 else values[0]}
                get(port, "/v1/images/generations", body)

            for count in callers:
                before = batches(port)
                ours = measured(count, count, each, ask)
                done, pictures = (b - a for a, b in zip(before, batches(port), strict=True))
                theirs = measured(count, min(count, cores), 1, command)
                times = (len(ours.waits) / ours.seconds) / (len(theirs.waits) / theirs.seconds)
                together = f"{pictures / done:.1f}"
                rows.append([str(count), *ours.cells, together, *theirs.cells, f"{times:.1f}"])
    columns = ("callers", "`serve`: pictures/s", "p50", "p99", "computed together",
               "a command each: pictures/s", "p50", "p99", "times as many")  # fmt: skip
    text = (
        f"{table(columns, rows)}\n\n{run.name if run else 'The demo, not trained'}; {steps} steps, "
        f"{runtime}, `--max-batch {max_batch}`; {each} pictures of each caller of `serve`, one of "
        f"the command; {machine('torch', 'uvicorn', 'fastapi')}"
    )
    publish(text, write, MARK)


if __name__ == "__main__":
    main()
