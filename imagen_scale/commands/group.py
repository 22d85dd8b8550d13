"""The group of all commands: their order in the help, and how an interruption ends."""

import sys
from itertools import zip_longest
from typing import Any

import click

# As one meets them, from the first minute on.
ORDER = (
    "doctor", "init", "config", "import-config", "prepare", "plan", "train", "distill", "ema",
    "runs", "report", "sample", "sheet", "ui", "serve", "upscale",
    "evaluate", "push", "export", "import",
)  # fmt: skip
INTERRUPTED = 130  # 128 + SIGINT, as shells count


# What may be empty: no text at all.
TEXTS = ("--prompt", "--negative-prompt")


def refuse_empty(
    command: click.Command, words: list[str], ctx: click.Context | None = None
) -> None:
    """Refuses options without a value: an unset variable of a shell, which nobody meant.

    Raises:
        UsageError: Naming the option.
    """
    takes = {
        name
        for one in command.params
        if isinstance(one, click.Option) and not one.is_flag and not one.count
        for name in one.opts
    }
    for word, following in zip_longest(words, words[1:]):
        if word == "--":
            return
        name, equals, value = word.partition("=")
        is_empty = not value if equals else following == ""
        if name in takes and name not in TEXTS and is_empty:
            raise click.UsageError(
                f"{name}: is empty, as an unset variable of a shell is; give a value, or leave it "
                f"out.", ctx,
            )  # fmt: skip


class CommandGroup(click.Group):
    """Commands in the order of `ORDER`; Ctrl-C ends in one line and exit code 130."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of use; what is not in `ORDER` comes last."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: (*ORDER, name).index(name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of a line, whose options say something."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            refuse_empty(command, rest, ctx)
        return name, command, rest

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs one command line; click alone ends an interruption with exit code 1."""
        if not extra.get("standalone_mode", True):
            return super().main(*args, **extra)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.Abort:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        # Without standalone mode click returns the code of --help, and what a command returned.
        sys.exit(code if isinstance(code, int) else 0)
