"""The group of all commands: their order in the help, and how an interruption ends."""

import sys
from typing import Any

import click

# As one meets them, from the first minute on.
ORDER = (
    "doctor", "init", "config", "import-config", "prepare", "plan", "train", "distill", "ema",
    "runs", "report", "sample", "sheet", "ui", "serve", "upscale",
    "evaluate", "push", "export", "import",
)  # fmt: skip
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class CommandGroup(click.Group):
    """Commands in the order of `ORDER`; Ctrl-C ends in one line and exit code 130."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of use; what is not in `ORDER` comes last."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: (*ORDER, name).index(name))

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
