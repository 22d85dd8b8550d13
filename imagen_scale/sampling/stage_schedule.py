"""The noise schedule that a stage was configured with."""

from imagen_scale.config import ScheduleConfig, StageConfig
from imagen_scale.diffusion.schedule import NoiseSchedule


def stage_schedule(stage: StageConfig) -> NoiseSchedule:
    """The schedule that a stage is trained and sampled with, on the CPU."""
    return noise_schedule(stage.timesteps, stage.size, stage.unet.schedule)


def noise_schedule(timesteps: int, size: int, written: ScheduleConfig | None) -> NoiseSchedule:
    """The schedule that is written; none is MinImagen's.

    Args:
        timesteps: Diffusion steps T.
        size: Side of the stage's pictures in pixels.
        written: `unets[i].schedule`.
    """
    if written is None:
        return NoiseSchedule.linear(timesteps)
    kinds = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine}
    schedule = kinds[written.type](timesteps)
    if written.shift_from is not None:
        schedule = schedule.shifted((written.shift_from / size) ** 2)
    return schedule.with_zero_terminal_snr() if written.zero_terminal_snr else schedule
