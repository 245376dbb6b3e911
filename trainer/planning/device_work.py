"""What a step asks of a device beside matrix products of the network, wherever its experts are.

The update moves bytes of memory; images that are encoded online cost products of the autoencoder;
and the host launches the kernels of a pass one by one, which takes its time however little each has
to do.
"""

from __future__ import annotations

from cluster.hardware import HardwareConfig
from cluster.placement import Placement
from trainer.planning.workload import FULL_BYTES, Workload

_ADAMW_BYTES = 7 * FULL_BYTES
"""Of a parameter: its gradient read, itself and two moments read and written."""
_AVERAGE_BYTES = 3 * FULL_BYTES
"""Of each moving average: the parameter and the average read, the average written."""
_RECOMPUTED_LAUNCHES = 13
"""Kernels of one block of one scale that a backward pass launches again."""


def launches(*, scales: int, depth: int, qk_norm: bool = False) -> int:
    """Count the kernels of a forward and a backward pass, uncompiled and without recomputation.

    A block has 63 for each scale, and joins keys and values of a scale with those of each coarser
    one: (K - 1) (K + 2) joins both ways, of two kernels each. Beside the blocks each scale has 59,
    and all have 36. Counted on operations as torch dispatches them, views aside; for XL/2 that is
    1,859, 3,906 and 6,065, where an H200 launched 1,858, 3,905 and 6,062.

    Args:
        scales: K.
        depth: Number of blocks.
        qk_norm: Whether queries and keys are normalised.
    """
    block = (113 if qk_norm else 63) * scales + 2 * (scales - 1) * (scales + 2)
    return depth * block + 59 * scales + 36


def encoder_flops(pixels: int) -> float:
    """FLOPs of Stable Diffusion's encoder for an image, as counted on the model itself.

    Args:
        pixels: Height times width; the autoencoder divides each by 8.
    """
    return 4_128_642 * pixels + pixels**2 / 2  # attention in its middle


def update_bytes_each(workload: Workload, *, zero_stage: int) -> int:
    """Bytes that an update reads and writes on the device for each parameter whose state it keeps.

    Those that `python -m benchmarks.update` counts: AdamW, the averages that are on the device, the
    gradient's norm, and where weights are not in float32, or are gathered, the gradient brought to
    float32 and the weight copied back. ZeRO-3's, DeepSpeed's own, is taken to move as much.
    """
    averages = 0 if workload.ema_on_host else workload.averages
    each = _ADAMW_BYTES + _AVERAGE_BYTES * averages
    each += workload.gradient_bytes if zero_stage else FULL_BYTES
    if zero_stage or workload.element_bytes < FULL_BYTES:
        each += workload.gradient_bytes + workload.element_bytes + 2 * FULL_BYTES
    return each


def update_seconds(
    workload: Workload, placement: Placement, *, zero_stage: int, hardware: HardwareConfig
) -> float:
    """Time of the update at the rate of the device's memory; none where state is on the host."""
    if workload.offload:
        return 0.0
    kept = (
        workload.split(placement)
        if zero_stage
        else sum(weights for weights, _ in workload.shards(placement))
    )
    moved = kept * update_bytes_each(workload, zero_stage=zero_stage)
    return moved / (1e9 * hardware.memory_gb_per_s)


def encoding_seconds(workload: Workload, hardware: HardwareConfig) -> float:
    """Time in which the images of a step are encoded, where they are."""
    rate = hardware.fp32_tflops if workload.encodes_in_fp32 else hardware.matmul_tflops
    images = workload.images * workload.grad_accum_steps
    return images * workload.encoder_flops / (1e12 * rate)


def launching_seconds(workload: Workload, hardware: HardwareConfig) -> float:
    """Time that the host takes for the kernels of all passes; 0 where their number is not known."""
    if workload.launches == 0:
        return 0.0
    again = sum(load.activation_checkpointing for load in workload.scales)
    kernels = workload.launches + _RECOMPUTED_LAUNCHES * workload.depth * again
    return workload.grad_accum_steps * kernels * hardware.launch_us / 1e6
