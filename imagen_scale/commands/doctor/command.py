"""`imagen-scale doctor`."""

import json
import os
import sys
from pathlib import Path

import click

from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.train_process import run_folder


@click.command(short_help="Is this machine ready? What is missing?")
@click.option("--config", "config_path", help="JSON file of a run: its text encoder is looked for.")
@click.option("--build", is_flag=True, help="Compile DeepSpeed's operators now (1-3 min each).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@user_errors
def doctor(config_path: str | None, build: bool, as_json: bool) -> None:
    """Look at this machine and say what is missing for training and sampling, and the remedy.

    Locks that killed builds left behind are removed. Exit code 1 when there is a problem, 0 when
    there are warnings only.

    \b
        imagen-scale doctor
        imagen-scale doctor --build
        imagen-scale doctor --config configs/cascade_64_256.json --json
    """
    encoder, runs = None, Path("runs")
    if config_path is not None:
        from imagen_scale.config import load_config

        config = load_config(config_path)
        encoder, runs = config.text_encoder, run_folder(config, config_path, None)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported: only look
    from rich.console import Console

    from imagen_scale.commands.doctor.examination import (
        as_dict,
        examine,
        print_findings,
        quiet_libraries,
        worst,
    )

    with _Status() as status, quiet_libraries():
        findings = list(
            examine(
                encoder, folders={"runs": runs.resolve()}, build=status.say if build else None,
                on_check=lambda name: status.show(f"examining: {name}"),
            )
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(as_dict(findings), indent=1))
    else:
        print_findings(findings, Console(highlight=False))
    if worst(findings) == "problem":
        sys.exit(1)


class _Status:
    """What is done at the moment and for how long; on a terminal only, but for what is said."""

    def __enter__(self) -> "_Status":
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("examining", total=None)
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, what: str) -> None:
        """Replaces what is shown."""
        self._progress.update(self._task, description=what)

    def say(self, sentence: str) -> None:
        """Tells of something that takes long; this stays, also where output is piped."""
        self._console.print(sentence, markup=False, soft_wrap=True)
        self._progress.reset(self._task, description=sentence.partition(" into ")[0])
