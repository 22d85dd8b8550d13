"""A bundle's first picture without torch, beside the same picture by the main package.

    python benchmarks/alone.py runs/emoji_demo BUNDLE

Processes that start, draw one picture in 25 steps a stage with ONNX Runtime and end: seconds,
processor time and the largest memory they held, medians in turn; and what of this environment's
packages each of them needs on disk, beside the models.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import click
from packaging.requirements import Requirement
from report import machine, publish, table, write_option

MARK = "alone"
ROOT = Path(__file__).resolve().parent.parent
# The runtime's own pyproject.toml says so; it need not be installed here.
OF_RUNTIME = ("numpy", "onnxruntime", "pillow", "tokenizers")


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
    cpu_s: float
    peak_mb: float


def cost_of(argv: list[str]) -> Cost:
    """Runs a program to its end.

    Raises:
        SystemExit: If it fails, with what it said.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "export" / "runtime")}
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(argv, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read())
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def installed_mb(names: tuple[str, ...]) -> float:
    """Size on disk of packages and of all that they need, in this environment."""
    found: dict[str, int] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        files = [Path(str(package.locate_file(file))) for file in package.files or ()]
        found[name] = sum(file.stat().st_size for file in files if file.is_file())
        needed = map(Requirement, package.requires or ())
        waiting += [
            one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
        ]
    return sum(found.values()) / 1e6


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@write_option(MARK)
def main(run: Path, bundle: Path, rounds: int, write: Path | None) -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "imagen-scale sample --runtime onnx": [
                str(Path(sys.executable).with_name("imagen-scale")), "sample", "sun", "--run",
                str(run), "--runtime", "onnx", "--out", f"{folder}/main", "--allow-unfinished",
            ],
            "imagen-scale-runtime": [
                sys.executable, "-m", "imagen_scale_runtime", "sun", "--bundle", str(bundle),
                "--out", f"{folder}/runtime",
            ],
        }  # fmt: skip
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        for argv in ways.values():  # files come into memory
            cost_of(argv)
        for _ in range(rounds):
            for name, argv in ways.items():
                costs[name].append(cost_of(argv))
    sizes = (installed_mb(("imagen-scale", "onnx", "onnxruntime")), installed_mb(OF_RUNTIME))
    rows = []
    for (name, measured), size in zip(costs.items(), sizes, strict=True):
        middle = Cost(*(statistics.median(column) for column in zip(*measured, strict=True)))
        rows.append([name, f"{middle.seconds:.1f}", f"{middle.cpu_s:.1f}",
                     f"{middle.peak_mb:.0f}", f"{size:.0f}"])  # fmt: skip
    columns = ("", "seconds", "CPU s", "memory at most, MB", "packages on disk, MB")
    text = (
        f"{table(columns, rows)}\n\n"
        f"{rounds} processes each, in turn, medians; {machine('torch', 'onnxruntime')}"
    )
    publish(text, write, MARK)


if __name__ == "__main__":
    main()
