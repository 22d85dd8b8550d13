"""A process that takes measurements one after the other: `python -m card_parts.child FILE FILE`.

After one that failed it ends, so that the next begins in a fresh process: what a failure leaves
on the card (a spoiled context, tensors that a traceback holds) is nobody else's.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from card_parts.measurement import (
    DIFFERS,
    FAILED,
    FULL,
    LEFT_OUT,
    MEASURED,
    Differs,
    LeftOut,
    Measurement,
    Row,
    row,
)

AGAIN = 75  # exit code: the last answer was a failure, and there is more to do


def measure(measurement: Measurement) -> Row:
    """Takes one measurement; whatever it raises is in the row."""
    from imagen_scale.errors import ConfigError, EnvironmentProblem, MissingExtraError

    module, _, function = measurement.call.partition(":")
    start = time.monotonic()

    def told(status: str, why: object = "", **figures: object) -> Row:
        return row(
            measurement, status, why=_short(why), seconds=time.monotonic() - start, **figures
        )

    try:
        call = getattr(importlib.import_module(module), function)
        return told(MEASURED, **call(**measurement.arguments))
    except Differs as found:
        return told(DIFFERS, found, **found.figures)
    except (LeftOut, MissingExtraError, EnvironmentProblem, ConfigError) as reason:
        return told(LEFT_OUT, reason)
    except Exception as error:
        traceback.print_exc()
        from imagen_scale.training.memory_use import is_out_of_memory

        if is_out_of_memory(error):
            return told(FULL, error)
        return told(FAILED, f"{type(error).__name__}: {error}")


def _short(why: object) -> str:
    lines = str(why).strip().splitlines()
    return lines[0][:300] if lines else ""


def main(questions: str, answers: str) -> None:
    """Reads measurements and appends a row for each."""
    with Path(answers).open("a", encoding="utf-8") as out:
        for fields in json.loads(Path(questions).read_text(encoding="utf-8")):
            measurement = Measurement(*fields)
            if measurement.part == 1:  # read when cuBLAS starts: the same bits each time
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            answer = measure(measurement)
            out.write(json.dumps(answer, default=str) + "\n")
            out.flush()
            if answer["status"] in (FAILED, FULL):
                sys.exit(AGAIN)


if __name__ == "__main__":
    main(*sys.argv[1:])
