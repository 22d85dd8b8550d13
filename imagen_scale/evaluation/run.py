"""`imagen-scale evaluate`: a run measured on captions of its own data set."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from imagen_scale.config import Config
from imagen_scale.data.prepared import Prepared, prepare
from imagen_scale.data.split import split as split_pictures
from imagen_scale.data.storage import Progress
from imagen_scale.errors import UsageError, option
from imagen_scale.evaluation.distances import require_torchmetrics
from imagen_scale.evaluation.features import Clip, open_extractor
from imagen_scale.evaluation.measurement import Evaluation, evaluate
from imagen_scale.evaluation.report import as_dict, not_finite
from imagen_scale.files.atomic import write_atomically
from imagen_scale.runs.folders import evaluation_path
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.contract import Say
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Listener
from imagen_scale.sampling.stages import TrainedStages

Split = Literal["held-out", "train"]


class Report(NamedTuple):
    """The measures, where they came from, and the file that is to hold both."""

    result: Evaluation
    facts: dict[str, Any]
    file: Path

    def write(self) -> None:
        """Writes the file."""
        text = json.dumps(self.facts, indent=1) + "\n"
        write_atomically(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def evaluate_run(
    run: Path,
    *,
    num: int,
    split: Split | None,
    features: str | None,
    clip: str | None,
    num_seeds: int,
    unet_limit: int | None,
    allow_unfinished: bool,
    runtime: RuntimeOptions,
    options: SamplingOptions,
    progress: Progress,
    say: Say,
) -> Report:
    """Measures a run; `Report.write` puts `evaluation.json` into it.

    Args:
        run: The run's folder.
        num: Captions used at most.
        split: Which pictures; None takes the held-out ones where there are any, and says so
            where there are none.
        features: Network for FID and KID; see `open_extractor`.
        clip: CLIP model for the CLIP score.
        num_seeds: From which some captions are drawn, to see how much pictures vary.
        unet_limit: Measure only the first so many U-Nets.
        allow_unfinished: Accept stages whose training has not ended.
        runtime: What computes the U-Nets, and how.
        options: How pictures are sampled.
        progress: Told of the work.
        say: Told in a sentence what was chosen.

    Raises:
        UsageError: If the split holds no pictures.
        ImagenScaleError: If stages, pictures or networks cannot be used.
    """
    # First: these may have to be downloaded, and are refused in a second.
    if features is not None:
        require_torchmetrics()
    extractor = None if features is None else open_extractor(features)
    known_captions = None if clip is None else Clip(clip)
    cascade = TrainedStages.load(
        run, runtime=runtime, unet_limit=unet_limit, allow_unfinished=allow_unfinished, say=say
    )
    settings = cascade.settings(options)
    config = cascade.files[0].config
    prepared = prepare(config, progress=progress)
    chosen, indices, train = choose_pictures(config, prepared, split, say)
    if features is not None and min(num, len(indices)) < 2:
        raise UsageError(
            f"{option('features')}: {min(num, len(indices))} picture has no FID; take 2 or more."
        )
    result = evaluate(
        cascade, prepared, indices[:num], train, options=options,
        num_seeds=num_seeds, extractor=extractor, clip=known_captions,
        listener=Listener(lambda unet, done, total: progress(f"U-Net {unet}", done, total)),
    )  # fmt: skip
    if result.cut_captions:
        say(
            f"{result.cut_captions} of {result.captions} captions are read to max_text_len only, "
            f"as in training"
        )
    if result.known < len(train):
        say(
            f"the nearest training picture is looked for among {result.known:,} of {len(train):,}"
            + (
                ""
                if prepared.images[config.imagen.image_sizes[0]].file
                else ", since each has to be decoded (data.cache_images_gb)"
            )
        )
    if lost := not_finite(result):
        say(f"no finite number, and left out: {', '.join(lost)}")
    facts = {
        **as_dict(result), "split": chosen, "seed": options.seed, "features": features,
        "clip": clip, "settings": [of_stage.model_dump() for of_stage in settings],
    }  # fmt: skip
    return Report(result, facts, evaluation_path(run))


def choose_pictures(
    config: Config, prepared: Prepared, split: Split | None, say: Say
) -> tuple[Split, list[int], list[int]]:
    """The split in force, its pictures, and those that were trained on."""
    train, held_out = split_pictures(config.data, prepared.source)
    if split is None:
        split = "held-out" if held_out else "train"
        if not held_out:
            say(
                "no pictures were held out (data.val_fraction is 0, or the set is small): measured "
                "on pictures that it was trained on"
            )
    indices = held_out if split == "held-out" else train
    if not indices:
        raise UsageError(
            f"{option('split')} {split}: no picture is in it (data.val_fraction "
            f"{config.data.val_fraction:g}); take the other."
        )
    return split, indices, train
