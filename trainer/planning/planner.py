"""Which placement trains a job fastest on given hardware, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.hardware import HardwareConfig, HardwareError
from cluster.placement import Placement, possible_placements, possible_ranks
from pipelines.formats import format_bytes, format_table
from trainer.planning.prediction import RankMemory, StepTime, Workload, rank_memory, step_time

_GIB = 2**30
# The rest is for the device's context, its libraries' buffers and what the allocator wastes.
USABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to hold and train a model.

    Attributes:
        placement: Where the experts are.
        zero_stage: 0 (no ZeRO) to 3.
        memory: Predicted bytes of a rank.
        time: Predicted time of a step.
        images: Images of a step, of all ranks.
        device_limit: Bytes that a rank may hold on its device; None if that is not known.
        host_limit: The same of its share of the host's memory.
    """

    placement: Placement
    zero_stage: int
    memory: RankMemory
    time: StepTime
    images: int
    device_limit: float | None
    host_limit: float | None

    @property
    def fits(self) -> bool:
        """Whether device and host hold it, as far as their memory is known."""
        return (self.device_limit is None or self.memory.total <= self.device_limit) and (
            self.host_limit is None or self.memory.host <= self.host_limit
        )

    @property
    def images_per_second(self) -> float:
        """Images that all ranks train on in a second."""
        return self.images / self.time.total

    def __str__(self) -> str:
        stage = f"ZeRO-{self.zero_stage}" if self.zero_stage else "no ZeRO"
        return f"{self.placement}, {stage}"


def candidate(
    workload: Workload, placement: Placement, *, zero_stage: int, hardware: HardwareConfig
) -> Candidate:
    """Predict what one placement costs."""
    ranks = hardware.ranks_per_node(workload.world_size)
    device, host = hardware.gpu_memory_gib, hardware.host_memory_gib
    return Candidate(
        placement=placement,
        zero_stage=zero_stage,
        memory=rank_memory(workload, placement, zero_stage=zero_stage),
        time=step_time(workload, placement, zero_stage=zero_stage, hardware=hardware),
        images=workload.world_size * workload.images * workload.grad_accum_steps,
        device_limit=None if device is None else USABLE * device * _GIB,
        host_limit=None if host is None else USABLE * host * _GIB / ranks,
    )


def candidates(
    workload: Workload, hardware: HardwareConfig, *, zero_stages: Collection[int] = (1, 2, 3)
) -> list[Candidate]:
    """Predict every placement that model and cluster can hold, with every stage, best first.

    Best is what fits and takes the least time; of equally fast ones the one that shards over fewer
    ranks, then the lower stage. What does not fit comes last, the smallest first.

    Raises:
        HardwareError: The memory of the GPUs is not known.
    """
    if hardware.gpu_memory_gib is None:
        raise HardwareError(
            "cluster.hardware.gpu_memory_gib=null: nothing tells what fits. Set it to the memory "
            "of one GPU in GiB, or name a cluster whose GPUs are known, such as cluster=h100_8"
        )
    possible = possible_ranks(
        width=workload.width,
        hidden=workload.hidden,
        world_size=workload.world_size,
        ranks_per_node=hardware.ranks_per_node(workload.world_size),
    )
    placements = possible_placements(len(workload.scales), possible=possible, tied=workload.tied)
    return sorted(
        (
            candidate(workload, placement, zero_stage=stage, hardware=hardware)
            for placement in placements
            for stage in zero_stages
        ),
        key=_rank,
    )


def fastest(found: Iterable[Candidate]) -> Candidate | None:
    """Pick the best candidate that fits; None if none does."""
    return min((one for one in found if one.fits), key=_rank, default=None)


def _rank(one: Candidate) -> tuple[bool, float, int, int]:
    cost = one.time.total if one.fits else float(one.memory.total)
    return not one.fits, cost, sum(one.placement.ranks), one.zero_stage


def explain(
    workload: Workload,
    hardware: HardwareConfig,
    *,
    zero_stages: Sequence[int] = (1, 2, 3),
    changes: Mapping[str, tuple[Workload, HardwareConfig]],
) -> list[str]:
    """Say in words what is chosen, what binds it, and what would change it.

    Args:
        workload: The training step.
        hardware: What it runs on.
        zero_stages: Stages to choose from.
        changes: By what is changed, the step and the hardware with the change, which are planned
            anew.

    Returns:
        Sentences.

    Raises:
        HardwareError: The memory of the GPUs is not known.
    """
    found = candidates(workload, hardware, zero_stages=zero_stages)
    chosen = fastest(found)
    if chosen is None:
        words = [_nothing_fits(found[0])]
    else:
        words = [_decision(chosen), *_describe_passed_over(found, chosen)]
    for change, (changed, on) in changes.items():
        other = fastest(candidates(changed, on, zero_stages=zero_stages))
        words.append(f"With {change}: {_describe_change(chosen, other)}.")
    return words


