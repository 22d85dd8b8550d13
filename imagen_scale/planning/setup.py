"""How one U-Net is trained: all that decides memory and speed."""

from typing import Any, NamedTuple

from imagen_scale.config import StageConfig
from imagen_scale.config.section import CheckpointingLevel, OptimizerName, per_level
from imagen_scale.errors import ConfigError

# DeepSpeed's default buckets of 5e8 elements are 1-2 GB on the card.
BUCKET_ELEMENTS = 50_000_000
OFFLOAD = {"device": "cpu"}


class Setup(NamedTuple):
    """One way to train a U-Net; it changes memory and speed, not what is learned."""

    ranks: int
    micro_batch: int  # pictures per rank and forward pass
    accumulation: int
    precision: str
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
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.zero.get("stage", 0)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights and moments live in host memory."""
        return is_offloaded(self.zero, "offload_optimizer")

    @property
    def offloads_parameters(self) -> bool:
        """Whether the network's own weights live in host memory between uses."""
        return is_offloaded(self.zero, "offload_param")


def is_offloaded(zero: dict[str, Any], key: str) -> bool:
    """Whether an offload section of `zero_optimization` names a device."""
    return (zero.get(key) or {}).get("device", "none") != "none"


def written_setup(stage: StageConfig, ranks: int, *, on_card: bool) -> Setup:
    """What the configuration says, with its nulls filled in without a budget.

    Args:
        stage: The U-Net.
        ranks: Number of processes.
        on_card: Whether training runs on GPUs; without one there is nothing to offload from.

    Raises:
        ConfigError: If the batch sizes do not fit the number of processes.
    """
    micro_batch = stage.micro_batch or max(1, stage.global_batch // ranks)
    in_backward, optimizer = bool(stage.optimizer_in_backward), stage.optimizer or "adamw"
    zero = stage.zero_optimization
    if zero is None:
        if in_backward or optimizer == "adafactor":
            zero = {"stage": 0}
        else:
            zero = default_zero(ranks, stage.training.precision, on_card=on_card)
    return Setup(
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=accumulation(stage, micro_batch, ranks),
        precision=stage.training.precision,
        checkpointing=stage.checkpointing or per_level("norms", stage.unet.num_levels),
        offload_activations=bool(stage.offload_activations),
        optimizer=optimizer,
        in_backward=in_backward,
        zero=zero,
        ema_offload=bool(stage.memory.ema_offload),
    )


def default_zero(ranks: int, precision: str, *, on_card: bool) -> dict[str, Any]:
    """`zero_optimization` where none is written: what a small card needs."""
    if not on_card:
        return {"stage": 1 if precision == "bf16" else 0}
    if ranks == 1:  # ZeRO-3 would shard nothing and only add traffic
        return {"stage": 2, "offload_optimizer": OFFLOAD}
    return {"stage": 3, "offload_optimizer": OFFLOAD}


def accumulation(stage: StageConfig, micro_batch: int, ranks: int) -> int:
    """Micro-batches per optimizer step and rank.

    Raises:
        ConfigError: If they do not make up the global batch.
    """
    if stage.global_batch % (micro_batch * ranks):
        raise ConfigError(
            f"training.global_batch: {stage.global_batch} is not a multiple of micro_batch "
            f"{micro_batch} x {ranks} processes ({stage.name}); change one of them."
        )
    return stage.global_batch // (micro_batch * ranks)


def bucket_elements(num_parameters: int) -> int:
    """Elements of a bucket: never more than the network has, and a multiple of what NCCL aligns."""
    return min(BUCKET_ELEMENTS, -(-num_parameters // 1024) * 1024)


def complete_zero(zero: dict[str, Any], num_parameters: int, *, pin: bool) -> dict[str, Any]:
    """`zero_optimization` as DeepSpeed gets it; what is written is kept.

    Args:
        zero: As the user or the planner means it.
        num_parameters: Buckets are never larger than the network.
        pin: Whether offloaded states go to pinned memory.
    """
    bucket = bucket_elements(num_parameters)
    filled: dict[str, Any] = {}
    if zero.get("stage", 0) in (1, 2):
        filled = {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
        }
    elif zero.get("stage", 0) == 3:
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
