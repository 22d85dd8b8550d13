"""The section `distill`: stages that learn to take few steps from those of another run."""

from typing import Literal, NamedTuple

from pydantic import Field

from imagen_scale.config.section import PerUnet, PositiveFloat, PositiveInt, Section

# Steps of a teacher in all, unless they are written: its own solver leaves little to more.
TEACHER_STEPS = 16
MAX_STEPS = 16  # of a student; with more a solver of second order is as good untaught
StudentSpacing = Literal["trailing", "middle"]


class DistillConfig(Section):
    """Stages that learn to take few steps, without guidance, from the stages of another run.

    Null for an ordinary training. See [Few steps](few_steps.md).
    """

    teacher: str = Field(
        description="Folder of the run whose U-Nets are the teachers, and what each starts from."
    )
    steps: PerUnet[PositiveInt | None] = Field(
        description="Steps in which each U-Net makes its pictures, or one per U-Net; null takes "
        "the teacher's U-Net over as it is."
    )
    cond_scale: PerUnet[PositiveFloat] = Field(
        description="Guidance of the teacher, which becomes part of the student, or one per "
        "U-Net; 1 is none."
    )
    teacher_steps: PerUnet[PositiveInt | None] | None = Field(
        None,
        description="Steps of the teacher in all, a multiple of `steps`, or one per U-Net. null: "
        "the first multiple from 16 on; those of a teacher that takes few steps itself.",
    )
    spacing: StudentSpacing = Field(
        "trailing",
        description="Where the steps of a student lie: even in time, or in the middle of the noise "
        "levels, where most is decided, which learns better and is what `imagen-scale distill` "
        "writes; see `--spacing`. Those of a teacher that takes few steps itself.",
    )


class FewSteps(NamedTuple):
    """How one stage is distilled: the section `distill` without its lists."""

    teacher: str  # folder of a run
    steps: int
    cond_scale: float  # guidance that is built in
    teacher_steps: int | None  # as written
    spacing: StudentSpacing

    @property
    def steps_of_ordinary_teacher(self) -> int:
        """Steps of a teacher that is no student itself."""
        return self.teacher_steps or -(-TEACHER_STEPS // self.steps) * self.steps
