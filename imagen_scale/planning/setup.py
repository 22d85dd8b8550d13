"""How one U-Net is trained: all that decides memory and speed."""

from typing import Any, NamedTuple

from imagen_scale.config import StageConfig
from imagen_scale.config.deepspeed import is_offloaded
from imagen_scale.config.section import CheckpointingLevel, OptimizerName, per_level
from imagen_scale.errors import ConfigError

# DeepSpeed's default buckets of 5e8 elements are 1-2 GB on the card.
BUCKET_ELEMENTS = 50_000_000
OFFLOAD = {"device": "cpu"}


# Optimizers of whole matrices, which ZeRO flattens and divides.
WHOLE_MATRICES: tuple[OptimizerName, ...] = ("adafactor", "muon")


class Setup(NamedTuple):
    """One way to train a U-Net; it changes memory and speed, not what is learned."""

    ranks: int
    micro_batch: int  # pictures per rank and forward pass
    accumulation: int
    precision: str  # "bf16", "fp16" or "fp32"
    checkpointing: tuple[CheckpointingLevel, ...]  # per resolution level, finest first
    offload_activations: bool
    optimizer: OptimizerName
    in_backward: bool  # the optimizer steps inside backward
    zero: dict[str, Any]  # DeepSpeed's zero_optimization as the user or the planner means it
    ema_offload: bool

    @property
    def global_batch(self) -> int:
        """Pictures per optimizer step."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def sums_in_fp32(self) -> bool:
        """Whether 16-bit gradients of several micro-batches are added up in fp32.

        In bf16 a sum stands still where the next term is below 1/256 of it: 2.7 % off after 256
        micro-batches.
        """
        return self.accumulation > 1 and self.precision != "fp32"

    @property
    def zero_stage(self) -> int:
        """ZeRO stage in force, 0 to 3.

        DeepSpeed 0.19 adds up in fp32 from stage 2 on; its stage 1 takes another optimizer for it,
        whose state cannot be saved in parts. On one card the two are the same.
        """
        stage: int = self.zero.get("stage", 0)
        return 2 if stage == 1 and self.sums_in_fp32 else stage

    @property
    def exchanges_in_backward(self) -> bool:
        """Whether ranks exchange gradients while the next ones are computed.

        Offloaded gradients are on their way to the host then, and without ZeRO all are flattened
        first.
        """
        on_card = not self.offloads_optimizer
        return self.ranks > 1 and (self.zero_stage == 3 or (self.zero_stage > 0 and on_card))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights and moments live in host memory."""
        return is_offloaded(self.zero, "offload_optimizer")

    @property
    def offloads_parameters(self) -> bool:
        """Whether the network's own weights live in host memory between uses."""
        return is_offloaded(self.zero, "offload_param")


def precision_of(stage: StageConfig, auto: str) -> str:
    """What a U-Net computes in where `auto` is what "auto" means."""
    written = stage.training.precision
    return auto if written == "auto" else written


def written_setup(
    stage: StageConfig, ranks: int, *, on_card: bool, auto_precision: str | None = None
) -> Setup:
    """What the configuration says, with its nulls filled in without a budget.

    Args:
        stage: The U-Net.
        ranks: Number of processes.
        on_card: Whether training runs on GPUs; without one there is nothing to offload from.
        auto_precision: What `training.precision` "auto" means; bf16 on a card, else fp32.

    Raises:
        ConfigError: If the batch sizes or the optimizer do not fit the number of processes.
    """
    check_ranks(stage, ranks)
    micro_batch = stage.micro_batch or max(1, stage.global_batch // ranks)
    in_backward, optimizer = bool(stage.optimizer_in_backward), stage.optimizer or "adamw"
    precision = precision_of(stage, auto_precision or ("bf16" if on_card else "fp32"))
    zero = stage.zero_optimization
    if zero is None:
        if in_backward or optimizer in WHOLE_MATRICES:
            zero = {"stage": 0}
        else:
            zero = default_zero(ranks, precision, on_card=on_card)
    return Setup(
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=accumulation(stage, micro_batch, ranks),
        precision=precision,
        checkpointing=stage.checkpointing or per_level("norms", stage.unet.num_levels),
        offload_activations=bool(stage.offload_activations),
        optimizer=optimizer,
        in_backward=in_backward,
        zero=zero,
        ema_offload=bool(stage.memory.ema_offload),
    )


def check_ranks(stage: StageConfig, ranks: int) -> None:
    """Refuses what so many processes cannot train.

    An optimizer inside backward steps before gradients could be exchanged, and all micro-batches
    together are the global batch.

    Raises:
        ConfigError: Naming the key.
    """
    if stage.optimizer_in_backward and ranks > 1:
        raise ConfigError(
            f"memory.optimizer_in_backward: true for {stage.name}, but {ranks} processes train it: "
            f"each would step on its own gradients. Start one process, or write false."
        )
    accumulation(stage, stage.micro_batch or 1, ranks)


def default_zero(ranks: int, precision: str, *, on_card: bool) -> dict[str, Any]:
    """`zero_optimization` where none is written: what a small card needs."""
    if not on_card:
        return {"stage": 0 if precision == "fp32" else 1}
    if ranks == 1:  # ZeRO-3 would shard nothing and only add traffic
        return {"stage": 2, "offload_optimizer": OFFLOAD}
    return {"stage": 3, "offload_optimizer": OFFLOAD}


def accumulation(stage: StageConfig, micro_batch: int, ranks: int) -> int:
    """Micro-batches per optimizer step and rank.

    Raises:
        ConfigError: If they do not make up the global batch.
    """
    if stage.global_batch % (micro_batch * ranks):
        written = "" if stage.micro_batch is None else f"micro_batch {micro_batch} x "
        raise ConfigError(
            f"training.global_batch: {stage.global_batch} is not a multiple of {written}{ranks} "
            f"processes ({stage.name}); change one of them."
        )
    return stage.global_batch // (micro_batch * ranks)


def bucket_elements(num_parameters: int) -> int:
    """Elements of a bucket: never more than the network has, and a multiple of what NCCL aligns."""
    return min(BUCKET_ELEMENTS, -(-num_parameters // 1024) * 1024)


def complete_zero(setup: Setup, num_parameters: int, *, pin: bool, on_card: bool) -> dict[str, Any]:
    """`zero_optimization` as DeepSpeed gets it; what is written is kept.

    Args:
        setup: How the U-Net is trained.
        num_parameters: Buckets are never larger than the network.
        pin: Whether offloaded states go to pinned memory.
        on_card: Whether training runs on GPUs.
    """
    bucket = bucket_elements(num_parameters)
    filled: dict[str, Any] = {}
    zero = setup.zero | {"stage": setup.zero_stage}
    if setup.zero_stage in (1, 2):
        filled = {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Streams of their own, which a CPU does not have.
            "overlap_comm": on_card and setup.exchanges_in_backward,
        }
    elif setup.zero_stage == 3:
        filled = {
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": 2 * bucket,
        }
    completed = filled | zero
    for key in ("offload_optimizer", "offload_param"):
        if is_offloaded(zero, key):
            completed[key] = {"pin_memory": pin} | zero[key]
    return completed
