"""Bytes that a training step needs, term by term.

The terms of the weights are DeepSpeed 0.19's own allocations, read in its source and compared with
the live bytes of its engines (`tests/test_planning.py`); those of the activations come from
`activations.measure`. P is the number of parameters, W the number of ranks.
"""

from typing import NamedTuple

from imagen_scale.planning.activations import Activations
from imagen_scale.planning.setup import Setup, bucket_elements

GIB = 2**30
# CUDA context, cuDNN and cuBLAS handles and workspaces, as driver tools report them. Not measured
# by this project; `train --plan-check` corrects for the whole on the card at hand.
CARD_PROCESS = 600_000_000
# Caching allocator: rounding and fragmentation, as a share of what is live.
ALLOCATOR_SLACK = 0.06
# One process with torch and DeepSpeed imported, on the host; more with CUDA's libraries.
HOST_PROCESS_CPU = 600_000_000
HOST_PROCESS_CUDA = 2_500_000_000
# Bytes of one moment pair: fp32, bf16, or one byte each and a scale per block of 256.
_MOMENTS = {"adamw": 8, "adamw_8bit": 2 + 2 * 4 / 256, "adamw_bf16": 4, "adafactor": 0,
            # Of matrices; the rest, which has two, is less than a thousandth of a large network.
            "muon": 4}  # fmt: skip
# Parameters that ZeRO updates at a time without offload, and that saving puts aside at a time.
GROUP_ELEMENTS = 100_000_000


class Cost(NamedTuple):
    """Bytes, on each card and on the host for all ranks together."""

    weights: int
    gradients: int
    optimizer: int  # master weights and moments on the card
    ema: int
    activations: int
    buckets: int  # what DeepSpeed gathers and reduces through
    workspace: int  # context and allocator slack
    host: int
    pinned: int  # of `host`
    disk: int  # one checkpoint and the inference file
    transfer: int  # over PCIe per optimizer step and rank
    transfer_micro: int  # and per micro-batch
    exchange: int  # sent to the other ranks per optimizer step and rank
    exchange_micro: int  # and per micro-batch
    teacher: int = 0  # weights of the stage that few steps are learned from

    @property
    def card(self) -> int:
        """Peak on each card."""
        return (
            self.weights + self.gradients + self.optimizer + self.ema + self.activations
            + self.buckets + self.workspace + self.teacher
        )  # fmt: skip


