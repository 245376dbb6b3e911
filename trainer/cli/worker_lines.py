"""Lines of workers as the driver shows them, and the last ones of those that were lost."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.contract import Line, LostWorkers
from pipelines.addresses import hide_credentials
from pipelines.console import visible
from trainer.log_lines import was_shown
from trainer.storage.errors import StoreError
from trainer.storage.lease import Lease
from trainer.storage.store import Store, check_key

logger = logging.getLogger(__name__)

_KEPT_LINES = 100
_LATE_S = 5.0
"""How long news of another rank wait for the first one to tell the same."""
_WRITE_S = 10.0


class WorkerLines:
    """Shows each line of each worker once.

    What several ranks are at is one line: the first rank's, or if that one does not tell it within
    seconds, that of the rank that told it first.

    Args:
        show: Takes a line for the user.
        now: Monotonic clock in seconds.
        heard: Takes each line as it comes.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        *,
        now: Callable[[], float] = time.monotonic,
        heard: Callable[[Line], None] | None = None,
    ) -> None:
        self._show = show
        self._now = now
        self._heard = heard
        self._attempt = -1
        self._told: set[str] = set()
        self._waiting: dict[str, tuple[float, Line]] = {}
        self._last: dict[tuple[int, int], deque[str]] = {}
        self._place: tuple[Store, Lease] | None = None
        self._writing: list[threading.Thread] = []

    def take(self, line: Line) -> None:
        """Show a line, at once or a little later."""
        if line.attempt > self._attempt:
            self._begin(line.attempt)
        self._keep(line)
        if line.level is None:
            self._show(str(line))
        elif line.level != "INFO":
            # The workers meet again what the checks before the start have met and told.
            if not was_shown(line.text):
                self._show(f"warning: {line}")
        elif line.rank == 0:
            self._told.add(line.text)
            self._waiting.pop(line.text, None)
            logger.info("%s", line.text)
        elif line.text not in self._told:
            self._waiting.setdefault(line.text, (self._now(), line))
        self.look()
        if self._heard is not None:
            self._heard(line)

    def look(self) -> None:
        """Show what has waited long enough."""
        now = self._now()
        self._tell_news([text for text, (at, _) in self._waiting.items() if now - at > _LATE_S])

    def lose(self, lost: LostWorkers) -> None:
        """Write the last lines of lost workers to the store, beside what the run goes on with."""
        if self._place is None:
            return
        store, lease = self._place
        cause = hide_credentials(lost.cause)
        texts = {
            lost_key(lease, attempt=lost.attempt, rank=rank): "\n".join([cause, "", *lines])
            for rank in lost.ranks
            if (lines := self._last.get((lost.attempt, rank)))
        }
        if not texts:
            return
        folder = store.uri(next(iter(texts)).rpartition("/")[0])
        self._show(f"the last lines of the workers that were lost: {folder}")
        # The store may be what hangs, and the driver has workers to start.
        thread = threading.Thread(target=_write, args=(store, texts), daemon=True)
        thread.start()
        self._writing.append(thread)

    @contextmanager
    def kept_in(self, store: Store, lease: Lease) -> Iterator[None]:
        """Keep last lines of lost workers in a store, for the length of a `with` block.

        Args:
            store: Where runs are kept.
            lease: The launch's.
        """
        self._place = store, lease
        try:
            yield
        finally:
            self._place = None
            self._tell_news(list(self._waiting))
            deadline = time.monotonic() + _WRITE_S
            for thread in self._writing:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _begin(self, attempt: int) -> None:
        self._tell_news(list(self._waiting))
        self._attempt = attempt
        self._told.clear()
        # Those of the attempt before may still be told as lost.
        self._last = {key: lines for key, lines in self._last.items() if key[0] >= attempt - 1}

    def _keep(self, line: Line) -> None:
        kept = self._last.setdefault((line.attempt, line.rank), deque(maxlen=_KEPT_LINES))
        text = f"{line.level}: {line.text}" if line.level else line.text
        kept.append(hide_credentials(visible(text)))

    def _tell_news(self, texts: list[str]) -> None:
        for text in texts:
            _, line = self._waiting.pop(text)
            logger.info("%s", line)


def lost_key(lease: Lease, *, attempt: int, rank: int) -> str:
    """Return the store key of the last lines of a worker that was lost.

    Args:
        lease: Its launch's.
        attempt: Which start of the launch's workers it was.
        rank: The worker.
    """
    folder = f"{check_key(lease.run)}/lost/{lease.token:012d}-attempt-{attempt:05d}"
    return f"{folder}/rank-{rank:05d}.txt"


def _write(store: Store, texts: dict[str, str]) -> None:
    for key, text in texts.items():
        try:
            store.put(key, f"{text}\n".encode())
        except StoreError as error:
            logger.warning("the last lines of a lost worker are above alone: %s", error)
            return
