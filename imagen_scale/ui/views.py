"""Pieces of the page as HTML; whatever comes from outside is escaped."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from PIL import Image

from imagen_scale.ui.history import Entry, History

MOST_PIXELS = 512  # of a side, while a stage denoises
AS_PIXELS = 128  # up to this side pictures are enlarged pixel by pixel


def header(run: str, sizes: list[int]) -> str:
    """Name of the run, and what its stages make."""
    stages = " &rarr; ".join(f"{size} px" for size in sizes)
    return f'<div class="is-header"><h1>{escape(run)}</h1><p>{stages}</p></div>'


def stage(
    unet: int, size: int, image: Any = None, *, done: int = 0, steps: int = 0, note: str = ""
) -> str:
    """One stage: the picture as it is expected now, how far it is, and which stage it is.

    Args:
        unet: Its number, from 1.
        size: Side of its pictures in pixels.
        image: (H, W, 3) uint8, or None before the first step.
        done: Steps done.
        steps: Steps in all; 0 before it has begun.
        note: Shown in place of the steps.
    """
    if image is None:
        inside = f"<span>{size} px</span>"
    else:
        kind = "is-pixels" if size <= AS_PIXELS else ""
        inside = f'<img class="{kind}" alt="U-Net {unet}, step {done}" src="{_data(image)}">'
    share = 100 * done / steps if steps else 0
    text = escape(note) or (f"step {done} of {steps}" if steps else "")
    return (
        f'<figure class="is-stage" data-unet="{unet}" data-done="{done}" data-steps="{steps}">'
        f'<div class="is-frame">{inside}</div>'
        f'<div class="is-bar"><i style="width:{share:.1f}%"></i></div>'
        f"<figcaption><b>U-Net {unet}</b> {size} px<span>{text}</span></figcaption></figure>"
    )


def status(sentences: list[str], kind: Literal["quiet", "good", "bad"] = "quiet") -> str:
    """What happens, for eyes and screen readers; the first sentence is the news."""
    if not sentences:
        return ""
    first, *rest = (escape(sentence) for sentence in sentences)
    small = "".join(f"<li>{sentence}</li>" for sentence in rest)
    role = "alert" if kind == "bad" else "status"
    below = f"<ul>{small}</ul>" if small else ""
    return f'<div class="is-status is-{kind}" role="{role}"><p>{first}</p>{below}</div>'


def history_line(history: History) -> str:
    """How many pictures there are, and which are left out."""
    shown, total = len(history.entries), history.total
    if not total:
        return '<p class="is-quiet">No picture yet: what is made here is kept in the run.</p>'
    text = f"{total} picture{'s' if total > 1 else ''}"
    if shown < total - len(history.problems):
        text = f"The newest {shown} of {text}"
    problems = "".join(f"<br>Left out: {escape(problem)}" for problem in history.problems)
    return f'<p class="is-quiet">{text}{problems}</p>'


def details(entry: Entry | None) -> str:
    """One picture of the history and what it was made from."""
    if entry is None:
        return '<p class="is-quiet">Select a picture to see its settings.</p>'
    facts = entry.facts
    rows = [("prompt", facts.prompt)]
    if facts.negative_prompt:
        rows.append(("negative", facts.negative_prompt))
    rows.append(("seed", str(facts.seed)))
    for number, one in enumerate(facts.stages, start=1):
        text = f"{one.steps} steps, guidance {one.cond_scale:g}, {one.sampler}"
        rows.append((f"U-Net {number}", text))
    rows.append(("runtime", ", ".join(dict.fromkeys(one.runtime for one in facts.stages))))
    address = "gradio_api/file=" + quote(str(entry.path.resolve()))
    list_ = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return (
        f'<div class="is-details"><img src="{address}" alt="{escape(facts.prompt)}">'
        f"<div><dl>{list_}</dl>"
        f'<a href="{address}" download="{entry.path.name}">Save {entry.path.name}</a></div></div>'
    )


def sheet(path: Path) -> str:
    """A sheet that was just made."""
    address = "gradio_api/file=" + quote(str(path.resolve()))
    return f'<a href="{address}" download="{path.name}"><img alt="Sheet" src="{address}"></a>'


def caption(entry: Entry) -> str:
    """What stands below a picture of the history."""
    return f"{entry.facts.prompt} · {entry.facts.seed}"


def place(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _data(image: Any) -> str:
    picture = Image.fromarray(image)
    out = io.BytesIO()
    if max(picture.size) > MOST_PIXELS:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
        picture.save(out, "WEBP", quality=90)
        kind = "webp"
    else:
        picture.save(out, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
