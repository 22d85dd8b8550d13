"""DeepSpeed's list of machines."""

from pathlib import Path

from imagen_scale.errors import UsageError, option


def machines_of(hostfile: Path) -> list[str]:
    """The names of the machines, the first of which runs rank 0.

    Raises:
        UsageError: If DeepSpeed could not read the file; without it it would train here alone.
    """
    from deepspeed.launcher import runner

    if not hostfile.is_file():
        raise UsageError(
            f"{option('hostfile')} {hostfile}: there is no such file. It has a line for each "
            f"machine, its name and the number of its cards: worker-1 slots=4."
        )
    runner.set_log_level_from_string("critical")  # it would print what is told below
    try:
        return list(runner.fetch_hostfile(str(hostfile)))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option('hostfile')} {hostfile}: {error}. It has a line for each machine, its name "
            f"and the number of its cards: worker-1 slots=4."
        ) from None
