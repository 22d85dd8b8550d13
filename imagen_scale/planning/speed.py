"""Relative time of a training step: only the order of the candidates depends on it.

The rates are round figures of a small card (RTX 3060: 25 TFLOP/s dense bf16, PCIe 4.0 x16,
360 GB/s) in a desktop with two memory channels, at the share of them that training reaches. They
were not measured by this project; they decide between ways that all fit.
"""

from imagen_scale.planning.activations import Activations
from imagen_scale.planning.cost import Cost
from imagen_scale.planning.setup import Setup

FLOPS_PER_S = {"bf16": 13e12, "fp16": 13e12, "fp32": 6e12}
PCIE_BYTES_PER_S = 12e9
CARD_BYTES_PER_S = 250e9
HOST_BYTES_PER_S = 25e9
# Of what is exchanged while the cards compute, this is not waited for: the last bucket, and every
# layer's weights before it starts, are.
HIDDEN_SHARE = 0.5
# Starting the kernels of one forward and backward pass: what makes tiny micro-batches slow.
LAUNCH_S = 0.05
# Normalisations and activations move bytes rather than compute: recomputing them costs this share
# of a step beyond its FLOPs (2 % on a CPU: benchmarks/training_memory.py; 3 % on a card by the
# bytes that they move, not measured).
NORMS_SHARE = 0.03


def step_seconds(
    setup: Setup,
    cost: Cost,
    activations: Activations,
    flops: int,
    *,
    link: float,
    compute_rate: float = 1.0,
    memory_rate: float = 1.0,
) -> float:
    """Estimated seconds of one optimizer step.

    Args:
        setup: How the U-Net is trained.
        cost: From `step_cost`.
        activations: Of one micro-batch.
        flops: Of one picture, recomputation included.
        link: Bytes per second between the cards; used while they compute, where DeepSpeed can.
        compute_rate: How much faster the card computes than the one of the round figures.
        memory_rate: How much faster its memory is.
    """
    parameters = activations.num_parameters
    compute = setup.micro_batch * flops / FLOPS_PER_S[setup.precision] / compute_rate
    if any(level != "none" for level in setup.checkpointing):
        compute *= 1 + NORMS_SHARE
    exchange = cost.exchange_micro / link
    hidden = HIDDEN_SHARE * min(exchange, compute) if setup.exchanges_in_backward else 0.0
    micro_step = compute + exchange - hidden + LAUNCH_S + cost.transfer_micro / PCIE_BYTES_PER_S
    # Weight, gradient and moments are read and written once.
    moments = {"adamw": 16, "adamw_8bit": 4, "adamw_bf16": 8, "adafactor": 2, "muon": 8}[
        setup.optimizer
    ]
    card = CARD_BYTES_PER_S * memory_rate
    if setup.offloads_optimizer:
        update = (14 + moments) * parameters / HOST_BYTES_PER_S
    else:
        update = (14 + moments) * parameters / setup.ranks / card
    ema_on_host = setup.offloads_optimizer or setup.ema_offload
    update += 12 * parameters / (HOST_BYTES_PER_S if ema_on_host else card)
    between = cost.transfer / PCIE_BYTES_PER_S + cost.exchange / link
    return setup.accumulation * micro_step + between + update
