"""One attempt at training a U-Net: all that is built for it, and how far it came."""

from collections.abc import Callable
from types import TracebackType

from imagen_scale.config import StageConfig
from imagen_scale.planning.setup import Setup
from imagen_scale.runs.inference import load_weights
from imagen_scale.training.building import build_unet, make_engine
from imagen_scale.training.distillation import DistillationObjective
from imagen_scale.training.ema import Ema, PowerEma
from imagen_scale.training.memory_use import forget_peaks, host_bytes, release_memory
from imagen_scale.training.objective import Objective
from imagen_scale.training.origin import Origin
from imagen_scale.training.stepping import Stepper
from imagen_scale.training.teacher import Teacher


class Session:
    """Engine, average, loss and stepper of one attempt; leaving it frees them.

    Args:
        stage: The U-Net.
        setup: How it is trained this time.
        say: Told when something of DeepSpeed has to be compiled first.
        origin: What its weights are before the first step, and of a student its teacher; None for
            random ones.

    Attributes:
        step: Optimizer steps done, those of the checkpoint it continues from included.
        saved_step: Step of the newest checkpoint.
        baseline: Host memory of this process before anything was built, bytes.
        num_parameters: Elements of the network's weights.

    Raises:
        ConfigError: If DeepSpeed refuses the configuration.
        EnvironmentProblem: If something of it cannot be compiled.
    """

    def __init__(
        self,
        stage: StageConfig,
        setup: Setup,
        say: Callable[[str], None],
        *,
        origin: Origin | None = None,
    ) -> None:
        self.stage, self.setup = stage, setup
        self.step = self.saved_step = 0
        release_memory()
        forget_peaks()
        self.baseline = host_bytes()
        unet = build_unet(stage, setup)
        if origin is not None:
            unet.load_state_dict(load_weights(origin.file.path))
        self.num_parameters = sum(parameter.numel() for parameter in unet.parameters())
        self.engine = make_engine(unet, stage, setup, say)
        try:
            self.ema = Ema(self.engine, stage.training.ema_decay, offload=setup.ema_offload)
            self.profiles = [PowerEma(self.engine, w) for w in stage.training.ema_widths]
            self.objective = self._objective(origin, say)
            self.stepper = Stepper(self.engine, self.objective, setup.accumulation)
        except BaseException:
            self.engine.release()
            raise

    def _objective(self, origin: Origin | None, say: Callable[[str], None]) -> Objective:
        stage, device = self.stage, self.engine.device
        if stage.few_steps is None:
            return Objective(stage, device)
        assert origin is not None
        teacher = Teacher(origin.file, stage, self.setup, device, say)
        return DistillationObjective(stage, device, teacher)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.engine.release()
        for average in self.averages:
            average.release()

    @property
    def averages(self) -> list[Ema]:
        """Of the weights: first the one that pictures are sampled from."""
        return [self.ema, *self.profiles]

    @property
    def has_whole_unsaved_steps(self) -> bool:
        """Whether saving now would lose nothing and gain something."""
        return self.step > self.saved_step and not self.stepper.is_updating
