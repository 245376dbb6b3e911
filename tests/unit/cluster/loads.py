"""Training steps to plan, small enough to count by hand or as large as XL."""

from dataclasses import replace
from typing import Any

from cluster.hardware import HardwareConfig
from trainer.planning.planner import Choices, candidates
from trainer.planning.report import explain
from trainer.planning.workload import ScaleLoad, Workload

NODE = HardwareConfig(
    gpus_per_node=8,
    gpu_memory_gib=80,
    matmul_tflops=400,
    node_link_gb_per_s=400,
    network_gb_per_s=50,
)

TINY = ScaleLoad(
    parameters=1000,
    unpartitioned=16,
    tokens=5,
    images=3,
    max_images=3,
    multiply_adds=10_000,
    expert_multiply_adds=8_000,
    activations=600,
    recomputed_activations=200,
    block_activations=300,
)


def tiny(*loads: ScaleLoad, world_size: int = 8, **changes: object) -> Workload:
    """Width 8, two blocks; one scale unless others are given."""
    base = Workload(
        scales=loads or (TINY,),
        shared_parameters=104,
        width=8,
        hidden=32,
        depth=2,
        world_size=world_size,
        images=3,
        bucket_elements=100,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def xl(*, world_size: int = 8, images: int = 33, **changes: object) -> Workload:
    """LapFlow-XL/2 with three scales on latents of 32 x 32 x 4, in round figures."""
    loads = tuple(
        ScaleLoad(
            parameters=672_000_000,
            unpartitioned=63_000_000,
            modulation=216_000_000,
            tokens=tokens,
            images=images * carried / 3,
            max_images=images * carried // 3,
            multiply_adds=tokens * 457_000_000,
            expert_multiply_adds=tokens * 446_000_000,
            activations=tokens * 28 * 22 * 1152,
            recomputed_activations=tokens * 28 * 7 * 1152,
            block_activations=tokens * 22 * 1152,
        )
        for tokens, carried in ((16, 3), (64, 2), (256, 1))
    )
    base = Workload(
        scales=loads,
        shared_parameters=3_000_000,
        width=1152,
        hidden=4608,
        depth=28,
        world_size=world_size,
        images=images,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def explained(
    work: Workload, hardware: HardwareConfig, choices: Choices | None = None, **more: Any
) -> list[str]:
    """What is said of the choice among all candidates."""
    choices = choices or Choices()
    return explain(candidates(work, hardware, choices), work, hardware, choices, **more)
