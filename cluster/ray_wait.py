"""The time in which a run has no workers: told now and then, and bounded."""

import time
from typing import Protocol

from cluster.failure import WorkerFailed

_LACKING_S = 5.0
"""A wait for room is told after this long: what workers held becomes free only gradually."""
_LACKING_AGAIN_S = 30.0


class Tell(Protocol):
    """Takes a line for a person."""

    def __call__(self, text: str, /) -> None:
        """Takes it."""
        ...


class Wait:
    """The time without workers: told now and then, and bounded.

    Args:
        tell: Takes a line.
        room_timeout_s: How long a run that has begun may wait.
    """

    def __init__(self, tell: Tell, *, room_timeout_s: float = float("inf")) -> None:
        self._room_timeout_s = room_timeout_s
        self._tell = tell
        self._since_s: float | None = None
        self._since = ""
        self._lacking = ""
        self._told_s = 0.0

    def begin(self) -> None:
        """The workers are gone."""
        if self._since_s is None:
            self._since_s, self._since = time.monotonic(), time.strftime("%H:%M:%SZ", time.gmtime())
            self._told_s = self._since_s - _LACKING_AGAIN_S + _LACKING_S
        self._lacking = ""

    def end(self) -> None:
        """The workers are there."""
        self._since_s, self._lacking = None, ""

    def note(self, lacking: str) -> None:
        """Why they cannot be started now."""
        if self._since_s is None:
            self.begin()
        self._lacking = lacking

    def look(self) -> None:
        """Tells what is waited for, if it is time to.

        Raises:
            WorkerFailed: It has been waited for long enough.
        """
        if self._since_s is None or not self._lacking:
            return
        now = time.monotonic()
        if now - self._since_s > self._room_timeout_s:
            raise WorkerFailed(
                f"The workers cannot be started since {self._since}, for "
                f"{now - self._since_s:.0f} s (cluster.room_timeout_s): {self._lacking}. Add "
                "nodes, or set cluster.workers lower, and run the same command again."
            )
        if now - self._told_s >= _LACKING_AGAIN_S:
            self._told_s = now
            self._tell(f"{self._lacking}, since {self._since}")


def with_time(text: str) -> str:
    """A line with the time of the clock before it."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())} {text}"
