"""Saves that are still on their way: training goes on, the next one waits or is skipped."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.trainer.checkpoint.stores import MemoryStore
from tests.unit.trainer.checkpoint.worlds import (
    RUN,
    SCIENCE,
    NotSaved,
    Savings,
    ThreadRanks,
    empty_state,
    even_cuts,
    load_newest,
    on_ranks,
    random_state,
    same_bits,
    split,
)
from trainer.checkpoint.errors import CheckpointConflict
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.errors import StoreError, StoreUnreachable
from trainer.storage.local import LocalStore

SETTINGS = {"train_state": {}, **SCIENCE}


class GatedStore(MemoryStore):
    """Content waits at the gate; each put that waits counts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.arrived = threading.Semaphore(0)

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.arrived.release()
        assert self.gate.wait()
        super().put(key, data)


class DownStore(MemoryStore):
    """Fails until it is `up`, or so many times."""

    def __init__(self, failures: float = math.inf) -> None:
        super().__init__()
        self.up = False
        self.tries = 0
        self._failures = failures

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.tries += 1
        if not self.up and self.tries <= self._failures:
            raise StoreUnreachable("Cannot write memory://…: the service does not answer.")
        super().put(key, data)


@pytest.fixture
def gated() -> Iterator[GatedStore]:
    store = GatedStore()
    yield store
    store.gate.set()


def test_training_changes_the_state_while_the_old_one_is_on_its_way(gated: GatedStore) -> None:
    state, twin = random_state(0), random_state(0)
    fragments = split(state, [])[0]
    mine = Savings(gated)
    assert mine.saver.save(images=10, fragments=fragments, **SETTINGS)
    assert gated.arrived.acquire()
    for values in (values for each in fragments for values in each.tensors.values()):
        values.fill_(7.0)
    assert gated.objects == {}
    assert mine.reports == []
    gated.gate.set()
    mine.saver.finish()
    images, loaded = load_newest(gated) or (None, empty_state())
    assert images == 10
    assert same_bits(loaded, twin)
    (report,) = mine.reports
    assert (report.images, report.error) == (10, None)
    assert report.size_bytes > 4 * 4 * 60
    assert report.upload_s > 0 < report.blocked_s


def test_the_next_save_waits(gated: GatedStore) -> None:
    fragments = split(random_state(0), [])[0]
    mine = Savings(gated, when_busy="wait")
    mine.saver.save(images=10, fragments=fragments, **SETTINGS)
    second = threading.Thread(
        target=mine.saver.save, kwargs={"images": 20, "fragments": fragments, **SETTINGS}
    )
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gated.gate.set()
    second.join(540)
    mine.saver.finish()
    assert [report.images for report in mine.reports] == [10, 20]


