"""How every command ends: our exceptions become one sentence and an exit code.

0 done; 1 a failure; 2 wrong use; 3 an export differs from the network; 130 interrupted.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from imagen_scale.errors import ImagenScaleError, of_system, spelled


def with_flags(message: str) -> str:
    """A message of the library with its options as this command line spells them."""
    return spelled(message, lambda name: "--" + name.replace("_", "-"))


_USUAL = warnings.formatwarning


def _in_a_line(message: Any, category: Any, *where: Any, **line: Any) -> str:
    """A warning of ours without the place in the code, which a user has no use for."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _USUAL(message, category, *where, **line)


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Ends our exceptions in one sentence and their exit code, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        warnings.formatwarning = _in_a_line
        try:
            command(*args, **kwargs)
        except ImagenScaleError as error:
            click.echo(f"error: {with_flags(error.marked)}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:  # the reader has enough, as `head` does: click ends quietly
            raise
        except OSError as error:
            click.echo(f"error: {of_system(error)}", err=True)
            sys.exit(1)

    return wrapped
