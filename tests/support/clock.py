"""Time that passes only while somebody sleeps, so that no test waits for it or races with it."""

from __future__ import annotations

import threading

import pytest


class Clock:
    """Stands in for the module `time` where code waits by `sleep` and looks by `monotonic`.

    Attributes:
        now_s: The time; a test may move it on.
        waits: What was slept, in seconds, in order.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waits: list[float] = []
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        """Let the time pass at once."""
        with self._lock:
            self.waits.append(seconds)
            self.now_s += seconds

    def monotonic(self) -> float:
        """Tell the time."""
        return self.now_s


@pytest.fixture
def source_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which the sources of data sets in this process are patient."""
    clock = Clock()
    for module in ("pipelines.source", "tenacity"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock
