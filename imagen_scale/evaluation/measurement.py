"""Measuring a cascade: pictures made from captions, beside the real ones of these captions."""

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.data.prepared import Prepared, real_pictures
from imagen_scale.diffusion.lowres import resize, shrink_and_enlarge
from imagen_scale.evaluation.colour_words import ColourWords, agreement, shares
from imagen_scale.evaluation.distances import clip_score, frechet_distance, kernel_distance
from imagen_scale.evaluation.diversity import Diversity, diversity
from imagen_scale.evaluation.features import Clip, Extractor
from imagen_scale.evaluation.prediction import x_0_errors
from imagen_scale.sampling.groups import GROUP
from imagen_scale.sampling.measures import (
    Colour,
    ColourTally,
    drift,
    lowres_consistency_db,
    nearest_distance,
    psnr_db,
    retrieval_accuracy,
    ssim,
)
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.stage import Inputs, Listener
from imagen_scale.sampling.stages import TrainedStages

PIXELS_HELD = 2**24  # of a set of pictures; four sets of float32 are held at a time
# Side of the copies in which training pictures are looked for, and the most of them: 25 MB.
KNOWN_SIDE, MOST_KNOWN = 16, 8192
MOST_DECODED = 512  # where each of them has to be decoded first
DIVERSE = 16  # captions that are drawn from several seeds
MAX_DB = 100.0  # counted for pictures that are equal, whose ratio is infinite


class Restoration(NamedTuple):
    """Real pictures shrunk to a stage's input and enlarged again, mean over the pictures."""

    psnr_db: float
    bicubic_psnr_db: float
    ssim: float
    bicubic_ssim: float


class StageMeasures(NamedTuple):
    """What was measured of one stage."""

    unet: int  # from 1
    size: int  # side of its pictures in pixels
    retrieval_accuracy: float  # in [0, 1]
    generated_colour: Colour
    real_colour: Colour
    colour_mean_drift: float  # of the colour that is furthest off, generated - real, levels 0 to 1
    colour_std_drift: float
    # Of the clean picture that is predicted, mean over noise levels; few steps know none between.
    x_0_error: float | None
    nearest_train: float | None = None  # distance to the nearest training picture, levels 0 to 1
    real_nearest_train: float | None = None  # the same of real pictures that were held out
    lowres_consistency_db: float | None = None  # super-resolution only
    restoration: Restoration | None = None  # super-resolution only
    fid: float | None = None  # with an extractor only
    kid: float | None = None
    clip_score: float | None = None  # with CLIP only
    real_clip_score: float | None = None  # of the real pictures, for comparison
    colour_words: ColourWords | None = None  # where captions name colours
    diversity: Diversity | None = None  # of the first stage, if several seeds were asked for


class Evaluation(NamedTuple):
    """What was measured over N captions."""

    captions: int
    retrieval_chance: float
    stages: list[StageMeasures]
    cut_captions: int = 0  # that are longer than a U-Net's `max_text_len`
    known: int = 0  # training pictures among which the nearest is looked for


