"""A coarse scale's experts whole on one rank of each group: what that would take, by arithmetic.

The other ranks of the group would send it their tokens. No engine does this: it is worked out to
know whether one should. Everything open is taken in its favour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.hardware import HardwareConfig
from cluster.placement import Placement, possible_placements, possible_ranks
from trainer.planning.step_time import StepTime, step_time
from trainer.planning.streams import LATENCY_S, NOTHING, Stream, Travel
from trainer.planning.workload import Workload

FLOPS_PER_MULTIPLY_ADD = 6


def break_even_flops_per_byte(workload: Workload, ranks: int) -> float:
    """FLOPs that a GPU does while a byte leaves it, from which on a whole scale would pay.

    The owner computes the scale for the other E - 1 ranks too: 6 (4 d^2 + 2 d h) FLOPs for each of
    their tokens and blocks. It needs to send no more than keys and values, 2 d numbers, and to
    receive their gradients; dividing each weight sends (6 + 6 / E) d numbers, (8 + 6 / E) d where
    tokens are gathered again, whatever is hidden of either. Both are times E - 1 and times the
    tokens, so that it pays where

        FLOP/s : byte/s  >  6 (4 d + 2 h) / ((2 + 6 / E) b),    or with (4 + 6 / E),

    b bytes for each number: 13.1 d with E = 8, h = 4 d and b = 2, or 7.6 d.

    Args:
        workload: The step.
        ranks: E.
    """
    computed = FLOPS_PER_MULTIPLY_ADD * (4 * workload.width + 2 * workload.hidden)
    saved = (4 if workload.regathers else 2) + 6 / ranks
    return computed / (saved * workload.element_bytes)


def flops_per_byte(hardware: HardwareConfig) -> float:
    """FLOPs that a GPU does while a byte leaves it for another one of its node."""
    return 1000 * hardware.matmul_tflops / hardware.node_link_gb_per_s


@dataclass(frozen=True, kw_only=True)
class OwnerWorkload(Workload):
    """What a training step asks of the rank that owns a scale for its group.

    Attributes:
        owned: The scale, by its place coarse to fine; its images are those of the whole group.
        group: Ranks of the group, E.
    """

    owned: int
    group: int

    def shards(self, placement: Placement) -> list[tuple[int, int]]:
        """Weights that the owner holds, and over how many steps of E they repeat."""
        load = self.scales[self.owned]
        (everywhere, _), *shards = super().shards(placement)
        own = load.parameters - load.unpartitioned
        return [(everywhere - own, 1), *shards, (own, self.group)]

    def modulation_shards(self, placement: Placement) -> list[tuple[int, int]]:
        """The owner makes the scale's modulation block by block."""
        return [*super().modulation_shards(placement), (0, self.group)]


@dataclass(frozen=True, kw_only=True)
class WholeScale:
    """A step with one scale whole on one rank of each group.

    Attributes:
        scale: Which, in the paper's numbering.
        group: Ranks of a group, E.
        placement: Where the other scales are.
        zero_stage: 0 (no ZeRO) to 3.
        time: Of the owner, at best.
    """

    scale: int
    group: int
    placement: Placement
    zero_stage: int
    time: StepTime

    def __str__(self) -> str:
        others = f" with {self.placement}" if self.placement.sharded else ""
        return f"scale {self.scale} whole on one of {self.group} ranks{others}"


def fastest_whole_scale(
    workload: Workload, hardware: HardwareConfig, *, zero_stages: Sequence[int] = (1, 2, 3)
) -> WholeScale | None:
    """Find the fastest step with a coarse scale whole on one rank of each group.

    It is a bound: whatever the memory, whatever keys and values of coarser scales the owner needs,
    and however long the host launches kernels, of which it has more.

    Returns:
        The fastest; None if there is no coarse scale or no group.
    """
    finest = len(workload.scales) - 1
    possible = possible_ranks(
        width=workload.width,
        hidden=workload.hidden,
        world_size=workload.world_size,
        ranks_per_node=hardware.ranks_per_node(workload.world_size),
    )
    found = (
        WholeScale(
            scale=finest - owned,
            group=group,
            placement=placement,
            zero_stage=stage,
            time=_owner_time(
                workload, placement, owned=owned, group=group, zero_stage=stage, hardware=hardware
            ),
        )
        for placement in possible_placements(finest + 1, possible=possible)
        for owned in range(finest)
        for group in possible
        for stage in zero_stages
        if group > 1 and placement.ranks[owned] == 1 and finest - owned not in workload.tied
    )
    return min(found, key=lambda one: one.time.busy, default=None)


def _owner_time(
    workload: Workload,
    placement: Placement,
    *,
    owned: int,
    group: int,
    zero_stage: int,
    hardware: HardwareConfig,
) -> StepTime:
    load = workload.scales[owned]
    scales = list(workload.scales)
    scales[owned] = replace(load, images=group * load.images, max_images=group * load.max_images)
    fields = {**vars(workload), "scales": tuple(scales)}
    work = OwnerWorkload(**fields, owned=owned, group=group)
    sent = 2 * work.width * work.element_bytes * (group - 1) * load.images * load.tokens
    travel = Travel(sent / (1e9 * hardware.node_link_gb_per_s), LATENCY_S)
    keys = Stream(
        forward=(NOTHING, travel, NOTHING, NOTHING), backward=(NOTHING, NOTHING, travel, NOTHING)
    )
    return step_time(work, placement, zero_stage=zero_stage, hardware=hardware, beside=keys)
