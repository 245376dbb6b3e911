"""Running ahead in a thread."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipelines.loading.loader import Prefetched


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order() -> None:
    assert list(Prefetched(range(50), depth=3)) == list(range(50))
    assert not prefetch_threads()


def test_it_runs_ahead_by_its_depth() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = Prefetched(source(), depth=3)
    assert next(items) == 0
    while len(made) < 5:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4]  # one taken, three waiting, one in hand
    items.close()
    assert not prefetch_threads()
    assert list(items) == []


def test_errors_come_in_their_place() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("lost")

    items = Prefetched(source(), depth=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="lost") as raised:
        next(items)
    assert any(entry.name == "source" for entry in raised.traceback)
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(items)


def test_a_waiting_consumer_is_let_go() -> None:
    release = threading.Event()

    def source() -> Iterator[int]:
        release.wait()
        yield 1

    items = Prefetched(source(), depth=1)
    closer = threading.Timer(0.2, lambda: (release.set(), items.close()))
    closer.start()
    assert len(list(items)) <= 1
    closer.join()
    assert not prefetch_threads()