def pictures_together(size: int) -> int:
    """Pictures of a side in pixels that are made and held at a time."""
    return max(1, min(GROUP, PIXELS_HELD // size**2))


class Known:
    """Small copies of the pictures that were trained on, to find those that are drawn again.

    Args:
        prepared: The pictures.
        train: Which were trained on, one at least; of very many, `MOST_KNOWN` evenly chosen, or
            `MOST_DECODED` where they are not stored.
        measured: Which are measured.
        size: Of the base stage, which is where small copies are taken from.
    """

    def __init__(
        self, prepared: Prepared, train: Sequence[int], measured: Sequence[int], size: int
    ) -> None:
        most = MOST_DECODED if prepared.images[size].file is None else MOST_KNOWN
        looked_at = min(most, len(train))
        some = [train[i * len(train) // looked_at] for i in range(looked_at)]
        self.looked_at = len(some)
        self.side = min(size, KNOWN_SIDE)
        self.are_others = not set(train) & set(measured)
        parts = [some[start : start + GROUP] for start in range(0, len(some), GROUP)]
        self._small = torch.cat(
            [resize(real_pictures(prepared, part, size), self.side) for part in parts]
        )

    def nearest(self, images: Tensor) -> Tensor:
        """Distance from each picture to the nearest of them, (N,); see `nearest_distance`."""
        return nearest_distance(resize(images, self.side), self._small)


class _StageTally:
    """What is kept of a stage's pictures until all are made: numbers and thumbnails."""

    def __init__(
        self, thumbnail: int, extractor: Extractor | None, clip: Clip | None, known: Known | None
    ) -> None:
        self.thumbnail, self.extractor, self.clip = thumbnail, extractor, clip
        self.known = known
        self.colours = ColourTally(), ColourTally()  # of generated and of real pictures
        # The same pairs; restored ones are of super-resolution.
        self.kept: dict[str, list[Tensor]] = {}
        self.captions: list[str] = []

    def keep(self, name: str, values: Tensor) -> None:
        self.kept.setdefault(name, []).append(values)

    def add(self, generated: Tensor, real: Tensor, captions: list[str]) -> None:
        self.captions += captions
        for what, images, colour in zip(
            ("generated", "real"), (generated, real), self.colours, strict=True
        ):
            colour.add(images)
            self.keep(f"{what} thumbnails", resize(images, self.thumbnail))
            self.keep(f"{what} colours", shares(images))
            if self.known and (what == "generated" or self.known.are_others):
                self.keep(f"{what} nearest", self.known.nearest(images))
            if self.extractor is not None:
                self.keep(f"{what} features", self.extractor(images))
            if self.clip is not None:
                self.keep(f"{what} clip", self.clip(images))
        if self.clip is not None:
            self.keep("captions", self.clip.encode(captions))

    def add_super_resolution(
        self, generated: Tensor, lowres: Tensor, restored: Tensor, bicubic: Tensor, real: Tensor
    ) -> None:
        self.keep("consistency", lowres_consistency_db(generated, lowres).clamp(max=MAX_DB))
        for what, images in (("", restored), ("bicubic_", bicubic)):
            self.keep(f"{what}psnr_db", psnr_db(images, real).clamp(max=MAX_DB))
            self.keep(f"{what}ssim", ssim(images, real))

    def measures(self, unet: int, size: int) -> StageMeasures:
        kept = {name: torch.cat(values) for name, values in self.kept.items()}
        generated, real = (tally.colour() for tally in self.colours)
        words = agreement(self.captions, kept["generated colours"], kept["real colours"])
        result = StageMeasures(
            unet,
            size,
            retrieval_accuracy(
                kept["generated thumbnails"], kept["real thumbnails"], self.thumbnail
            ),
            generated,
            real,
            drift(generated.mean, real.mean),
            drift(generated.std, real.std),
            kept["x_0 errors"].mean().item() if "x_0 errors" in kept else None,
            kept["generated nearest"].mean().item() if "generated nearest" in kept else None,
            kept["real nearest"].mean().item() if "real nearest" in kept else None,
            colour_words=words,
        )
        if "consistency" in kept:
            result = result._replace(
                lowres_consistency_db=kept["consistency"].mean().item(),
                restoration=Restoration(
                    *(kept[name].mean().item() for name in Restoration._fields)
                ),
            )
        if self.extractor is not None:
            sets = kept["generated features"], kept["real features"]
            result = result._replace(fid=frechet_distance(*sets), kid=kernel_distance(*sets))
        if self.clip is not None:
            result = result._replace(
                clip_score=clip_score(kept["generated clip"], kept["captions"]),
                real_clip_score=clip_score(kept["real clip"], kept["captions"]),
            )
        return result


def evaluate(
    cascade: TrainedStages,
    prepared: Prepared,
    indices: Sequence[int],
    train: Sequence[int],
    *,
    options: SamplingOptions = SamplingOptions(),  # noqa: B008  # immutable
    num_seeds: int = 1,
    extractor: Extractor | None = None,
    clip: Clip | None = None,
    listener: Listener = Listener(),  # noqa: B008  # immutable
) -> Evaluation:
    """Generates a picture for each caption and compares it with the real ones.

    Super-resolution is measured twice: on what the stage before it generated, for which only the
    low-resolution picture is known (consistency), and on real pictures shrunk to the stage's
    input, against bicubic enlargement of the same input (PSNR and SSIM). Low-resolution
    pictures get the noise that they get in sampling.

    `GROUP` captions at a time, fewer of large pictures, go through all stages; of their pictures,
    numbers and thumbnails are kept, so that memory grows little with their count.

    Args:
        cascade: The trained stages.
        prepared: Pictures and captions.
        indices: Which of them to use, two at least where an extractor is given.
        train: Which were trained on.
        options: How they are sampled; the i-th picture uses seed + i.
        num_seeds: With two or more, the first `DIVERSE` captions are drawn by the first stage from
            so many seeds each, to see how much it varies.
        extractor: For FID and KID; None leaves them out.
        clip: For the CLIP score; None leaves it out.
        listener: Told of each step.
    """
    settings, configs = cascade.settings(options), cascade.configs
    known = Known(prepared, train, indices, configs[0].size) if train else None
    tallies = [_StageTally(configs[0].size, extractor, clip, known) for _ in configs]
    cut = 0
    together = pictures_together(configs[-1].size)
    for start in range(0, len(indices), together):
        group = indices[start : start + together]
        captions = [prepared.source.captions[i] for i in group]
        text, not_read = encode(cascade.files, captions, device=cascade.device)
        cut += sum(map(bool, not_read))
        seeds = [options.seed + start + i for i in range(len(group))]
        lowres = None
        for config, of_stage, tally in zip(configs, settings, tallies, strict=True):
            stage = cascade.stage(config.number, caches=of_stage.caches)
            try:
                real = real_pictures(prepared, group, config.size)
                inputs = Inputs(text, seeds, lowres)
                generated = stage.sample(inputs, of_stage, listener=listener)
                tally.add(generated, real, captions)
                if lowres is not None:
                    inputs = inputs._replace(lowres=resize(real, lowres.shape[-1]))
                if config.few_steps is None:
                    tally.keep("x_0 errors", x_0_errors(stage, real, inputs).mean(1))
                if lowres is not None:
                    restored = stage.sample(inputs, of_stage, listener=listener)
                    bicubic = shrink_and_enlarge(real, lowres.shape[-1])
                    tally.add_super_resolution(generated, lowres, restored, bicubic, real)
            finally:
                stage.close()
            lowres = generated
    stages = [
        tally.measures(config.number, config.size)
        for config, tally in zip(configs, tallies, strict=True)
    ]
    if num_seeds > 1:
        found = _diversity(cascade, prepared, indices[:DIVERSE], num_seeds, options, listener)
        stages[0] = stages[0]._replace(diversity=found)
    looked_at = 0 if known is None else known.looked_at
    return Evaluation(len(indices), 1 / len(indices), stages, cut, looked_at)


def _diversity(
    cascade: TrainedStages, prepared: Prepared, indices: Sequence[int], num_seeds: int,
    options: SamplingOptions, listener: Listener,
) -> Diversity:  # fmt: skip
    """Of the first stage's pictures of some captions, from seeds that all of them share."""
    text, _ = encode(
        cascade.files, [prepared.source.captions[i] for i in indices], device=cascade.device
    )
    settings = cascade.settings(options)[0]
    with closing(cascade.stage(cascade.configs[0].number, caches=settings.caches)) as stage:
        pictures = [
            stage.sample(
                Inputs(text, [options.seed + seed] * len(indices), None),
                settings,
                listener=listener,
            )
            for seed in range(num_seeds)
        ]
    return diversity(pictures)
