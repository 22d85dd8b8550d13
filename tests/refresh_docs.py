"""Writes anew what the documents show of `imagen-scale plan`, and the names in docs/api.md.

python tests/refresh_docs.py
"""

import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from click.testing import CliRunner
from support import ROOT, api_reference, plan_table
from support.doc_commands import BLOCK, DOCUMENTS, commands, is_deterministic

from imagen_scale.commands.main import main


def output(words: list[str]) -> str:
    """What a command prints, without blanks at the ends of its lines."""
    done = CliRunner().invoke(main, words[1:])
    if done.exit_code:
        raise SystemExit(done.output)
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def refresh(document: Path) -> None:
    """Writes one document anew."""
    shown = {str(c.words): output(c.words) for c in commands(document)
             if c.output is not None and is_deterministic(c)}  # fmt: skip

    def block(match: re.Match[str]) -> str:
        for command in commands(document):
            line = match[2].partition("\n")[0]
            if match[1] == "console" and line == "$ " + " ".join(command.words):
                new = shown.get(str(command.words))
                return match[0] if new is None else f"```console\n{line}\n{new}```"
        return match[0]

    text = document.read_text(encoding="utf-8")
    document.write_text(BLOCK.sub(block, text), encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)
    for name in ("api.md", "sampling.md"):
        page = ROOT / "docs" / name
        page.write_text(api_reference.refreshed(page.read_text("utf-8")), encoding="utf-8")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["IMAGEN_SCALE_CACHE"] = cache  # no card's measured ratio
        for path in DOCUMENTS:
            if path.suffix == ".md":
                refresh(path)
        readme = ROOT / "README.md"
        readme.write_text(plan_table.refreshed(readme.read_text("utf-8")), encoding="utf-8")
