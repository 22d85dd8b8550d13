"""The figures as Markdown: a block for each part, between the marks of a document."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report import split_at_marks, table, write_between_marks

from card_parts.measurement import DIFFERS, MEASURED, Row
from card_parts.programme import PARTS

BLOCKS = {0: "card_machine", 1: "card_numbers", 2: "card_memory", 3: "card_switches",
          4: "card_sampling"}  # fmt: skip
NOTES = {
    1: "*Distance*: the largest of the outputs (absolute), of pixels in [-1, 1], of gradients "
       "(relative to the largest of their parameter) or of losses (relative). Trainings are "
       "compared with torch in fp32 on the CPU; *missed* is how far their weights are from that, "
       "over how far it moved them. A continued run is compared with one that was not "
       "interrupted by that measure; its own repetition gives what is allowed. TF32 is off.",
    2: "Each stage in a process of its own. *Predicted* is the planner's; *in use* is the "
       "allocator's peak and the context with the libraries loaded into it; *allocated* is the "
       "peak of live tensors. Where a step has more micro-batches than were accumulated, images/s "
       "counts the missing ones at the measured time of one. TFLOP/s are those of the mathematics: "
       "what is computed twice is not counted. *As MinImagen*: its network with our attention, "
       "which holds less than its own, in fp32 with torch's Adam at batch 1 and nothing "
       "recomputed; for a cascade, with every U-Net and one Adam over all on the card.",
    3: "Both ways in one process in the order A B B A; median seconds of a step. Above 1 the "
       "second is faster.",
    4: "Guidance scale 3, random weights; a picture is 25 steps of DPM-Solver++(2M), measured "
       "whole, per picture. *As MinImagen* is extrapolated: 1000 steps at the measured time of "
       "one evaluation in two passes, its posterior and thresholding not counted.",
}  # fmt: skip


def blocks(rows: Iterable[Row]) -> dict[str, str]:
    """Markdown by the mark's name; parts without a row are left out."""
    of_part: dict[int, list[Row]] = {}
    for one in rows:
        of_part.setdefault(one["part"], []).append(one)
    header = of_part.get(0, [{}])[-1]
    found = {}
    for part, name in BLOCKS.items():
        if part in of_part:
            text = _machine(header) if part == 0 else _part(part, of_part[part], header)
            found[name] = text
    return found


def page(rows: Iterable[Row]) -> str:
    """All of it as a document of its own, with marks."""
    texts = blocks(rows)
    parts = ["# Measured by `benchmarks/card.py`"]
    for part, name in BLOCKS.items():
        if name in texts:
            title = [f"## {PARTS[part]}"] if part else []
            parts += [*title, f"<!-- {name}: begin -->\n{texts[name]}\n<!-- {name}: end -->"]
    return "\n\n".join(parts) + "\n"


def check_document(document: Path) -> None:
    """Raises `click.UsageError` unless every mark is there."""
    for name in BLOCKS.values():
        split_at_marks(document, name)


def write_document(document: Path, rows: Iterable[Row]) -> None:
    """Replaces what stands between the marks of the parts that were measured."""
    for name, text in blocks(rows).items():
        write_between_marks(document, name, text)


# ------------------------------------------------------------------------------------ the machine


def _machine(header: Row) -> str:
    if header.get("status") != MEASURED:
        return f"The machine could not be measured: {header.get('why')}"
    packages = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    if not header["is_card"]:
        return f"A rehearsal without a card, of tiny networks. {header['machine']} {packages}."
    power = header.get("power.limit", "unknown")
    lines = [
        f"{header['card']}, {_gb(header['memory'])} ({_gb(header['free'])} free), compute "
        f"capability {header['capability']}, power limit {power}, driver "
        f"{header.get('driver_version', 'unknown')}, CUDA {header['cuda']}, cuDNN "
        f"{header['cudnn']}; {packages}. {header['machine']}",
        "Matrix products reach "
        + ", ".join(f"{value:.1f} TFLOP/s in {kind}" for kind, value in header["peaks"].items())
        + f"; stated: {_number(header.get('peak_by_name'), '{:.1f} TFLOP/s in 16 bits')}. "
        f"A bare context takes {_gb(header.get('context'))}.",
    ]
    return "\n\n".join(lines)


# --------------------------------------------------------------------------------------- the parts


