"""The cheapest way to train each U-Net within a memory budget."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, cast

from imagen_scale.config import StageConfig
from imagen_scale.config.section import CheckpointingLevel, OptimizerName, per_level
from imagen_scale.errors import ConfigError
from imagen_scale.planning.activations import Activations
from imagen_scale.planning.cache import cached_flops, cached_measure
from imagen_scale.planning.cost import Cost, step_cost
from imagen_scale.planning.machine import Machine
from imagen_scale.planning.setup import OFFLOAD, Setup, accumulation, is_offloaded
from imagen_scale.planning.speed import step_seconds

MAX_MICRO_BATCH = 256
# Batches at which activations are measured; between them a straight line is an upper bound.
MEASURED_BATCHES = (1, 8)
# Self-attention over more pixels than this is said aloud: 128 x 128.
MANY_TOKENS = 128**2
# How the optimizers differ from exact AdamW; a lower tier is preferred whatever it costs.
TIERS: dict[OptimizerName, int] = {"adamw": 0, "adafactor": 0, "adamw_8bit": 1, "adamw_bf16": 2}


class Candidate(NamedTuple):
    """One way to train a U-Net and what it takes."""

    setup: Setup
    cost: Cost
    activations: Activations
    seconds: float  # relative, of one optimizer step


class UnetPlan(NamedTuple):
    """What the planner found for one U-Net."""

    unet_number: int
    choice: Candidate  # when `fault` is set, the one that comes nearest
    fault: str | None  # why nothing fits
    others: list[Candidate]  # the best of each other mode, cheapest first
    warnings: list[str]


class Mode(NamedTuple):
    """The part of a setup that decides where weights, gradients and moments live."""

    zero: dict[str, Any]
    optimizer: OptimizerName
    in_backward: bool
    ema_offload: bool


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
        self.levels = stage.unet.num_levels

    def plan(self, keep: Setup | None = None) -> UnetPlan:
        """Finds the cheapest candidate that fits.

        Args:
            keep: A setup whose checkpoints exist: where things live stays as it is.
        """
        best = []
        for mode in [_mode_of(keep)] if keep else self._modes():
            found = [
                candidate
                for checkpointing, offload in self._checkpointings()
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
            self.stage.number, choice, fault, [c for c in best if c is not choice], self._warnings()
        )

    def card_bytes(self, cost: Cost) -> int:
        """Predicted peak on the card, corrected by what was measured on it before."""
        return int(cost.card * self.ratio)

    def excess(self, cost: Cost) -> int:
        """Bytes beyond what there is; 0 or less fits."""
        if self.machine.card is None:
            return self.card_bytes(cost) * self.machine.ranks + cost.host - self.machine.ram
        card = self.card_bytes(cost) - self.machine.card
        return max(card, cost.host - self.machine.ram)

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

    def _modes(self) -> Iterator[Mode]:
        for optimizer in self._optimizers:
            for in_backward in self._in_backwards(optimizer):
                for zero in self._zeros(optimizer, in_backward):
                    on_host = is_offloaded(zero, "offload_optimizer")
                    written = self.stage.memory.ema_offload
                    for ema in (False,) if on_host else (False, True):
                        if on_host or written in (None, ema):
                            yield Mode(zero, optimizer, in_backward, ema)

    @cached_property
    def _optimizers(self) -> tuple[OptimizerName, ...]:
        written = self.stage.optimizer
        if written is not None:
            return (written,)
        is_bf16 = self.stage.training.precision == "bf16"
        return ("adamw", "adamw_8bit", "adamw_bf16") if is_bf16 else ("adamw", "adamw_8bit")

    def _in_backwards(self, optimizer: OptimizerName) -> tuple[bool, ...]:
        written = self.stage.optimizer_in_backward
        if written is not None:
            return (written,)
        training = self.stage.training
        micro_batch = self.stage.micro_batch
        is_possible = (
            self.machine.ranks == 1
            and training.precision == "fp32"
            and training.grad_clip is None
            and micro_batch in (None, self.stage.global_batch)
            and not (self.stage.zero_optimization or {}).get("stage")
            and optimizer != "adamw_bf16"
        )
        return (False, True) if is_possible else (False,)

    def _zeros(self, optimizer: OptimizerName, in_backward: bool) -> list[dict[str, Any]]:
        written = self.stage.zero_optimization
        if written is not None:
            return [written]
        if in_backward or optimizer == "adafactor":
            return [{"stage": 0}]
        offloads: list[dict[str, Any]] = [{"stage": 2, "offload_optimizer": OFFLOAD}]
        if self.machine.ranks > 1:
            offloads.append({"stage": 3, "offload_optimizer": OFFLOAD})
        offloads.append({"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD})
        if optimizer == "adamw_bf16":
            return offloads
        plain: list[dict[str, Any]] = [{"stage": 1}]
        if self.machine.ranks > 1:
            plain = [{"stage": 2}, {"stage": 3}]
        if self.stage.training.precision == "fp32":
            plain.insert(0, {"stage": 0})
        if self.machine.card is None:
            return plain[:1]  # host memory is all there is: nothing to offload from
        return plain + offloads

    def _checkpointings(self) -> list[tuple[tuple[CheckpointingLevel, ...], bool]]:
        """Levels of checkpointing, from the fastest to the smallest."""
        levels: list[tuple[CheckpointingLevel, ...]]
        if self.stage.checkpointing is not None:
            levels = [self.stage.checkpointing]
        else:
            blocks, norms = cast(tuple[CheckpointingLevel, ...], ("blocks", "norms"))
            # Blocks where the pictures are largest hold the most; more mixtures gain little.
            levels = [
                (blocks,) * finest + (norms,) * (self.levels - finest)
                for finest in sorted({0, 1, self.levels})
            ]
        offload = self.stage.offload_activations
        if offload is not None:
            return [(level, offload) for level in levels]
        return [*((level, False) for level in levels), (levels[-1], True)]

    def _largest(
        self, mode: Mode, checkpointing: tuple[CheckpointingLevel, ...], offload: bool
    ) -> Candidate | None:
        """The fastest micro-batch of one mode that fits, else the smallest there is."""
        candidates = [
            self._candidate(mode, checkpointing, offload, micro_batch)
            for micro_batch in self._micro_batches(mode)
        ]
        fitting = [c for c in candidates if self.fits(c.cost)]
        # The line between measured batches is a bound; the choice is measured itself.
        for candidate in sorted(fitting, key=self._order)[:2]:
            exact = self._candidate(
                mode, checkpointing, offload, candidate.setup.micro_batch, exact=True
            )
            if self.fits(exact.cost):
                return exact
        return min(candidates, key=lambda c: self.excess(c.cost), default=None)

    def _micro_batches(self, mode: Mode) -> list[int]:
        ranks = self.machine.ranks
        written = self.stage.micro_batch
        if self.stage.global_batch % ranks:
            raise ConfigError(
                f"training.global_batch: {self.stage.global_batch} is not a multiple of the "
                f"{ranks} processes; change it."
            )
        share = self.stage.global_batch // ranks
        if mode.in_backward:
            return [share]
        if written is not None:
            accumulation(self.stage, written, ranks)  # refused here
            return [written]
        return [b for b in range(1, min(share, MAX_MICRO_BATCH) + 1) if share % b == 0]

    def _candidate(
        self,
        mode: Mode,
        checkpointing: tuple[CheckpointingLevel, ...],
        offload: bool,
        micro_batch: int,
        *,
        exact: bool = False,
    ) -> Candidate:
        setup = Setup(
            ranks=self.machine.ranks,
            micro_batch=micro_batch,
            accumulation=self.stage.global_batch // (micro_batch * self.machine.ranks),
            precision=self.stage.training.precision,
            checkpointing=checkpointing,
            offload_activations=offload,
            optimizer=mode.optimizer,
            in_backward=mode.in_backward,
            zero=mode.zero,
            ema_offload=mode.ema_offload,
        )
        activations = self._activations(setup, exact)
        cost = step_cost(setup, activations, on_card=self.machine.card is not None)
        flops = cached_flops(self.stage, checkpointing=checkpointing)
        return Candidate(setup, cost, activations, step_seconds(setup, cost, activations, flops))

    def _activations(self, setup: Setup, exact: bool) -> Activations:
        def measured(micro_batch: int) -> Activations:
            return cached_measure(
                self.stage,
                micro_batch=micro_batch,
                checkpointing=setup.checkpointing,
                offload_activations=setup.offload_activations,
            )

        batch = setup.micro_batch
        if exact or batch in MEASURED_BATCHES:
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
            terms = {
                name: getattr(cost, name)
                for name in ("weights", "gradients", "optimizer", "ema", "activations", "buckets")
            }
            worst = max(terms, key=lambda name: terms[name])
            return (
                f"the card: {gb(self.card_bytes(cost))} needed, {gb(self.machine.card)} there; "
                f"the largest term is {worst} with {gb(terms[worst])}"
            )
        needed = cost.host
        if self.machine.card is None:
            needed += self.card_bytes(cost) * self.machine.ranks
        return f"host memory: {gb(needed)} needed, {gb(self.machine.ram)} there"

    def _warnings(self) -> list[str]:
        """Traps that a table of bytes does not show."""
        unet, side = self.stage.unet, self.stage.train_size
        warnings = []
        for level, attends in enumerate(per_level(unet.layer_attns, self.levels)):
            pixels = (side // 2 ** (level + unet.memory_efficient)) ** 2
            if attends and pixels > MANY_TOKENS:
                scores = unet.attn_heads * pixels**2 * 4
                warnings.append(
                    f"unets.{self.stage.number - 1}.layer_attns.{level}: every pixel of a "
                    f"{side // 2 ** (level + unet.memory_efficient)} px level attends to every "
                    f"other ({pixels} tokens): {gb(scores)} of scores per picture and layer if "
                    f"they were kept. They are not, but the time is spent: set it to false."
                )
        return warnings


def _mode_of(setup: Setup) -> Mode:
    return Mode(setup.zero, setup.optimizer, setup.in_backward, setup.ema_offload)


def gb(nbytes: float) -> str:
    """Bytes in words, 1 GB = 10^9."""
    if abs(nbytes) >= 1e12:
        return f"{nbytes / 1e12:.1f} TB"
    return f"{nbytes / 1e9:.2f} GB"
