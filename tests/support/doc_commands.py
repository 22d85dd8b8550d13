"""The commands that the documents show: found, and checked against the programs they call."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import click

from imagen_scale.commands import train_process
from imagen_scale.commands.main import main
from imagen_scale.config import load_config
from support import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "mkdocs.yml",
    *sorted((ROOT / "docs").glob("*.md")),
]
# What begins a command in a block; everything else there is output or another program's.
PROGRAMS = (
    "imagen-scale",
    "deepspeed",
    "torchrun",
    "srun",
    "make",
    "python",
    "pip",
    "cp",
    "mkdocs",
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`((?:imagen-scale|deepspeed|make|python|pip|mkdocs) [^`]+)`")


class Command(NamedTuple):
    """A command line and where it stands."""

    words: list[str]
    where: str
    is_inline: bool = False  # in running text, where arguments may be left out
    output: str | None = None  # what a console block shows below it

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def commands(document: Path) -> list[Command]:
    """Every command of a document, in its order."""
    text = document.read_text(encoding="utf-8")
    name = document.relative_to(ROOT).as_posix()
    found = []
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        found += _of_block(block[1], block[2], f"{name}:{line}")
    prose = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in INLINE.finditer(prose):
        line = prose[: span.start()].count("\n") + 1
        words = shlex.split(span[1])
        if "..." not in words:
            found.append(Command(words, f"{name}:{line}", is_inline=True))
    return found


def _of_block(language: str, body: str, where: str) -> list[Command]:
    body = body.replace("\\\n", " ")
    if language == "console":
        parts = re.split(r"^\$ ", body, flags=re.M)[1:]
        pairs = [part.partition("\n")[::2] for part in parts]
        return [Command(shlex.split(line, comments=True), where, output=out) for line, out in pairs]
    lines = [line for line in body.splitlines() if line.split(" ")[0] in PROGRAMS]
    return [Command(shlex.split(line, comments=True), where) for line in lines]


class Checker:
    """Checks the commands of one document; what it copies may be used afterwards."""

    def __init__(self) -> None:
        self.copies: dict[str, str] = {}

    def check(self, command: Command) -> None:
        """Raises if the command could not be called as it is written."""
        program, *rest = command.words
        program = program.replace("-", "_")
        getattr(self, f"_check_{program}")(rest, command)

    def _check_imagen_scale(self, words: list[str], command: Command) -> None:
        called, name = main, "imagen-scale"
        words = words[: words.index(">")] if ">" in words else list(words)
        while isinstance(called, click.Group) and words and not words[0].startswith("-"):
            name = words.pop(0)
            if name not in called.commands:
                raise ValueError(f"no command {name!r} (known: {', '.join(called.commands)})")
            called = called.commands[name]
        if command.is_inline and not words:
            return
        self._parse(called, name, words)

    def _parse(self, called: click.Command, name: str, words: list[str]) -> None:
        try:
            context = called.make_context(name, list(words))
        except click.exceptions.Exit:  # --help, --version
            return
        given = context.params
        path = given.get("config_path") or (
            given.get("file") if name in ("check", "train") else None
        )
        if path and path != "FILE":
            load_config(ROOT / self.copies.get(path, path), given.get("overrides", ()))

    def _check_deepspeed(self, words: list[str], command: Command) -> None:
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(words)
        self._script(parsed.user_script, parsed.user_args)

    def _check_torchrun(self, words: list[str], command: Command) -> None:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words)
        self._script(parsed.training_script, parsed.training_script_args)

    def _check_srun(self, words: list[str], command: Command) -> None:
        self.check(command._replace(words=words))

    def _check_python(self, words: list[str], command: Command) -> None:
        if words[0] == "-m":
            if words[1] not in ("venv", "pytest"):
                raise ValueError(f"unknown module {words[1]}")
        elif words[0] != "-c":
            self._script(words[0], words[1:])

    def _script(self, script: str, words: list[str]) -> None:
        text = (ROOT / script).read_text(encoding="utf-8")
        if script == "launch/train.py":
            self._parse(train_process.command, script, words)
            return
        if "@write_option(" in text:
            text += '"--write"'
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and f'"{option}"' not in text:
                raise ValueError(f"{script} has no option {option}")

    def _check_make(self, words: list[str], command: Command) -> None:
        text = (ROOT / "Makefile").read_text()
        for target in words:
            if not re.search(rf"^{target}:", text, re.M):
                raise ValueError(f"no target {target}")

    def _check_pip(self, words: list[str], command: Command) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for word in words:
            if match := re.search(r"(?:^\.|^imagen-scale)\[(.*)\]$", word):
                for extra in match[1].split(","):
                    if extra not in extras:
                        raise ValueError(f"no extra {extra}")
            elif word.endswith(".txt") and not (ROOT / word).is_file():
                raise FileNotFoundError(word)

    def _check_cp(self, words: list[str], command: Command) -> None:
        source, target = words[-2:]
        if source.startswith("configs/"):
            if not (ROOT / source).is_file():
                raise FileNotFoundError(source)
            self.copies[target] = source

    def _check_mkdocs(self, words: list[str], command: Command) -> None:
        from mkdocs.__main__ import cli

        if words[0] not in cli.commands:
            raise ValueError(f"no command {words[0]!r}")
        cli.commands[words[0]].make_context(words[0], words[1:])


def is_deterministic(command: Command) -> bool:
    """Whether a command's output is the same on every machine."""
    given = " ".join(command.words)
    return given.startswith("imagen-scale plan") and "--memory" in given and "--ram" in given
