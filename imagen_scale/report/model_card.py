"""The card of a run: what it is, what it learned from, how well, and how it is sampled."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from imagen_scale.config import Config
from imagen_scale.data.sources.emoji import OPENMOJI_ATTRIBUTION
from imagen_scale.files.caches import expanded
from imagen_scale.report.measures import rows
from imagen_scale.report.publication import Upload, is_repo
from imagen_scale.runs.folders import data_report_path, evaluation_path
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.runs.records import DataReport, EvaluationRecord, read_record
from imagen_scale.version import __version__


def signed(text: str) -> str:
    """A card with a mark by which it is known again as long as nobody has changed it."""
    return f"{text}\n<!-- written by imagen-scale: {_hash(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is one that was `signed`, to the last letter."""
    text, mark, rest = card.rpartition("\n<!-- written by imagen-scale: ")
    return bool(mark) and rest == f"{_hash(text)} -->\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_card(
    run: Path, repo: str, stages: Sequence[InferenceFile], files: Sequence[Upload]
) -> str:
    """The card as Markdown, with the block of facts that the hub reads.

    Args:
        run: The run's folder.
        repo: OWNER/NAME.
        stages: Its inference files.
        files: What is uploaded with it.
    """
    name, config = repo.partition("/")[2], stages[0].config
    sizes = " -> ".join(f"{file.stage.size} px" for file in stages)
    drawn = {
        file.unet_number: one.name
        for file in stages for one in files
        if one.name.startswith(f"samples/unet{file.unet_number}_step_")
    }  # fmt: skip
    parts = [
        "---\nlibrary_name: imagen-scale\npipeline_tag: text-to-image\ntags:\n- imagen\n"
        "- text-to-image\n---",
        f"# {name}",
        f"A cascade that turns text into pictures ({sizes}), trained from random weights"
        f"{_starts(stages)} with imagen-scale {__version__}.",
        *(f"![What stage {number} draws]({path})" for number, path in drawn.items()),
        "## What it learned from",
        _learned_from(run, config),
        "## Stages",
        _stages(stages),
        "## How well",
        _measured(run),
        "## Sampling",
        _sampling(repo, name, config),
    ]
    return "\n\n".join(parts) + "\n"


def _starts(stages: Sequence[InferenceFile]) -> str:
    return ", or another run's," if any(file.origin_sha256 for file in stages) else ""


def _learned_from(run: Path, config: Config) -> str:
    data = config.data
    kinds = {
        "emoji": "Drawings of emoji with their Unicode names",
        "folder": "A folder of pictures with captions",
        "webdataset": "Pictures with captions in tar shards",
        "huggingface": "A data set of pictures with captions",
    }
    sentence = kinds[data.source]
    if data.source == "huggingface" and data.path and _is_of_hub(data.path):
        sentence = f"[{data.path}](https://huggingface.co/datasets/{data.path})"
    report = read_record(data_report_path(run), DataReport, [])
    if report is not None:
        sentence += f": {report.used:,} pictures"
    if data.val_fraction:
        sentence += f", of which {data.val_fraction:.0%} were held out"
    encoder = config.text_encoder
    if "/" in encoder and not _is_of_hub(encoder):
        encoder = expanded(encoder).name
    sentence += f". Captions were read through {encoder}."
    return f"{sentence} {OPENMOJI_ATTRIBUTION}" if data.source == "emoji" else sentence


def _is_of_hub(name: str) -> bool:
    """Whether a name is one on the hub, and no folder of this machine."""
    return is_repo(name) and not expanded(name).exists()


def _stages(stages: Sequence[InferenceFile]) -> str:
    lines = ["| U-Net | pictures | parameters | predicts | steps | pictures a step |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for file in stages:
        stage = file.stage
        lines.append(
            f"| {file.unet_number} | {stage.size} px | {_parameters(file.path) / 1e6:.1f} M | "
            f"{stage.unet.pred_type} | {file.step:,} | {stage.global_batch} |"
        )
    return "\n".join(lines)


def _parameters(path: Path) -> int:
    count = 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            size = 1
            for side in file.get_slice(name).get_shape():
                size *= side
            count += size
    return count


def _measured(run: Path) -> str:
    found = read_record(evaluation_path(run), EvaluationRecord, [])
    if found is None:
        return "It was not measured (`imagen-scale evaluate`)."
    header = ["measure", *(f"U-Net {one.unet}, {one.size} px" for one in found.stages), "better"]
    lines = [f"On {found.captions:,} captions of {found.split} pictures:", "", _row(header),
             _row(["---"] * len(header))]  # fmt: skip
    lines += [_row([row.name.strip(), *row.cells, row.better]) for row in rows(found)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sampling(repo: str, name: str, config: Config) -> str:
    prompt = json.dumps((*config.training.sample_prompts, "red heart")[0], ensure_ascii=False)
    return (
        f"```bash\nhf download {repo} --local-dir runs/{name}\n"
        f"imagen-scale sample {prompt} --run runs/{name}\n```\n\n"
        f"```python\nfrom imagen_scale import Cascade\n\n"
        f'(image,) = Cascade.load("runs/{name}").sample({prompt})\n```\n\n'
        f"Weights are safetensors; nothing of it runs code."
    )
