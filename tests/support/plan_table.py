"""README's table of what training takes on a card of 12 GB, made by `imagen-scale plan`."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from imagen_scale.commands.main import main

BEGIN, END = "<!-- plans: written by tests/refresh_docs.py -->\n", "<!-- end of plans -->\n"
PLANS = {
    "cascade_64_256.json": ("12GB", "32GB"),
    "imagen_64_256_1024.json": ("12GB", "64GB"),
}
COLUMNS = (
    "stage", "parameters", "pixels", "global batch = micro-batch x accumulation",
    "optimizer and where it lives", "peak on the card, predicted", "host memory, predicted",
)  # fmt: skip


def refreshed(page: str) -> str:
    """The page with its table as it should be."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + _table() + END + rest.partition(END)[2]


def _table() -> str:
    rows = [row for name, memory in PLANS.items() for row in _rows(name, *memory)]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _rows(name: str, card: str, ram: str) -> list[list[str]]:
    path = f"configs/{name}"
    words = ["plan", "--config", path, "--memory", card, "--ram", ram, "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    sizes = json.loads(Path(path).read_text(encoding="utf-8"))["imagen"]["image_sizes"]
    stages = [f"`{name}`, base", *["super-resolution"] * (len(sizes) - 1)]
    return [
        [
            stage, f"{plan['parameters'] / 1e6:,.0f} M", str(size), _batch(plan), _optimizer(plan),
            f"{plan['bytes']['card'] / 1e9:.2f} GB", f"{plan['bytes']['host'] / 1e9:.2f} GB",
        ]
        for stage, size, plan in zip(stages, sizes, json.loads(done.stdout), strict=True)
    ]  # fmt: skip


def _batch(plan: dict[str, Any]) -> str:
    setup = plan["setup"]
    return f"{plan['global_batch']} = {setup['micro_batch']} x {setup['accumulation']}"


def _optimizer(plan: dict[str, Any]) -> str:
    setup = plan["setup"]
    assert setup["optimizer"] == "adamw" and not setup["in_backward"]
    if "offload_optimizer" in setup["zero"]:
        return f"AdamW, ZeRO-{setup['zero']['stage']}, host"
    return f"AdamW on the card{', EMA in host memory' if setup['ema_offload'] else ''}"
