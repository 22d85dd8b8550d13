"""The cheapest way to train each U-Net within a memory budget."""

from typing import NamedTuple

from imagen_scale.config import StageConfig
from imagen_scale.config.distillation import FewSteps
from imagen_scale.config.section import CheckpointingLevel, OptimizerName
from imagen_scale.planning.activations import Activations
from imagen_scale.planning.cache import cached_flops, cached_measure, cached_teacher
from imagen_scale.planning.choices import Choices, Mode, mode_of
from imagen_scale.planning.cost import Cost, step_cost
from imagen_scale.planning.machine import Machine
from imagen_scale.planning.setup import Setup
from imagen_scale.planning.speed import step_seconds
from imagen_scale.planning.teacher import evaluations
from imagen_scale.planning.traps import traps
from imagen_scale.planning.words import gb

# Batches at which activations are measured. Nothing in a U-Net mixes pictures, so all others lie on
# the straight line through them.
MEASURED_BATCHES = (1, 8)
# How the optimizers differ from exact AdamW; a lower tier is preferred whatever it costs.
TIERS: dict[OptimizerName, int] = {
    "adamw": 0,
    "adafactor": 0,
    "muon": 0,
    "adamw_8bit": 1,
    "adamw_bf16": 2,
}


# What of a card's memory a plan can do something about.
MOVABLE = ("weights", "gradients", "optimizer", "ema", "activations", "buckets")


class Candidate(NamedTuple):
    """One way to train a U-Net and what it takes."""

    setup: Setup
    cost: Cost
    activations: Activations
    seconds: float  # relative, of one optimizer step
    flops: int  # of a picture's training step, recomputation included


class UnetPlan(NamedTuple):
    """What the planner found for one U-Net."""

    unet_number: int
    choice: Candidate  # when `fault` is set, the one that comes nearest
    fault: str | None  # why nothing fits
    others: list[Candidate]  # the best of each other mode, cheapest first
    warnings: list[str]


