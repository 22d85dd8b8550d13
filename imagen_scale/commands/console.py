"""What commands print while they work: lines and progress on stderr, tables on stdout."""

import sys
from collections.abc import Callable
from typing import Any

import click

from imagen_scale.commands.errors import with_flags


def say(sentence: str) -> None:
    """A line on stderr."""
    click.echo(with_flags(sentence), err=True)


def open_console() -> Any:
    """For tables; where they are piped, lines are not broken."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


class Progress:
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
