"""Lines of workers: each is shown once, and the last ones of lost workers are kept."""

from __future__ import annotations

import logging
import threading

import pytest

from cluster.contract import Level, Line, LostWorkers
from tests.unit.trainer.checkpoint.stores import MemoryStore
from trainer.cli.worker_lines import WorkerLines, lost_key
from trainer.log_lines import show_logs
from trainer.storage.errors import StoreError
from trainer.storage.lease import Lease

LEASE = Lease(run="night-1", token=3, launch="a")


class Launch:
    """A driver's console and clock."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.now = 0.0
        self.lines = WorkerLines(self.shown.append, now=lambda: self.now)

    def hear(self, rank: int, text: str, level: Level | None = None, *, attempt: int = 0) -> None:
        self.lines.take(Line(rank=rank, node="n", attempt=attempt, level=level, text=text))


def test_what_ranks_are_at_is_told_by_the_first_and_else_by_who_told_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    launch = Launch()
    launch.hear(1, "building", "INFO")
    launch.hear(0, "building", "INFO")
    launch.hear(2, "building", "INFO")
    launch.hear(2, "fetching alone", "INFO")
    launch.hear(3, "fetching alone", "INFO")
    assert caplog.messages == ["building"]
    launch.now = 6.0
    launch.lines.look()
    assert caplog.messages == ["building", "worker 2 on n: fetching alone"]
    launch.hear(1, "building", "INFO", attempt=1)
    launch.hear(0, "building", "INFO", attempt=1)
    assert caplog.messages[2:] == ["building"]
    assert launch.shown == []


def test_news_that_wait_are_told_when_the_attempt_or_the_launch_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    launch = Launch()
    with launch.lines.kept_in(MemoryStore(), LEASE):
        launch.hear(1, "one", "INFO")
        launch.hear(0, "two", "INFO", attempt=1)
        assert caplog.messages == ["worker 1 on n: one", "two"]
        launch.hear(1, "three", "INFO", attempt=1)
    assert caplog.messages[2:] == ["worker 1 on n: three"]


def test_what_is_written_is_shown_from_every_rank_and_warnings_as_such() -> None:
    launch = Launch()
    for rank in (0, 1):
        launch.hear(rank, "printed")
    launch.hear(1, "odd", "WARNING")
    launch.hear(1, "bad", "ERROR")
    with show_logs():
        logging.getLogger("trainer.x").warning("met before")
        launch.hear(0, "met before", "WARNING")
    assert launch.shown == [
        "worker 0 on n: printed",
        "worker 1 on n: printed",
        "warning: worker 1 on n: odd",
        "warning: worker 1 on n: bad",
    ]


def test_the_last_lines_of_lost_workers_are_in_the_store_without_credentials() -> None:
    launch, store = Launch(), MemoryStore()
    with launch.lines.kept_in(store, LEASE):
        for number in range(150):
            launch.hear(1, f"line {number}")
        launch.hear(1, "cannot reach https://me:hunter2@host/", "ERROR")
        launch.hear(0, "all is well here")
        launch.hear(0, "again", attempt=1)  # the next attempt is at work before
        launch.lines.lose(LostWorkers(attempt=0, ranks=(1, 2), cause="no answer from s3://a:b@c/"))
    (key,) = store.objects
    assert key == lost_key(LEASE, attempt=0, rank=1)
    assert key == "night-1/lost/000000000003-attempt-00000/rank-00001.txt"
    cause, gap, *lines = store.objects[key].decode().splitlines()
    assert (cause, gap) == ("no answer from s3://***@c/", "")
    assert lines == [
        *(f"line {n}" for n in range(51, 150)),
        "ERROR: cannot reach https://***@host/",
    ]
    assert launch.shown[-1].endswith("/night-1/lost/000000000003-attempt-00000")


class BrokenStore(MemoryStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        raise StoreError("Cannot write memory://…: the disk is full.")


class HangingStore(MemoryStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        threading.Event().wait()


@pytest.mark.parametrize("kind", [BrokenStore, HangingStore])
def test_a_store_that_fails_or_hangs_ends_no_launch(
    kind: type[MemoryStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.cli.worker_lines._WRITE_S", 0.2)
    launch = Launch()
    with launch.lines.kept_in(kind(), LEASE):
        launch.hear(1, "last words")
        launch.lines.lose(LostWorkers(attempt=0, ranks=(1,), cause="it was ended"))
    assert ("the disk is full" in caplog.text) == (kind is BrokenStore)