class Planner:
    """Plans one U-Net.

    What the configuration writes is kept; what it leaves null is chosen. Crops are never chosen:
    they change what is learned.

    Args:
        stage: The U-Net.
        machine: What there is to spend.
        ratio: Measured over predicted bytes on this card, from earlier runs.
    """

    def __init__(
        self,
        stage: StageConfig,
        machine: Machine,
        *,
        ratio: float = 1.0,
    ) -> None:
        self.stage, self.machine, self.ratio = stage, machine, ratio
        self.choices = Choices(stage, machine)

    def plan(self, keep: Setup | None = None) -> UnetPlan:
        """Finds the cheapest candidate that fits.

        Args:
            keep: A setup whose checkpoints exist: where things live stays as it is, as far as the
                configuration still allows it; checkpoints fit every mode.
        """
        best, modes = [], list(self.choices.modes())
        if keep is not None and mode_of(keep) in modes:
            modes = [mode_of(keep)]
        for mode in modes:
            found = [
                candidate
                for checkpointing, offload in self.choices.checkpointings()
                if (candidate := self._largest(mode, checkpointing, offload)) is not None
            ]
            if found:
                best.append(min(found, key=self._order))
        best.sort(key=self._order)
        choice, fault = best[0], None
        if not self.fits(choice.cost):
            # Nothing fits: the one that comes nearest shows what is missing.
            best.sort(key=lambda candidate: self.excess(candidate.cost))
            choice = best[0]
            fault = self._fault(choice)
        return UnetPlan(
            self.stage.number,
            choice,
            fault,
            [c for c in best if c is not choice],
            traps(self.stage),
        )

    def card_bytes(self, cost: Cost) -> int:
        """Predicted peak on the card, corrected by what was measured on it before."""
        return int(cost.card * self.ratio)

    def host_bytes(self, cost: Cost) -> int:
        """Predicted memory of one machine; without a card its processes' tensors lie there too."""
        tensors = self.card_bytes(cost) * self.machine.ranks if self.machine.card is None else 0
        return self.machine.share(cost.host + tensors)

    def excess(self, cost: Cost) -> int:
        """Bytes beyond what there is; 0 or less fits."""
        host = self.host_bytes(cost) - self.machine.ram
        if self.machine.card is None:
            return host
        return max(self.card_bytes(cost) - self.machine.card, host)

    def fits(self, cost: Cost) -> bool:
        """Whether a candidate stays within card and host memory."""
        return self.excess(cost) <= 0

    # Candidates.

    def _order(self, candidate: Candidate) -> tuple[bool, int, bool, float]:
        # Weights streamed from the host only where they do not fit: every layer waits for its own.
        setup = candidate.setup
        return (
            not self.fits(candidate.cost),
            TIERS[setup.optimizer],
            setup.offloads_parameters,
            candidate.seconds,
        )

    def _largest(
        self, mode: Mode, checkpointing: tuple[CheckpointingLevel, ...], offload: bool
    ) -> Candidate | None:
        """The fastest micro-batch of one mode that fits, else the smallest there is."""
        candidates = [
            self._candidate(mode, checkpointing, offload, micro_batch)
            for micro_batch in self.choices.micro_batches(mode)
        ]
        fitting = [c for c in candidates if self.fits(c.cost)]
        if fitting:
            return min(fitting, key=self._order)
        return min(candidates, key=lambda c: self.excess(c.cost), default=None)

    def _candidate(
        self,
        mode: Mode,
        checkpointing: tuple[CheckpointingLevel, ...],
        offload: bool,
        micro_batch: int,
    ) -> Candidate:
        setup = Setup(
            ranks=self.machine.ranks,
            micro_batch=micro_batch,
            accumulation=self.stage.global_batch // (micro_batch * self.machine.ranks),
            precision=self.choices.precision,
            checkpointing=checkpointing,
            offload_activations=offload,
            optimizer=mode.optimizer,
            in_backward=mode.in_backward,
            zero=mode.zero,
            ema_offload=mode.ema_offload,
        )
        activations = self._activations(setup)
        cost = step_cost(
            setup, activations, on_card=self.machine.card is not None,
            profiles=len(self.stage.training.ema_widths),
            teacher_forward=teacher_forward(self.stage, setup),
        )  # fmt: skip
        flops = cached_flops(self.stage, checkpointing=checkpointing)
        if (few := self.stage.few_steps) is not None:
            # Of a training pass without recomputation the forward one is a third.
            plain = cached_flops(self.stage, checkpointing=("none",) * self.choices.levels)
            flops += evaluations(few) * plain // 3
        seconds = step_seconds(setup, cost, activations, flops, link=self.machine.link)
        return Candidate(setup, cost, activations, seconds, flops)

    def _activations(self, setup: Setup) -> Activations:
        def measured(micro_batch: int) -> Activations:
            return cached_measure(
                self.stage,
                micro_batch=micro_batch,
                precision=setup.precision,
                checkpointing=setup.checkpointing,
                offload_activations=setup.offload_activations,
            )

        batch = setup.micro_batch
        if batch in MEASURED_BATCHES:
            return measured(batch)
        small, large = MEASURED_BATCHES
        low, high = measured(small), measured(large)
        share = (batch - small) / (large - small)

        def line(a: int, b: int) -> int:
            return int(a + (b - a) * share)

        return low._replace(
            held=line(low.held, high.held),
            peak=line(low.peak, high.peak),
            on_host=line(low.on_host, high.on_host),
        )

    # Words.

    def _fault(self, candidate: Candidate) -> str:
        cost = candidate.cost
        is_card = self.machine.card is not None and self.card_bytes(cost) > self.machine.card
        if is_card:
            assert self.machine.card is not None
            terms = {name: getattr(cost, name) for name in (*MOVABLE, "teacher")}
            worst = max(terms, key=lambda name: terms[name])
            return (
                f"the card: {gb(self.card_bytes(cost))} needed, {gb(self.machine.card)} there; "
                f"the largest term is {worst} with {gb(terms[worst])}"
            )
        needed = self.host_bytes(cost)
        return f"host memory: {gb(needed)} needed, {gb(self.machine.ram)} there"


def teacher_forward(stage: StageConfig, setup: Setup) -> int | None:
    """Bytes of the teacher's forward pass; None for a stage that has none."""
    few = stage.few_steps
    if few is None:
        return None
    if setup.micro_batch in MEASURED_BATCHES:
        return _teacher_at(stage, few, setup, setup.micro_batch)
    small, large = MEASURED_BATCHES
    low, high = (_teacher_at(stage, few, setup, batch) for batch in MEASURED_BATCHES)
    return int(low + (high - low) * (setup.micro_batch - small) / (large - small))


def _teacher_at(stage: StageConfig, few: FewSteps, setup: Setup, batch: int) -> int:
    return cached_teacher(stage, few, micro_batch=batch, precision=setup.precision)
