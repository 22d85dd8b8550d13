"""What the `deepspeed` section may hold, told before torch and DeepSpeed are imported.

DeepSpeed 0.19 ignores a misspelt key at the top level and inside several of its sections, and
finds the others only after it was imported on every rank. The sections below name every key that
DeepSpeed reads (a test compares them with DeepSpeed's own), with its type and range; defaults are
left to DeepSpeed.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from imagen_scale.config.explain import explain_all, unknown_key

NaturalInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Device = Literal["none", "cpu", "nvme"]
Dtype = Literal["fp16", "bf16", "fp32"]

# Keys that DeepSpeed would accept but that a configuration states once, in the section named.
OWNED_KEYS = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch and training.micro_batch",
    "gradient_clipping": "training.grad_clip",
    "optimizer": "training.optimizer, lr, betas and weight_decay",
    "scheduler": "training.lr_schedule and training.warmup_steps",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "wandb": "logging.wandb",
}
# Parts of DeepSpeed that this trainer does not use, or that would change what it trains.
UNUSED_KEYS = (
    "activation_checkpointing", "amp", "autotuning", "checkpoint", "compile",
    "compression_training", "curriculum_learning", "data_efficiency", "elasticity", "eigenvalue",
    "graph_harvesting", "hybrid_engine", "nebula", "pipeline", "sparse_attention",
    "tensor_parallel", "weight_quantization",
)  # fmt: skip


class DeepSpeedSection(BaseModel):
    """A section as DeepSpeed reads it: no unknown keys, and 5e8 for 500000000 is fine."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OffloadParam(DeepSpeedSection):
    """Where ZeRO-3 keeps the weights."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: NaturalInt = 5
    buffer_size: NaturalInt = 100_000_000
    max_in_cpu: NaturalInt = 1_000_000_000
    pin_memory: bool = True


class OffloadOptimizer(DeepSpeedSection):
    """Where ZeRO keeps masters and moments."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: NaturalInt = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: Fraction = 1.0
    super_offload: bool = False
    cpuadam_cores_perc: Fraction = 0.8


class ZenFlow(DeepSpeedSection):
    """Offloading without stalls."""

    topk_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1
    select_strategy: str = "auto"
    select_interval: int | str = "auto"
    update_interval: int | str = "auto"
    overlap_step: bool = False
    offload: bool = False
    auto_ratio: Fraction = 0.99
    full_warm_up_rounds: int = 0
    pt_reserved_cores_perc: Fraction = 0.5
    steps_per_epoch: int | None = None


class LeafModule(DeepSpeedSection):
    """Modules that ZeRO-3 gathers whole."""

    classes: list[str] = []
    names: list[str] = []
    name_suffixes: list[str] = []


def _no_truth(value: Any) -> Any:
    """Refuses true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("it should be 0, 1, 2 or 3")
    return value


class ZeroOptimization(DeepSpeedSection):
    """What the ranks share out, and what lives outside the card."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_truth)] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Annotated[int, Field(gt=0)] = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: NaturalInt = 500_000_000
    overlap_comm: bool | None = None
    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    zenflow: ZenFlow | None = None
    sub_group_size: NaturalInt = 1_000_000_000
    cpu_offload_param: bool | None = None
    cpu_offload_use_pin_memory: bool | None = None
    cpu_offload: bool | None = None
    stage3_prefetch_bucket_size: NaturalInt = 50_000_000
    stage3_param_persistence_threshold: NaturalInt = 100_000
    stage3_model_persistence_threshold: NaturalInt = 2**63 - 1
    stage3_max_live_parameters: NaturalInt = 1_000_000_000
    stage3_max_reuse_distance: NaturalInt = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: int = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    stage3_gather_fp16_weights_on_model_save: bool = False
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: NaturalInt = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: LeafModule = LeafModule()


class Aio(DeepSpeedSection):
    """Asynchronous reads and writes for offloading to NVMe."""

    block_size: NaturalInt = 1_048_576
    queue_depth: NaturalInt = 8
    intra_op_parallelism: NaturalInt = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class CommsLogger(DeepSpeedSection):
    """Log of collectives."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class DataTypes(DeepSpeedSection):
    """Precision of accumulation: fp32 wherever there is any, written or not."""

    grad_accum_dtype: Literal["fp32"] | None = None


class FlopsProfiler(DeepSpeedSection):
    """Count of floating-point operations."""

    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Field(ge=0)] = 0.0
    profile_step: NaturalInt = 1
    module_depth: int = -1
    top_modules: NaturalInt = 1
    detailed: bool = True
    output_file: str | None = None


class FileMonitor(DeepSpeedSection):
    """DeepSpeed's own TensorBoard or CSV files."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class ThroughputTimer(DeepSpeedSection):
    """DeepSpeed's own timer."""

    enabled: bool = True
    synchronized: bool = True


class Timers(DeepSpeedSection):
    """DeepSpeed's own timers."""

    throughput: ThroughputTimer = ThroughputTimer()


class DeepSpeedConfig(DeepSpeedSection):
    """Every key of the `deepspeed` section."""

    aio: Aio | None = None
    comms_logger: CommsLogger | None = None
    communication_data_type: Dtype | None = None
    csv_monitor: FileMonitor | None = None
    data_types: DataTypes | None = None
    disable_allgather: bool = False
    dump_state: bool = False
    flops_profiler: FlopsProfiler | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    memory_breakdown: bool = False
    prescale_gradients: bool = False
    seq_parallel_communication_data_type: Dtype | None = None
    sparse_gradients: bool = False
    steps_per_print: NaturalInt | None = None
    tensorboard: FileMonitor | None = None
    timers: Timers | None = None
    wall_clock_breakdown: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    zero_optimization: ZeroOptimization = ZeroOptimization()


def is_offloaded(zero: dict[str, Any], key: str) -> bool:
    """Whether an offload section of `zero_optimization` names a device."""
    return (zero.get(key) or {}).get("device", "none") != "none"


def deepspeed_problems(section: dict[str, Any]) -> list[str]:
    """What is wrong with a `deepspeed` section, each in one sentence with its remedy."""
    problems = []
    known = list(DeepSpeedConfig.model_fields)
    rest = {}
    for key, value in section.items():
        path = f"deepspeed.{key}"
        if key in OWNED_KEYS:
            problems.append(f"{path}: is written from {OWNED_KEYS[key]}; set it there.")
        elif key in UNUSED_KEYS:
            problems.append(f"{path}: is not used by this trainer; remove it.")
        elif key not in known:
            problems.append(unknown_key(path, known))
        else:
            rest[key] = value
    try:
        DeepSpeedConfig.model_validate(rest)
    except ValidationError as error:
        problems += explain_all(error.errors(), DeepSpeedConfig, prefix="deepspeed.")
    return problems
