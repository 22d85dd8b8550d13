"""The objective of a stage that learns to take few steps."""

import torch
from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.data.sequence import Batch
from imagen_scale.diffusion.distillation import student_factors
from imagen_scale.diffusion.schedule import at_time
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.training.objective import Draws, Objective
from imagen_scale.training.teacher import Teacher


class DistillationObjective(Objective):
    """The loss of a student: as an ordinary one, but what is learned comes from its teacher.

    Noise, dropped captions and low-resolution pictures are drawn as always; of a time only the
    segment counts in which it lies. Where a caption is dropped, both branches of the teacher's
    guidance are the one without text, so that the student knows it too.

    Args:
        stage: The student.
        device: Where the batches are computed.
        teacher: Its teacher, there too.
    """

    def __init__(self, stage: StageConfig, device: torch.device, teacher: Teacher) -> None:
        super().__init__(stage, device)
        self.teacher, self.segments = teacher, teacher.segments
        times = self.segments.beginnings.tolist()
        self.factors = student_factors(
            self.schedule.to("cpu"), times, self.pred_type, stage.loss_weight
        ).to(device)

    def draw(self, positions: Tensor, shape: torch.Size, purpose: str) -> Draws:
        """As an ordinary objective, with the times at which segments begin."""
        draws = super().draw(positions, shape, purpose)
        segment = self.segments.of_time[draws.t]
        return draws._replace(t=self.segments.beginnings[segment])

    @torch.no_grad()
    def learned(
        self, batch: Batch, draws: Draws, x_0: Tensor, lowres_img: Tensor | None, x_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The teacher's answers, and the noise that they leave of x_t."""
        embeds, mask = self._text(batch)
        text = Text(embeds, mask & draws.keep_mask[:, None])
        cond = Conditioning(text, self.teacher.cond_scale)
        if lowres_img is not None:
            noised, lowres_t = self._lowres(draws, lowres_img)
            base = lowres_img if self.stage.unet.lowres_residual else None
            cond = cond._replace(lowres_img=noised, lowres_t=lowres_t, base=base)
        segment = self.segments.of_time[draws.t]
        answer = self.segments.answer(self.teacher.bind(cond), x_t, segment)
        alpha, sigma = (at_time(part, draws.t, x_t) for part in
                        (self.schedule.alpha, self.schedule.sigma))  # fmt: skip
        return answer, (x_t - alpha * answer) / sigma
