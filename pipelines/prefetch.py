"""Run an iterator ahead of its consumer, in a thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")

_POLL_S = 0.1
_JOIN_S = 10.0


@dataclass(frozen=True)
class _End:
    """The source is exhausted, or raised."""

    error: BaseException | None


class Prefetched(Iterator[Item], Generic[Item]):
    """The items of an iterable, made by a thread that stays up to `depth` of them ahead.

    An error in the source is raised where the item would have come, after those made before it.

    Args:
        source: What to run; it is only ever used by the thread.
        depth: Items that wait at most.
    """

    def __init__(self, source: Iterable[Item], *, depth: int) -> None:
        self._source = source
        self._queue: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        while not self._stopping.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                return item
            self.close()
            if item.error is not None:
                raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; at most 10 s if it is amid a download."""
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_JOIN_S)

    def _fill(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._source:
                if not self._put(item):
                    return
        except BaseException as raised:
            error = raised
        self._put(_End(error))

    def _put(self, item: Item | _End) -> bool:
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False
