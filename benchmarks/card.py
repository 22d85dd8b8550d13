"""Measures this program on the NVIDIA card at hand: one command, some 20 minutes.

\b
    python benchmarks/card.py --out card                          everything, most important first
    python benchmarks/card.py --out card --parts 1,2 --minutes 8  two parts
    python benchmarks/card.py --out card --write docs/cards.md    into the document, between marks
    python benchmarks/card.py --out FOLDER --rehearse             tiny networks on the CPU

\b
Parts: 1  numbers: MinImagen's records, recomputation, continued runs, every optimizer and ZeRO
          stage beside the CPU, samplers
       2  every stage of the two large cascades within --memory: planned, used, images/s, TFLOP/s;
          and MinImagen's way at batch 1
       3  switches on and off in turn
       4  sampling with every runtime, beside MinImagen's 1000 steps

Any card of 8 GB or more. No network, no data set, no package beyond those that are there. Each
measurement has its own process and time limit; FOLDER/rows.jsonl and FOLDER/card.md grow as
results come. What is missing, because time was up or something failed, the same command measures
when it is called again. Exits with 1 if something failed or differs, with 2 without a card.
"""  # noqa: D301 - click reads the backspace

import json
import os
import shutil
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "export"), str(ROOT / "tests")]

from card_parts.measurement import DONE, FAULTS, FULL, MEASURED, Row  # noqa: E402
from card_parts.pages import check_document, page, write_document  # noqa: E402
from card_parts.processes import Processes  # noqa: E402
from card_parts.programme import PARTS, machine, programme  # noqa: E402
from gpu_memory import card_limit  # noqa: E402
from support.planned import lay_out  # noqa: E402


class Results:
    """The rows of a folder, kept as they come.

    Args:
        folder: Where; what an earlier call left there counts.
    """

    def __init__(self, folder: Path) -> None:
        self.lines, self.page = folder / "rows.jsonl", folder / "card.md"
        self.rows: dict[tuple[int, str], Row] = {}
        if self.lines.is_file():
            for line in self.lines.read_text(encoding="utf-8").splitlines():
                self._keep(json.loads(line))

    def add(self, row: Row) -> None:
        """One more, on disk before anything else happens."""
        self._keep(row)
        with self.lines.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        self.page.write_text(page(self.rows.values()), encoding="utf-8")

    def is_done(self, part: int, name: str) -> bool:
        """Whether it need not be measured again."""
        return self.rows.get((part, name), {}).get("status") in DONE

    def _keep(self, row: Row) -> None:
        self.rows[row["part"], row["name"]] = row


def parts_of(text: str) -> tuple[int, ...]:
    """Numbers of parts.

    Raises:
        click.UsageError: If there is no such part.
    """
    parts = text.split(",")
    if not parts or not set(parts) <= set(map(str, PARTS)):
        raise click.UsageError(f"--parts {text}: give some of {','.join(map(str, PARTS))}.")
    return tuple(map(int, parts))


def say(row: Row) -> None:
    """One line for the person watching."""
    why = f": {row['why']}" if row["why"] else ""
    click.echo(
        f"{row['part']}  {row['name']}: {row['status']}{why} ({row['seconds']:.1f} s)", err=True
    )


def has_card() -> bool:
    """Whether torch finds one."""
    import torch

    return torch.cuda.is_available()


@click.command(help=__doc__)
@click.option("--out", "folder", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder of the results.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=0.1), default=20, show_default=True,
              help="For everything.")  # fmt: skip
@click.option("--parts", default="1,2,3,4", show_default=True, help="Which, with commas.")
@click.option(
    "--memory",
    default="12GB",
    show_default=True,
    help="The limit of part 2; a smaller card's own size where that is less.",
)
@click.option("--rehearse", is_flag=True, help="Tiny networks on the CPU.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="A document.")
def main(
    folder: Path, minutes: float, parts: str, memory: str, rehearse: bool, write: Path | None
) -> None:
    """Measures what is missing in a folder, and says what came of it."""
    chosen, limit = parts_of(parts), card_limit(memory)
    if not rehearse and not has_card():
        click.echo("card.py needs an NVIDIA card and torch finds none; --rehearse runs it on the "
                   "CPU with tiny networks.", err=True)  # fmt: skip
        sys.exit(2)
    if write is not None:
        check_document(write)  # told before, not after, the minutes of measuring
    folder = folder.resolve()
    processes = Processes(folder, minutes, on_card=not rehearse)
    lay_out(processes.cache / "plan")  # what the planner would need minutes to find
    results, models = Results(folder), folder / "models"
    (header,) = processes.run([machine(rehearse=rehearse)])
    before = results.rows.get((0, "machine"), header)
    if header["status"] == MEASURED and any(
        before.get(key) != header.get(key) for key in ("card", "versions")
    ):
        raise click.UsageError(
            f"--out {folder}: has figures of another card or of other versions; give another."
        )
    results.add(header)
    say(header)
    bound = min(limit, header.get("memory", limit))
    missing = [
        one
        for one in programme(header, chosen, bound, models, rehearse=rehearse)
        if not results.is_done(one.part, one.name)
    ]
    faults = 0
    try:
        for row in processes.run(missing):
            results.add(row)
            say(row)
            faults += row["status"] in FAULTS or (row["status"] == FULL and row["part"] == 2)
    finally:
        shutil.rmtree(models, ignore_errors=True)
    if write is not None:
        write_document(write, results.rows.values())
    click.echo(str(results.page))
    sys.exit(faults > 0)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
    main()
