"""What a rank is at, since when, and how long it has been at each thing."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from trainer.training.hooks import UpdateReport

Phase = Literal["start", "step", "data_wait", "checkpoint", "evaluation"]
"""Until the first update is done; training; waiting for batches; saving, as far as training waits
for it; drawing grids and measuring."""


class Sight(NamedTuple):
    """What another thread sees of a rank."""

    phase: Phase
    events: int
    """How many phases have begun, updates were done and signs of life were given so far."""


class PhaseClock:
    """Tells one rank's time apart; read by other threads too.

    Args:
        now: Monotonic clock in seconds.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._phase: Phase = "start"
        self._since = now()
        self._seconds: defaultdict[Phase, float] = defaultdict(float)
        self._events = 0
        self._waited_s = 0.0

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count the time of a `with` block to a phase."""
        before = self._begin(phase)
        try:
            yield
        finally:
            self._begin(before)

    def after_update(self, report: UpdateReport) -> None:
        """Note the end of an update; with the first one the start is over."""
        before = self._begin("step")
        with self._lock:
            # The wait for the first batch is a part of the start.
            if before == "step":
                waited_s = report.waited_s - self._waited_s
                self._seconds["step"] -= waited_s
                self._seconds["data_wait"] += waited_s
            self._waited_s = report.waited_s

    def show_life(self) -> None:
        """Note that something got on, though no phase ended; updates show that by themselves."""
        with self._lock:
            self._events += self._phase not in ("step", "data_wait")

    def seconds(self) -> dict[Phase, float]:
        """Return the seconds of each phase until now."""
        with self._lock:
            seconds = self._seconds.copy()
            seconds[self._phase] += self._now() - self._since
            return dict(seconds)

    def sight(self) -> Sight:
        """Return what the rank is at, and a number that grows whenever it gets on."""
        with self._lock:
            return Sight(self._phase, self._events)

    def _begin(self, phase: Phase) -> Phase:
        with self._lock:
            before, now = self._phase, self._now()
            self._seconds[before] += now - self._since
            self._phase, self._since = phase, now
            self._events += 1
        return before
