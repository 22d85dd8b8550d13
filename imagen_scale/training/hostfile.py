"""DeepSpeed's list of machines."""

from pathlib import Path

from imagen_scale.errors import UsageError, option

MOST_SLOTS = 1000


def machines_of(hostfile: Path) -> dict[str, int]:
    """The names of the machines, the first of which runs rank 0, and the cards of each.

    Raises:
        UsageError: If DeepSpeed could not read the file, without which it would train here alone,
            or would start nothing on one of them.
    """
    from deepspeed.launcher import runner

    if not hostfile.is_file():
        raise UsageError(
            f"{option('hostfile')} {hostfile}: there is no such file. It has a line for each "
            f"machine, its name and the number of its cards: worker-1 slots=4."
        )
    runner.set_log_level_from_string("critical")  # it would print what is told below
    try:
        slots: dict[str, int] = runner.fetch_hostfile(str(hostfile))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option('hostfile')} {hostfile}: {error}. It has a line for each machine, its name "
            f"and the number of its cards: worker-1 slots=4."
        ) from None
    for name, number in slots.items():
        if name.startswith("\ufeff"):
            raise UsageError(
                f"{option('hostfile')} {hostfile}: begins with a byte-order mark, which would be "
                f"part of the first machine's name; save it as UTF-8 without one."
            )
        if not 1 <= number <= MOST_SLOTS:
            raise UsageError(
                f"{option('hostfile')} {hostfile}: slots={number} for {name}: give the number of "
                f"its cards, 1 to {MOST_SLOTS}, or leave the machine out."
            )
    return slots
