"""Which placement trains a job fastest on given hardware."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import combinations
from typing import Literal, Protocol, TypeAlias

from cluster.hardware import HardwareConfig, HardwareError
from cluster.placement import Placement, possible_placements, possible_ranks
from trainer.engine.zero_config import KEEP_WEIGHTS
from trainer.planning.memory import (
    RankMemory,
    activation_bytes,
    exchange_buffer_bytes,
    rank_memory,
)
from trainer.planning.step_time import (
    StepTime,
    Timing,
    least_pass_seconds,
    pass_seconds,
    step_time,
)
from trainer.planning.workload import Workload

_GIB = 2**30
# The rest is for the device's context, its libraries' buffers and what the allocator wastes.
USABLE = 0.9
_ROUNDING = 1e-9
_KEEP_ALL = max(KEEP_WEIGHTS.values())

Aim: TypeAlias = Literal["fit", "least", "fastest"]
"""The fastest that fits, the one that takes the least memory, or the fastest whether it fits."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is to be chosen beside placements.

    Attributes:
        zero_stages: ZeRO stages to choose from.
        aim: What is best.
        keeps_tokens: Whether gathered tokens may be kept instead of gathered again; otherwise the
            step says what is done.
        keeps_weights: The same of weights that ZeRO-3 gathers.
        recomputes: Whether experts may be recomputed to make room; otherwise the step says which.
    """

    zero_stages: Sequence[int] = (1, 2, 3)
    aim: Aim = "fit"
    keeps_tokens: bool = False
    keeps_weights: bool = False
    recomputes: bool = False


class PredictTime(Protocol):
    """Predicts the time of a step."""

    def __call__(self, *, timing: Timing) -> StepTime:
        """Predict it by what tells how long a pass takes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to hold and train a model.

    Attributes:
        placement: Where the experts are.
        zero_stage: 0 (no ZeRO) to 3.
        regathers: Whether gathered tokens are gathered again for the backward pass.
        keeps_weights: Whether ZeRO-3 has been told to keep all weights that it gathers.
        recomputed: Scales whose experts are recomputed, in the paper's numbering.
        memory: Predicted bytes of a rank.
        predict_time: Predicts the time of a step.
        images: Images of a step, of all ranks.
        device_limit: Bytes that a rank may hold on its device; None if that is not known.
        host_limit: The same of its share of the host's memory.
    """

    placement: Placement
    zero_stage: int
    regathers: bool = True
    keeps_weights: bool = False
    recomputed: tuple[int, ...] = ()
    memory: RankMemory
    predict_time: PredictTime
    images: int
    device_limit: float | None
    host_limit: float | None

    @cached_property
    def time(self) -> StepTime:
        """Predicted time of a step."""
        return self.predict_time(timing=pass_seconds)

    @cached_property
    def least_time(self) -> float:
        """Seconds that a step takes at least, found out much faster."""
        return (1 - _ROUNDING) * self.predict_time(timing=least_pass_seconds).total

    @property
    def fits(self) -> bool:
        """Whether device and host hold it, as far as their memory is known."""
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        """Whether the device holds it."""
        return self.has_room(self.memory.total)

    @property
    def fits_host(self) -> bool:
        """Whether the host holds its share."""
        return self.host_limit is None or self.memory.host <= self.host_limit

    def has_room(self, held: int) -> bool:
        """Whether the device has room for so many bytes."""
        return self.device_limit is None or held <= self.device_limit

    @property
    def images_per_second(self) -> float:
        """Images that all ranks train on in a second."""
        return self.images / self.time.total

    @property
    def extras(self) -> str:
        """What it does beside the usual, in words."""
        words = ["tokens kept"] if self.placement.sharded and not self.regathers else []
        words += ["weights kept"] if self.keeps_weights else []
        if self.recomputed:
            *first, last = map(str, self.recomputed)
            scales = f"scales {', '.join(first)} and {last}" if first else f"scale {last}"
            words.append(f"{scales} recomputed")
        return ", ".join(words)

    def __str__(self) -> str:
        stage = f"ZeRO-{self.zero_stage}" if self.zero_stage else "no ZeRO"
        return ", ".join(filter(None, (str(self.placement), stage, self.extras)))


def candidate(
    workload: Workload,
    placement: Placement,
    *,
    zero_stage: int,
    hardware: HardwareConfig,
) -> Candidate:
    """Predict what one placement costs."""
    ranks = hardware.ranks_per_node(workload.world_size)
    device, host = hardware.gpu_memory_gib, hardware.host_memory_gib
    finest = len(workload.scales) - 1
    # With one micro-batch both reduce once, so that one prediction does for both.
    as_first = zero_stage == 2 and workload.grad_accum_steps == 1
    return Candidate(
        placement=placement,
        zero_stage=zero_stage,
        regathers=workload.regathers,
        keeps_weights=zero_stage == 3 and workload.kept_parameters >= _KEEP_ALL,
        recomputed=tuple(
            finest - i for i, load in enumerate(workload.scales) if load.activation_checkpointing
        ),
        memory=rank_memory(workload, placement, zero_stage=zero_stage),
        predict_time=partial(
            step_time,
            workload,
            placement,
            zero_stage=1 if as_first else zero_stage,
            hardware=hardware,
        ),
        images=workload.world_size * workload.images * workload.grad_accum_steps,
        device_limit=None if device is None else USABLE * device * _GIB,
        host_limit=None if host is None else USABLE * host * _GIB / ranks,
    )


def candidates(
    workload: Workload, hardware: HardwareConfig, choices: Choices = Choices()
) -> list[Candidate]:
    """Predict every placement that model and cluster can hold, with every stage, best first.

    Each is predicted with what serves the aim best of the other choices. Best is by the aim, of
    equally good ones the one that shards over fewer ranks, then the lower stage. What does not fit
    comes last, the smallest first, unless the aim is "fastest".

    Raises:
        HardwareError: The memory of the GPUs is not known.
    """
    order = partial(_order, choices.aim)
    return sorted((min(ways, key=order) for ways in _ways(workload, hardware, choices)), key=order)


def choose(
    workload: Workload, hardware: HardwareConfig, choices: Choices = Choices()
) -> Candidate | None:
    """Pick the best of all candidates; None if none fits, where it has to.

    Of those that something else makes impossible, or that take longer at least than another one
    takes, no time is predicted.

    Raises:
        HardwareError: The memory of the GPUs is not known.
    """
    aim = choices.aim
    possible = [
        one
        for ways in _ways(workload, hardware, choices)
        for one in ways
        if one.fits or aim == "fastest"
    ]
    if aim == "least":
        smallest = min((one.memory.total for one in possible), default=0)
        possible = [one for one in possible if one.memory.total == smallest]
    chosen: tuple[tuple[bool, float, float, int, int], int] | None = None
    for number in sorted(range(len(possible)), key=lambda i: possible[i].least_time):
        one = possible[number]
        if chosen and one.least_time > possible[chosen[1]].time.total:
            break
        # Of equally good ones the first, as in `candidates`.
        key = _order(aim, one), number
        chosen = key if chosen is None else min(chosen, key)
    return None if chosen is None else possible[chosen[1]]


def _ways(
    workload: Workload, hardware: HardwareConfig, choices: Choices
) -> Iterator[list[Candidate]]:
    """All that is to be chosen from for each placement and stage."""
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
    both = [replace(workload, regathers=each) for each in (True, False)]
    for placement in possible_placements(
        len(workload.scales), possible=possible, tied=workload.tied
    ):
        usual = both if choices.keeps_tokens and placement.sharded else [workload]
        may_keep = choices.keeps_weights and choices.aim != "least"
        may_keep = may_keep and workload.world_size > 1 and workload.weight_gathers(placement) > 1
        keeping = [replace(work, kept_parameters=_KEEP_ALL) for work in usual] if may_keep else []
        for stage in choices.zero_stages:
            predict = partial(candidate, placement=placement, zero_stage=stage, hardware=hardware)
            works = usual
            if stage == 3 and keeping:
                # Kept weights are faster, so that only what they have no room for is left to see.
                full = not all(predict(work).fits for work in keeping)
                works = usual + keeping if full else keeping
            found = [predict(work) for work in works]
            if choices.recomputes and choices.aim != "fastest":
                least = choices.aim == "least"
                if least or not any(one.fits for one in found):
                    pairs = zip(works, found, strict=True)
                    again = [_recompute(work, one, least=least) for work, one in pairs]
                    found += [predict(work) for work in again]
            yield found


def _recompute(workload: Workload, found: Candidate, *, least: bool) -> Workload:
    """Recompute what costs the least of what makes it fit; or all scales, if that or nothing does.

    Args:
        workload: The step.
        found: What is predicted without that.
        least: Recompute all scales, whatever fits.
    """
    subsets = _recomputations(workload)
    held, placement = found.memory, found.placement
    state = held.total - held.activations - exchange_buffer_bytes(workload, placement)
    if least or not found.fits_host or not found.has_room(state):
        return subsets[-1]
    for changed in subsets:
        kept = state + activation_bytes(changed, placement)
        # Most do not even without what they exchange.
        if found.has_room(kept) and found.has_room(
            kept + exchange_buffer_bytes(changed, placement)
        ):
            return changed
    return subsets[-1]


@lru_cache(maxsize=8)
def _recomputations(workload: Workload) -> list[Workload]:
    """The step with some of its scales recomputed, the cheapest first and all of them last."""
    every = range(len(workload.scales))
    cost = [load.images * load.expert_multiply_adds for load in workload.scales]
    subsets = [set(each) for size in every for each in combinations(every, size + 1)]
    return [
        replace(
            workload,
            scales=tuple(
                replace(load, activation_checkpointing=i in subset)
                for i, load in enumerate(workload.scales)
            ),
        )
        for subset in sorted(subsets, key=lambda subset: sum(cost[i] for i in subset))
    ]


def best(found: Iterable[Candidate], aim: Aim = "fit") -> Candidate | None:
    """Pick the best candidate; None if none fits, where it has to."""
    return min(
        (one for one in found if one.fits or aim == "fastest"),
        key=partial(_order, aim),
        default=None,
    )


def _order(aim: Aim, one: Candidate) -> tuple[bool, float, float, int, int]:
    time, memory = one.time.total, float(one.memory.total)
    costs = (memory, time) if aim == "least" or not one.fits else (time, memory)
    if aim == "fastest":
        costs = (time, memory)
    fails = not one.fits and aim != "fastest"
    return fails, *costs, sum(one.placement.ranks), one.zero_stage