def step_cost(
    setup: Setup, activations: Activations, *, on_card: bool = True, profiles: int = 0,
    teacher_forward: int | None = None,
) -> Cost:  # fmt: skip
    """Bytes of one training step.

    Args:
        setup: How the U-Net is trained.
        activations: Of one micro-batch with the setup's checkpointing.
        on_card: Whether there is a card; else `card` and `host` are the same memory and no
            context is counted.
        profiles: Averages in host memory beside the EMA: `training.ema_widths`.
        teacher_forward: Of a student, its teacher's forward pass (`teacher.forward_bytes`); it
            ends before the student's begins.
    """
    P, W = activations.num_parameters, setup.ranks
    width = 4 if setup.precision == "fp32" else 2
    sums = 4 if setup.sums_in_fp32 else width  # what gradients are added up in
    master = 2 if setup.optimizer == "adamw_bf16" else 4
    moments = _moments(setup, activations)
    bucket = int(setup.zero.get("reduce_bucket_size", bucket_elements(P)))
    largest = activations.largest_parameter

    weights = width * P
    gradients = optimizer = buckets = update = host = transfer = transfer_micro = 0
    if setup.in_backward:
        # The largest gradient is part of the activations' peak.
        optimizer = moments
        update = 2 * width * largest
    elif setup.zero_stage == 0:
        gradients, optimizer = width * P, moments
        buckets = min(width * P, 4 * 500_000_000)  # all gradients flattened for the exchange
    elif setup.zero_stage == 3:
        live = int(setup.zero.get("stage3_max_live_parameters", 2 * bucket))
        weights = width * P // W
        # Prefetched and live weights come on top of the rank's own share.
        buckets = width * bucket + width * min(live + bucket, P)
        if setup.sums_in_fp32:  # a bucket's share is widened before it is added
            buckets += sums * bucket // W
        if setup.offloads_optimizer:
            host = (2 * master + sums) * P + moments
            transfer = (width + width) * P // W
            # Added up on the card: each micro-batch brings the sum there and back.
            transfer_micro = (2 if setup.accumulation > 1 else 1) * sums * P // W
            if setup.offloads_parameters:
                weights = 0
                host += width * P
                transfer_micro += 2 * width * P
        else:
            gradients = sums * P // W
            optimizer = (master * P + moments) // W
            update = 6 * min(GROUP_ELEMENTS + largest, P // W)
    elif setup.offloads_optimizer:
        temporary = width * largest
        buckets = temporary + (1 if W == 1 else 2) * width * bucket
        host = (2 * master + width) * P + moments + W * temporary
        transfer, transfer_micro = width * P // W, width * P // W
        if setup.sums_in_fp32:  # on the card until the last micro-batch
            gradients = sums * P // W
            transfer, transfer_micro = (width + sums) * P // W, 0
        elif setup.accumulation > 1:
            host += width * P
            transfer_micro += 2 * width * P // W
    else:
        gradients = sums * P // (W if setup.zero_stage == 2 else 1)
        optimizer = (master * P + moments) // W
        # One is filled while the other is on its way, and what is sent is gathered once more.
        buckets = (1 if W == 1 else 3 if on_card else 2) * width * bucket
        update = 0 if setup.sums_in_fp32 else 6 * min(GROUP_ELEMENTS + largest, P // W)

    has_host_masters = setup.offloads_optimizer and setup.zero_stage > 0
    ema, on_host = 0, profiles
    if has_host_masters or setup.ema_offload:
        on_host += 1
    else:
        ema = 4 * P // W if setup.zero_stage > 0 else 4 * P
    copies = W if setup.zero_stage == 0 else 1  # without ZeRO every rank averages all
    host += 4 * P * copies * on_host
    if not has_host_masters:
        transfer += 4 * P * copies * on_host // W
    pinned = host - 4 * P * on_host if has_host_masters else 0
    host += setup.ranks * (activations.on_host + process_bytes(on_card=on_card))
    # The update happens when the activations are gone.
    busy = max(activations.peak + buckets, update, teacher_forward or 0)
    teacher = 0 if teacher_forward is None else width * P  # whole on each rank
    workspace = 0
    if on_card:
        live_bytes = weights + gradients + optimizer + ema + busy + teacher
        workspace = CARD_PROCESS + int(ALLOCATOR_SLACK * live_bytes)
    return Cost(
        weights=weights,
        gradients=gradients,
        optimizer=int(optimizer),
        ema=ema,
        activations=max(activations.peak, update - buckets, (teacher_forward or 0) - buckets),
        buckets=buckets,
        workspace=workspace,
        host=int(host),
        pinned=int(pinned),
        disk=int((master + 4 + 4 + 4 * profiles) * P + moments),  # EMA twice
        teacher=teacher,
        transfer=transfer,
        transfer_micro=transfer_micro + 2 * activations.on_host,
        **_exchange(setup, width * P * (W - 1) // W),
    )


def _exchange(setup: Setup, once: int) -> dict[str, int]:
    """Bytes that a rank sends.

    Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 7.

    Args:
        setup: How the U-Net is trained.
        once: Of a network of which it sends every other rank's share, or its own to all.
    """
    if setup.zero_stage < 2:  # gradients to their owner and weights back, once a step
        return {"exchange": 2 * once, "exchange_micro": 0}
    if setup.zero_stage == 2:
        return {"exchange": once, "exchange_micro": once}
    return {"exchange": 0, "exchange_micro": 3 * once}  # weights forward and backward, gradients


def process_bytes(*, on_card: bool) -> int:
    """Host memory of one process before it builds anything."""
    return HOST_PROCESS_CUDA if on_card else HOST_PROCESS_CPU


def _moments(setup: Setup, activations: Activations) -> int:
    """Bytes of the optimizer's moments, all ranks together."""
    if setup.optimizer == "adafactor":
        return 4 * activations.adafactor_elements
    return int(_MOMENTS[setup.optimizer] * activations.num_parameters)