def _decision(chosen: Candidate) -> str:
    stage = f"with ZeRO-{chosen.zero_stage}" if chosen.zero_stage else "without ZeRO"
    parts = [
        f"scale {k}'s experts over {ranks} ranks" for k, ranks in chosen.placement.sharded.items()
    ]
    words = f"Shard {' and '.join(parts)}, {stage}."
    if not parts:
        words = f"No sharding is needed: every rank holds all experts, {stage}."
    if chosen.device_limit is not None:
        words += (
            f" A rank holds {_format_held(chosen)}, and may hold "
            f"{format_bytes(chosen.device_limit)}: {USABLE:.0%} of its GPU."
        )
    return words


def _describe_passed_over(found: Sequence[Candidate], chosen: Candidate) -> list[str]:
    """What would be faster if it fitted, and the best of the other kind: sharded or replicated."""
    words = []
    faster = [one for one in found if not one.fits and one.time.total < chosen.time.total]
    if faster:
        best = min(faster, key=lambda one: one.time.total)
        words.append(f"{best} would take {_ms(best.time.total)}, but needs {_format_held(best)}.")
    sharded = bool(chosen.placement.sharded)
    others = [one for one in found if one.fits and bool(one.placement.sharded) != sharded]
    if others:
        kind = "holds all experts on every rank" if sharded else "shards"
        words.append(
            f"The fastest that {kind} is {others[0]}: {_ms(others[0].time.total)} and "
            f"{_format_held(others[0])}."
        )
    return [each[0].upper() + each[1:] for each in words]


def _format_held(one: Candidate) -> str:
    return format_bytes(one.memory.total)


def _nothing_fits(smallest: Candidate) -> str:
    words = f"Nothing fits: the smallest, {smallest}, needs {_format_held(smallest)} a rank"
    if smallest.device_limit is not None:
        words += f" and may have {format_bytes(smallest.device_limit)}"
    if smallest.host_limit is not None and smallest.memory.host > smallest.host_limit:
        words += (
            f"; {format_bytes(smallest.memory.host)} of host memory, of which there are "
            f"{format_bytes(smallest.host_limit)}"
        )
    return f"{words}."


def _describe_change(before: Candidate | None, after: Candidate | None) -> str:
    if after is None:
        return "nothing fits" if before else "still nothing fits"
    figures = f"{after.images_per_second:,.0f} images/s, {_format_held(after)}"
    if before is None:
        return f"{after} fits ({figures})"
    same = (before.placement, before.zero_stage) == (after.placement, after.zero_stage)
    was = f"now {before.images_per_second:,.0f} images/s"
    return f"{'the same choice' if same else after} ({figures}; {was})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


_SHORT = {"gradients": "grads", "activations": "activ.", "reduction": "reduce"}


def placement_table(
    shown: Sequence[Candidate], *, chosen: Candidate | None = None, left_out: int = 0
) -> str:
    """Render one row for each candidate: GiB of a rank by part, ms of a step by part, images/s.

    Args:
        shown: The candidates, at least one.
        chosen: The one to mark.
        left_out: How many more there are.
    """
    offload = any(one.memory.host for one in shown)
    head = ["", "placement", "ZeRO"]
    head += [_SHORT.get(name, name) for name in shown[0].memory.parts]
    head += ["GiB", *(["host"] if offload else []), "fits"]
    head += [_SHORT.get(name, name) for name in _times(shown[0], offload)]
    head += ["ms", "images/s"]
    rows = [head]
    for one in shown:
        row = ["*" if one == chosen else "", str(one.placement), str(one.zero_stage or "-")]
        row += [f"{value / _GIB:.2f}" for value in one.memory.parts.values()]
        row += [f"{one.memory.total / _GIB:.2f}"]
        row += [f"{one.memory.host / _GIB:.2f}"] if offload else []
        row += ["yes" if one.fits else "no"]
        row += [f"{1000 * value:.1f}" for value in _times(one, offload).values()]
        row += [f"{1000 * one.time.total:.1f}", f"{one.images_per_second:,.0f}"]
        rows.append(row)
    table = format_table(rows, align=f"<<{'>' * (len(head) - 2)}")
    return f"{table}\n… and {left_out} more (--all)" if left_out else table


def as_json(one: Candidate) -> dict[str, Any]:
    """Return a candidate as plain values: bytes and seconds."""
    return {
        "placement": {str(k): ranks for k, ranks in one.placement.sharded.items()},
        "zero_stage": one.zero_stage,
        "bytes_per_rank": {
            **one.memory.parts,
            "total": one.memory.total,
            "host": one.memory.host,
        },
        "fits": one.fits,
        "seconds_per_step": {**one.time.parts, "total": one.time.total},
        "images_per_second": one.images_per_second,
    }


def _times(one: Candidate, offload: bool) -> dict[str, float]:
    return {name: value for name, value in one.time.parts.items() if offload or name != "offload"}
