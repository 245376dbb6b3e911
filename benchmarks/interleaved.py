"""Timings of candidates that take turns, compared by their minima.

Other work on a machine only ever adds time. So the minimum over many rounds is the best estimate of
what a candidate costs by itself, and candidates that take turns meet the same disturbances.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Stopwatch = Callable[[Callable[[], object]], float]
"""``(work) -> seconds that it took``, the device's part included."""


class TimingError(ValueError):
    """A comparison that cannot be made."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one candidate took.

    Attributes:
        name: The candidate.
        seconds: Duration of each round, in the order they were run.
        ratio: Its minimum over the baseline's minimum; below 1 is faster than the baseline.
    """

    name: str
    seconds: tuple[float, ...]
    ratio: float

    @property
    def minimum(self) -> float:
        """Shortest round, in seconds."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """How much longer the middle round took than the shortest, as a share of the shortest.

        A small spread says that the machine was quiet.
        """
        return sorted(self.seconds)[len(self.seconds) // 2] / self.minimum - 1


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    stopwatch: Stopwatch,
    warmup: int = 1,
) -> tuple[Timing, ...]:
    """Time every candidate once a round; every other round goes backwards.

    Args:
        candidates: Work by name; the first is the baseline.
        rounds: Measured rounds.
        stopwatch: Times one piece of work.
        warmup: Rounds before them that are thrown away.

    Returns:
        The timings, in the order of the candidates.

    Raises:
        TimingError: There is no candidate, or no round.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise TimingError(
            f"rounds={rounds} must be at least 1, warmup={warmup} not negative, and there must be "
            f"a candidate; there are {len(candidates)}."
        )
    order = list(candidates)
    taken: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(-warmup, rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            seconds = stopwatch(candidates[name])
            if turn >= 0:
                taken[name].append(seconds)
    baseline = min(taken[order[0]])
    return tuple(
        Timing(name=name, seconds=tuple(taken[name]), ratio=min(taken[name]) / baseline)
        for name in order
    )


def stopwatch_of(device: torch.device, *, processor: bool = False) -> Stopwatch:
    """Return the stopwatch that fits a device: CUDA events, or the wall clock.

    Args:
        device: Where work is done.
        processor: On a processor, count the time that all threads of this process compute, instead:
            waiting for a core is not in it, and neither is waiting for a disk.
    """
    if device.type == "cuda":
        return _cuda_seconds
    return _processor_seconds if processor else _wall_seconds


def _wall_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _cuda_seconds(work: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1000