def _part(part: int, rows: list[Row], header: Row) -> str:
    columns, cells_of = _TABLES[part]
    if part == 4:
        rows = _beside_minimagen(rows)
    lines = []
    for one in rows:
        cells = [f"**{one['status']}**: {_escaped(one['why'])}"]
        if one["status"] in (MEASURED, DIFFERS):
            try:
                cells = cells_of(one, header)
            except (KeyError, TypeError, ValueError):  # a page must not end the measuring
                cells = ["see rows.jsonl"]
        cells += ["-"] * (len(columns) - 1 - len(cells))
        lines.append([_escaped(one["name"]), *cells])
    counts = Counter(one["status"] for one in rows)
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    return "\n\n".join([NOTES[part], table(columns, lines), f"Rows: {summary}."])


def _numbers(one: Row, header: Row) -> list[str]:
    said = (
        "equal" if one.get("is_equal") else ("ok" if one["status"] == MEASURED else "**DIFFERS**")
    )
    losses = "-"
    if "first" in one:
        losses = f"{one['first']:.4f} to {one['last']:.4f} ({one['expected']:.4f})"
    missed = _number(one.get("missed"), "{:.1e}")
    return [said, f"{one['error']:.1e}", f"{one['bound']:.0e}", missed, losses]


def _memory(one: Row, header: Row) -> list[str]:
    if "full" in one:
        return [f"**out of memory**: {_escaped(one['full'])}", "-", "-", "-", "-", "-",
                _gb(one["allocated"])]  # fmt: skip
    peaks = header.get("peaks", {})
    measured = peaks.get(one.get("precision"))
    named = header.get("peak_by_name") if one.get("precision") in ("bf16", "fp16") else None
    tflops = one.get("tflops")
    return [
        _escaped(one["planned"]),
        " of ".join(map(str, one["accumulated"])) if "accumulated" in one else "-",
        *(_gb(one.get(key)) for key in ("limit", "predicted", "in_use")),
        _number(
            one.get("in_use") and one.get("predicted") and one["in_use"] / one["predicted"],
            "{:.3f}",
        ),
        *(_gb(one.get(key)) for key in ("allocated", "reserved", "context")),
        *(_gb(one.get(key)) for key in ("host_predicted", "host")),
        f"{one['images_per_s']:.2f}",
        _number(tflops, "{:.2f}"),
        _number(tflops and measured and 100 * tflops / measured, "{:.0f} %"),
        _number(tflops and named and 100 * tflops / named, "{:.0f} %"),
    ]


def _switches(one: Row, header: Row) -> list[str]:
    return [
        f"{1000 * one['before_s']:.1f} ms",
        f"{1000 * one['after_s']:.1f} ms",
        f"{one['faster']:.3f}x",
        f"{one['before_images_per_s']:.1f}",
        f"{one['after_images_per_s']:.1f}",
        _gb(one["before_bytes"] or None),
        _gb(one["after_bytes"] or None),
    ]


def _sampling(one: Row, header: Row) -> list[str]:
    cells = []
    for batch in _batches(one):
        if f"full_{batch}" in one:
            cells += [f"**batch {batch}: out of memory**", "-", "-", "-"]
            continue
        cells += [
            f"{one[f'first_{batch}']:.2f} s",
            f"{1000 * one[f'evaluation_{batch}']:.1f} ms",
            f"{one[f'picture_{batch}']:.2f} s",
            _number(one.get(f"times_{batch}"), "{:.0f}x"),
        ]
    return [*cells, _gb(one.get("allocated"))]


def _batches(one: Row) -> list[int]:
    keys = [key.partition("_") for key in one]
    return sorted({int(batch) for kind, _, batch in keys if kind in ("evaluation", "full")})


def _beside_minimagen(rows: list[Row]) -> list[Row]:
    """The same rows with how many times faster than the extrapolated one of their network."""
    slowest = {
        one["name"].partition(":")[0]: one for one in rows if one.get("is_extrapolated")
    }  # fmt: skip
    found = []
    for one in rows:
        theirs = slowest.get(one["name"].partition(":")[0], {})
        times = {
            key.replace("picture", "times"): theirs[key] / value
            for key, value in one.items()
            if key.startswith("picture_") and key in theirs and value
        }
        found.append(one | times)
    return found


_TABLES: dict[int, tuple[list[str], Any]] = {
    1: (["", "result", "distance", "allowed", "missed", "loss, first to last (expected)"],
        _numbers),
    2: (["", "planned", "accumulated here", "limit", "predicted", "in use", "ratio",
         "allocated", "reserved",
         "context", "host predicted", "host measured", "images/s", "TFLOP/s",
         "of the measured peak", "of the stated peak"], _memory),
    3: (["", "first", "second", "faster", "images/s, first", "second", "allocated, first",
         "second"], _switches),
    4: (["", "first call, one picture", "evaluation", "picture", "times MinImagen",
         "first call, batch", "evaluation", "a picture", "times MinImagen", "allocated"],
        _sampling),
}  # fmt: skip


def _gb(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.2f} GB"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
