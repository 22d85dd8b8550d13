"""The whole examination, and how it is shown."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imagen_scale.commands.doctor import machine, software
from imagen_scale.commands.doctor.finding import Check, Finding, examined

# Not everyone needs them, so that one which is broken is a warning.
_OPTIONAL = ("ONNX Runtime", "TensorRT-RTX", "OpenVINO", "bitsandbytes")
_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[bold red]problem[/]"}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps what libraries log while they are imported out of the table."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def examine(
    encoder: str | None = None,
    *,
    folders: dict[str, Path] | None = None,
    build: Callable[[str], None] | None = None,
    on_check: Callable[[str], None] = lambda name: None,
) -> Iterator[Finding]:
    """Examines this machine, one finding after another.

    Args:
        encoder: Text encoder to look for; None looks for the embedded one.
        folders: What is written where, for the free space; None takes the current folder.
        build: None only looks; otherwise DeepSpeed's operators are compiled and this is told.
        on_check: Told what is looked at next.
    """
    folders = folders or {"runs": Path.cwd()}
    checks: dict[str, Check] = {
        "Python": machine.python,
        "torch": machine.torch_and_cards,
        "RAM": machine.ram,
        "pinned memory": machine.pinned_memory,
        "shared memory": machine.shared_memory,
        "disk": partial(machine.disk, folders),
        "caches": machine.caches,
        "compiler": software.compiler,
        "DeepSpeed": partial(software.deepspeed, build),
        "ONNX Runtime": software.onnxruntime,
        "TensorRT-RTX": software.tensorrt,
        "OpenVINO": software.openvino,
        "bitsandbytes": software.bitsandbytes,
        "text encoder": partial(software.text_encoder, encoder),
    }
    for name, check in checks.items():
        on_check(name)
        yield from examined(name, check, "warning" if name in _OPTIONAL else "problem")


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON can hold them."""
    return {
        "state": worst(findings),
        "findings": [finding._asdict() for finding in findings],
    }


def worst(findings: list[Finding]) -> str:
    """The state of the whole: of its worst finding."""
    states = {finding.state for finding in findings}
    return next((state for state in ("problem", "warning") if state in states), "ok")


def print_findings(findings: list[Finding], console: Console) -> None:
    """Prints a table on a terminal, and one plain line for each finding elsewhere."""
    if not console.is_terminal:
        for name, state, seen, remedy in findings:
            line = f"{state:<8} {name}: {seen}"
            console.print(f"{line} -> {remedy}" if remedy else line, markup=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("seen", overflow="fold")
    for name, state, seen, remedy in findings:
        hint = f"\n[dim]-> {escape(remedy)}[/]" if remedy else ""
        table.add_row(_MARKS[state], name, escape(seen) + hint)
    console.print(table)
