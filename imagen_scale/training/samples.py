"""The samples of one U-Net: those it is trained on, and those held out."""

from typing import NamedTuple

from imagen_scale.config import Config, StageConfig
from imagen_scale.data.image_store import ImageStore
from imagen_scale.data.lowres_inputs import LowresInputs
from imagen_scale.data.prepared import Prepared
from imagen_scale.data.seeds import seeded
from imagen_scale.data.sequence import CaptionedImages
from imagen_scale.data.split import split
from imagen_scale.training.lowres_samples import Drawn


class Samples(NamedTuple):
    """Two sequences over disjoint parts of the pictures."""

    train: CaptionedImages  # shuffled, mirrored where the configuration says so
    held_out: CaptionedImages | None  # always in the same order; None when nothing is held out


def split_samples(
    config: Config, stage: StageConfig, prepared: Prepared, drawn: Drawn | None = None
) -> Samples:
    """Divides the prepared pictures by `data.val_fraction`.

    Args:
        config: The run.
        stage: The U-Net.
        prepared: Its pictures.
        drawn: Training pictures as the stage before draws them, for `training.lowres_samples`.

    Raises:
        DataError: If nothing is left to train on.
    """

    def sequence(indices: list[int], *, is_trained_on: bool) -> CaptionedImages:
        random_crop = config.data.fit == "random_crop" and is_trained_on
        images = prepared.images[stage.size]
        return CaptionedImages(
            ImageStore.decoding(prepared.source, stage.size) if random_crop else images,
            prepared.source.captions,
            prepared.embeddings,
            indices,
            seed=seeded("data", stage.training.seed, stage.seed_index),
            flip=config.data.flip and is_trained_on,
            random_crop=random_crop,
            max_text_len=stage.unet.max_text_len,
            shuffle=is_trained_on,
            lowres=_lowres_inputs(stage, drawn or {}) if is_trained_on else None,
        )

    train, held_out = split(config.data, prepared.source)
    return Samples(
        sequence(train, is_trained_on=True),
        sequence(held_out, is_trained_on=False) if held_out else None,
    )


def _lowres_inputs(stage: StageConfig, drawn: Drawn) -> LowresInputs | None:
    training = stage.training
    if stage.small_size is None or not (training.lowres_degrade or training.lowres_samples):
        return None
    return LowresInputs(
        stage.small_size, seeded("lowres", training.seed, stage.seed_index),
        training.lowres_degrade, training.lowres_samples, drawn,
    )  # fmt: skip