def test_the_next_save_is_skipped_on_all_ranks_and_the_last_one_waits(
    gated: GatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    parts = split(random_state(0), even_cuts(2))

    def act(rank: int, ranks: ThreadRanks) -> list[bool]:
        saver = Savings(gated, ranks=ranks, when_busy="skip").saver
        begun = [
            saver.save(images=images, fragments=parts[rank], **SETTINGS) for images in (10, 20)
        ]
        assert not saver.is_saved(20)
        gated.gate.set()
        begun.append(saver.save(images=30, fragments=parts[rank], last=True, **SETTINGS))
        saver.finish()
        assert saver.is_saved(30)
        return begun

    with caplog.at_level(logging.WARNING):
        assert on_ranks(2, act) == [[True, False, True]] * 2
    assert caplog.text.count("checkpoints/000000000020 is skipped") == 1
    assert (load_newest(gated) or [None])[0] == 30


def test_one_slow_rank_is_enough_to_skip(gated: GatedStore) -> None:
    """Rank 1's upload is done at once; all the same no rank begins what another cannot."""
    parts = split(random_state(0), even_cuts(2))
    fast = MemoryStore()
    fast.objects = gated.objects

    def act(rank: int, ranks: ThreadRanks) -> bool:
        store = gated if rank == 0 else fast
        saver = Savings(store, ranks=ranks, when_busy="skip").saver
        saver.save(images=10, fragments=parts[rank], **SETTINGS)
        begun = saver.save(images=20, fragments=parts[rank], **SETTINGS)
        gated.gate.set()
        saver.finish()
        return begun

    assert on_ranks(2, act) == [False, False]


def test_a_run_in_a_hurry_leaves_what_does_not_arrive(gated: GatedStore) -> None:
    fragments = split(random_state(0), [])[0]
    mine = Savings(gated)
    mine.saver.save(images=10, fragments=fragments, **SETTINGS)
    mine.saver.set_deadline(0.2)
    assert not mine.saver.save(images=20, fragments=fragments, last=True, **SETTINGS)
    assert not mine.saver.is_saved(20)
    mine.saver.finish()
    mine.saver.finish()
    assert [report.images for report in mine.reports] == [20, 10]
    assert all("checkpoint.grace_s" in (report.error or "") for report in mine.reports)
    # What was given up may arrive all the same, and then that is what counts.
    gated.gate.set()
    assert mine.late.acquire()
    assert [(report.images, report.error) for report in mine.reports[2:]] == [(10, None)]


def test_a_stop_does_not_wait_for_a_store_that_is_away(gated: GatedStore) -> None:
    fragments = split(random_state(0), [])[0]
    stop = threading.Event()
    mine = Savings(gated, when_busy="wait", stop_requested=stop.is_set)
    mine.saver.save(images=10, fragments=fragments, **SETTINGS)
    threading.Timer(0.3, stop.set).start()
    assert not mine.saver.save(images=20, fragments=fragments, **SETTINGS)
    gated.gate.set()
    assert mine.saver.save(images=30, fragments=fragments, last=True, **SETTINGS)
    mine.saver.finish()
    assert [report.images for report in mine.reports] == [10, 30]


def test_a_failed_run_waits_for_a_good_state_and_raises_nothing(gated: GatedStore) -> None:
    fragments = split(random_state(0), [])[0]
    mine = Savings(gated)
    mine.saver.save(images=10, fragments=fragments, **SETTINGS)
    threading.Timer(0.2, gated.gate.set).start()
    mine.saver.leave(3600.0)
    assert (load_newest(gated) or [None])[0] == 10


def test_a_store_that_comes_back_gets_the_state_of_then(caplog: pytest.LogCaptureFixture) -> None:
    store = DownStore(failures=1)
    state, twin = random_state(0), random_state(0)
    fragments = split(state, [])[0]
    mine = Savings(store, patience_s=3600.0)
    with caplog.at_level(logging.WARNING):
        mine.saver.save(images=10, fragments=fragments, **SETTINGS)
        fragments[0].tensors["ema"].fill_(1.0)
        mine.saver.finish()
    assert store.tries == 2
    assert "does not answer. Trying again in 1 s." in caplog.text
    _, loaded = load_newest(store) or (None, empty_state())
    assert same_bits(loaded, twin)


def test_a_save_is_given_up_and_the_next_one_succeeds() -> None:
    store = DownStore()
    fragments = split(random_state(0), [])[0]
    mine = Savings(store, patience_s=0.2)
    with pytest.raises(NotSaved, match="does not answer"):
        mine.save(images=10, fragments=fragments, **SETTINGS)
    assert store.tries == 2
    assert store.objects == {}
    store.up = True
    mine.save(images=20, fragments=fragments, **SETTINGS)
    assert [report.error is None for report in mine.reports] == [False, True]


def test_a_state_that_is_not_finite_is_no_checkpoint() -> None:
    store = MemoryStore()
    fragments = split(random_state(0), [])[0]
    mine = Savings(store, keep_last=1)
    mine.save(images=10, fragments=fragments, **SETTINGS)
    fragments[0].tensors["exp_avg_sq"][0] = math.inf
    with pytest.raises(NotSaved, match=r"exp_avg_sq of embed\.weight holds values"):
        mine.save(images=20, fragments=fragments, **SETTINGS)
    # The last good one is still there, and nothing else.
    images, _ = load_newest(store) or (None, None)
    assert images == 10
    assert len(store.objects) == 2


def test_what_is_read_is_deleted_once_it_was_read() -> None:
    store = MemoryStore()
    fragments = split(random_state(0), [])[0]
    read = {10}
    mine = Savings(store, keep_last=1, in_use=lambda: read)
    for images in (10, 20, 30):
        mine.save(images=images, fragments=fragments, **SETTINGS)
    assert sorted(CheckpointIndex(store, run=RUN).listing().manifests) == [10, 30]
    read.clear()
    mine.save(images=40, fragments=fragments, **SETTINGS)
    assert sorted(CheckpointIndex(store, run=RUN).listing().manifests) == [40]


def test_a_conflict_ends_the_run_at_the_next_save() -> None:
    store = MemoryStore()
    fragments = split(random_state(0), [])[0]
    Savings(store).save(images=10, fragments=fragments, **SETTINGS)
    mine = Savings(store)
    other = {**SETTINGS, "config_fingerprint": "other"}
    mine.saver.save(images=10, fragments=fragments, **other)
    with pytest.raises(CheckpointConflict):
        mine.saver.save(images=20, fragments=fragments, **other)
    assert mine.reports == []
    assert (load_newest(store) or [None])[0] == 10


def test_two_configurations_cannot_share_a_run() -> None:
    """Also where they never save at the same position."""
    store = MemoryStore()
    fragments = split(random_state(0), [])[0]
    one, other = (
        Savings(store, index=reader.index)
        for reader in (CheckpointReader(store, run=RUN), CheckpointReader(store, run=RUN))
        if reader.newest_valid() is None
    )
    settings = {"one": SETTINGS, "other": {**SETTINGS, "config_fingerprint": "other"}}
    one.save(images=100, fragments=fragments, **settings["one"])
    one.save(images=200, fragments=fragments, **settings["one"])
    with pytest.raises(CheckpointConflict, match="000000000100 was saved meanwhile by a process"):
        other.save(images=110, fragments=fragments, **settings["other"])
    one.save(images=300, fragments=fragments, **settings["one"])


def test_a_run_that_changed_its_configuration_goes_on_saving() -> None:
    store = MemoryStore()
    fragments = split(random_state(0), [])[0]
    Savings(store).save(images=100, fragments=fragments, **SETTINGS)
    reader = CheckpointReader(store, run=RUN)
    assert reader.newest_valid() is not None
    changed = Savings(store, index=reader.index)
    for images in (200, 300):
        changed.save(images=images, fragments=fragments, **{**SETTINGS, "config_fingerprint": "b"})


def test_a_commit_that_fails_for_good_leaves_nothing() -> None:
    class FullAtTheEnd(MemoryStore):
        def create(self, key: str, data: bytes) -> bool:
            raise StoreError("Cannot write: the disk is full; free space.")

    store = FullAtTheEnd()
    parts = split(random_state(0), even_cuts(2))

    def act(rank: int, ranks: ThreadRanks) -> str:
        mine = Savings(store, ranks=ranks)
        return mine.save(images=10, fragments=parts[rank], **SETTINGS)

    assert [type(outcome) for outcome in on_ranks(2, act)] == [NotSaved] * 2
    assert store.objects == {}


def test_content_that_vanished_is_not_waited_for() -> None:
    class Losing(MemoryStore):
        def put(self, key: str, data: bytes | memoryview) -> None:
            """Loses it."""

    mine = Savings(Losing(), patience_s=3600.0)
    with pytest.raises(NotSaved, match=r"was uploaded with .* is not there"):
        mine.save(images=10, fragments=split(random_state(0), [])[0], **SETTINGS)


def test_files_of_others_in_the_folders_of_checkpoints_are_left_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    fragments = split(random_state(0), [])[0]
    mine = Savings(store, keep_last=1)
    mine.save(images=10, fragments=fragments, **SETTINGS)
    folder = tmp_path / RUN / "checkpoints" / "000000000010"
    for name in (".nfs0000001", "notes.txt"):
        (folder / name).write_text("somebody's")
    mine.save(images=20, fragments=fragments, **SETTINGS)
    mine.save(images=30, fragments=fragments, **SETTINGS)
    assert sorted(path.name for path in folder.iterdir()) == [".nfs0000001", "notes.txt"]
    assert [report.error for report in mine.reports] == [None] * 3


def test_the_state_is_copied_once() -> None:
    store = MemoryStore()
    kept: list[int] = []

    class Looking(MemoryStore):
        def put(self, key: str, data: bytes | memoryview) -> None:
            assert isinstance(data, memoryview)
            kept.append(torch.frombuffer(data, dtype=torch.uint8).data_ptr())
            super().put(key, data)

    store = Looking()
    mine = Savings(store)
    for images in (10, 20):
        mine.save(images=images, fragments=split(random_state(0), [])[0], **SETTINGS)
    assert kept[0] == kept[1]
