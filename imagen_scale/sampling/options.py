"""How pictures are sampled: every option once, with its meaning, its default and its range.

The command line's options, `Cascade.sample`'s signature and docstring, the fields of the page and
the table of docs/sampling.md are made from `SamplingOptions`. Needs no torch.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from imagen_scale.config import StageConfig
from imagen_scale.config.distillation import FewSteps
from imagen_scale.config.section import PerUnet
from imagen_scale.data.blank import is_blank
from imagen_scale.diffusion.guidance import shares
from imagen_scale.diffusion.names import Sampler, Spacing, SpacingChoice
from imagen_scale.errors import UsageError, option
from imagen_scale.sampling.option_model import OptionModel
from imagen_scale.sampling.per_stage import columns_of
from imagen_scale.sampling.wanted import SEEDS, check_seeds

Positive = Annotated[int, Field(ge=1)]


class StageSettings(BaseModel):
    """How one stage is sampled: what `SamplingOptions.for_stages` makes of the options."""

    model_config = ConfigDict(frozen=True)

    steps: int = 25
    cond_scale: float = 1.0
    sampler: Sampler = "dpmpp_2m"
    spacing: Spacing = "trailing"
    eta: float = 0.0
    threshold: float | None = None  # None: the stage's own; see `Stage`
    guidance_interval: str | None = None  # "FROM:UNTIL"; None: guidance acts in every step
    cache_interval: int = 1  # one evaluation of so many is whole

    @property
    def caches(self) -> bool:
        """Whether some evaluations reuse what others found."""
        return self.cache_interval > 1


class SamplingOptions(OptionModel):
    """Options of a call; those of stages take one value for all, or a list with one for each."""

    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = Field(
        0, description="Same seed, same picture; the j-th picture of a prompt uses seed + j."
    )
    num: Positive = Field(1, description="Pictures per prompt.")
    negative_prompt: str | None = Field(
        None,
        description="What guidance leads away from, in place of no text at all.",
    )
    steps: PerUnet[Positive] = Field(25, description="Sampling steps.")
    cond_scale: PerUnet[float] = Field(
        3.0,
        title="Guidance",
        description="Guidance scale: 1 is none, above 1 follows the text more closely. A single "
        "value is the base stage's, and the others take 1.",
    )
    sampler: PerUnet[Sampler] = Field("dpmpp_2m", description="Solver of the reverse process.")
    spacing: PerUnet[SpacingChoice] = Field(
        "auto",
        description="Which times are visited; auto is logsnr where a stage predicts x_0, trailing "
        "elsewhere.",
    )
    eta: PerUnet[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.0, description="Share of DDPM's noise, 0 to 1; for the sampler ddim only."
    )
    threshold: PerUnet[Annotated[float, Field(gt=0, le=1)] | None] = Field(
        None,
        description="Percentile of dynamic thresholding, above 0 and at most 1; by default the "
        "configuration's (`dynamic_thresholding_percentile`), which may be none; nor has a stage "
        "of `lowres_residual` one. Without it values beyond -1 and 1 are cut off.",
    )
    guidance_interval: PerUnet[str | None] = Field(
        None,
        description="Shares of the steps, FROM:UNTIL in 0 to 1, in which guidance acts, as 0.2:1; "
        "the others take half the work. By default it acts in all.",
    )
    cache_interval: PerUnet[Positive] = Field(
        1,
        description="One evaluation of so many is whole; those after it compute the U-Net's finest "
        "level alone and take the rest from it (DeepCache). 1 computes all.",
    )
    tile: Positive | None = Field(
        None, description="Compute stages larger than this in tiles of this side, in pixels."
    )
    at_once: Positive | None = Field(
        None, description="Pictures computed together; by default as many as their size allows."
    )

    @field_validator("negative_prompt")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return None if value is None or is_blank(value) else value

    def for_stages(self, stages: Sequence[StageConfig]) -> list[StageSettings]:
        """The settings of each stage, checked against each other.

        Args:
            stages: The stages that are sampled, in order.

        Raises:
            UsageError: Naming the option that is wrong.
        """
        check_seeds(self.seed, self.num)
        values = {name: getattr(self, name) for name in StageSettings.model_fields}
        columns = columns_of(values, len(stages))
        for i, stage in enumerate(stages):
            if stage.few_steps is not None:
                self._check_few_steps(stage, {name: columns[name][i] for name in columns})
                for name, value in learned_settings(stage.few_steps):
                    if name != "cond_scale" or columns[name][i]:  # 0: the branch without text
                        columns[name][i] = value
                continue
            if "steps" not in self.model_fields_set:
                columns["steps"][i] = min(columns["steps"][i], stage.timesteps)
            elif columns["steps"][i] > stage.timesteps:
                raise UsageError(
                    f"{option('steps')} {columns['steps'][i]}: {stage.name} has {stage.timesteps} "
                    f"times (imagen.timesteps); take at most so many."
                )
            if columns["spacing"][i] == "auto":
                columns["spacing"][i] = default_spacing(stage)
            if columns["threshold"][i] is None:
                columns["threshold"][i] = stage.threshold
        settings = [
            StageSettings(**dict(zip(columns, row, strict=True)))
            for row in zip(*columns.values(), strict=True)
        ]
        for of_stage, stage in zip(settings, stages, strict=True):
            if of_stage.caches and stage.unet.num_levels == 1:
                raise UsageError(
                    f"{option('cache_interval')} {of_stage.cache_interval}: {stage.name} has one "
                    f"level, and nothing below it to keep; give 1 for it."
                )
            if of_stage.guidance_interval:
                shares(of_stage.guidance_interval)
            if of_stage.eta and of_stage.sampler != "ddim":
                raise UsageError(
                    f"{option('eta')} {of_stage.eta}: goes with {option('sampler')} ddim, not "
                    f"{of_stage.sampler}."
                )
        return settings

    def _check_few_steps(self, stage: StageConfig, asked: dict[str, Any]) -> None:
        """Refuses what a stage of few steps cannot do, if it was asked for.

        Raises:
            UsageError: Naming the option.
        """
        few = stage.few_steps
        assert few is not None
        for name, own in learned_settings(few):
            others = {"spacing": ("auto",), "cond_scale": (0,)}.get(name, ())
            if name in self.model_fields_set and asked[name] not in (own, *others):
                raise UsageError(
                    f"{option(name)} {asked[name]}: {stage.name} learned to take {few.steps} "
                    f"{'step' if few.steps == 1 else 'steps'} with guidance {few.cond_scale:g} "
                    f"built in, and nothing else; leave {option(name)} out, or sample its teacher "
                    f"{few.teacher}."
                )


def learned_settings(few: FewSteps) -> StageSettings:
    """The only way in which a stage of few steps is sampled: as it learned it."""
    return StageSettings(steps=few.steps, cond_scale=1.0, sampler="ddim", spacing=few.spacing)


def default_spacing(stage: StageConfig) -> Spacing:
    """The spacing that suits what a stage predicts.

    A network that predicts x_0 decides at high noise what the picture shows, and takes more steps
    there.
    """
    return "logsnr" if stage.unet.pred_type == "x0" else "trailing"
