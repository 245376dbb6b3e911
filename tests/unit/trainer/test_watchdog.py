"""A rank that stands still is ended, and says where; one that gets on is not."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.failure import STOOD_STILL
from tests.unit.trainer.checkpoint.stores import MemoryStore
from trainer.storage.errors import StoreError
from trainer.training import watchdog as module
from trainer.training.hooks import UpdateReport
from trainer.training.phases import PhaseClock, Sight
from trainer.training.run import Run
from trainer.training.speed import Throughput
from trainer.training.watchdog import (
    SLOWEST_UPDATES,
    HangReport,
    Standstill,
    Watchdog,
    hang_key,
)
from trainer.training.worker import _leave_out

LIMITS = {"start": 3600.0, "checkpoint": 3600.0, "evaluation": 3600.0}
KEY = hang_key("night-1", images=640, attempt=1, rank=3)


def update(images: int, *, waited_s: float = 0.0) -> UpdateReport:
    return UpdateReport(images_before=images - 1, images=images, waited_s=waited_s)


class Seconds:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


_PHASES = st.sampled_from(["checkpoint", "evaluation", "update", "pass"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(_PHASES, st.integers(0, 1000)), max_size=30))
def test_every_second_belongs_to_one_phase(events: list[tuple[str, int]]) -> None:
    time = Seconds()
    clock = PhaseClock(now=time)
    images, waited_s, sights = 0, 0.0, {clock.sight().events}
    for event, seconds in events:
        if event == "update":
            time.now += seconds
            waited_s += seconds / 2  # half of each update is spent waiting
            images += 1
            clock.after_update(update(images, waited_s=waited_s))
        elif event == "pass":
            time.now += seconds
        else:
            with clock.during(event):  # type: ignore[arg-type]
                time.now += seconds
        sights.add(clock.sight().events)
    told = clock.seconds()
    assert sum(told.values()) == time.now
    assert min(told.values()) >= 0
    assert told.get("checkpoint", 0) == sum(s for event, s in events if event == "checkpoint")
    # Each event but a pass is seen by who watches.
    assert len(sights) == 1 + sum(event != "pass" for event, _ in events)


def test_the_first_update_is_the_start_and_waiting_for_data_is_no_step() -> None:
    time = Seconds()
    clock = PhaseClock(now=time)
    time.now = 30.0
    clock.after_update(update(1, waited_s=20.0))
    time.now = 34.0
    clock.after_update(update(2, waited_s=21.0))
    assert clock.seconds() == {"start": 30.0, "step": 3.0, "data_wait": 1.0}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100)), min_size=1, max_size=30))
def test_a_standstill_is_as_long_as_nothing_happens_while_somebody_looks(
    looks: list[tuple[bool, float]],
) -> None:
    standing = Standstill(Sight("step", 0), 0.0, longest_look_s=2.0)
    now, events, expected = 0.0, 0, 0.0
    for happened, passed in looks:
        now += passed
        events += happened
        # A process that was stopped for a hundred seconds has not stood still for these.
        expected = 0.0 if happened else expected + min(passed, 2.0)
        stood_s = standing.look(Sight("step", events), now)
        assert stood_s == pytest.approx(expected)


def test_who_stands_still_is_told_once_with_the_phase_and_the_limit() -> None:
    clock = PhaseClock()
    told: list[str] = []
    heard = threading.Event()

    def hear(what: str) -> None:
        told.append(what)
        heard.set()

    dog = Watchdog(clock, least_s=0.05, limits_s=LIMITS, on_hang=hear, tick_s=0.01)
    with dog:
        clock.after_update(update(1))
        assert heard.wait(60)
    assert len(told) == 1
    assert told[0].startswith("no update for 0 s (step; the limit is 0 s)")


@pytest.mark.parametrize("phase", ["start", "checkpoint", "evaluation"])
def test_each_phase_has_a_limit_of_its_own(phase: str) -> None:
    clock = PhaseClock()
    heard = threading.Event()
    limits = {**LIMITS, phase: 0.05}
    dog = Watchdog(
        clock, least_s=3600.0, limits_s=limits, on_hang=lambda _: heard.set(), tick_s=0.01
    )
    if phase != "start":
        clock.after_update(update(1))
    with dog, clock.during(phase):  # type: ignore[arg-type]
        assert heard.wait(60)


def test_signs_of_life_keep_a_start_alive_and_updates_count_by_themselves() -> None:
    clock = PhaseClock()
    before = clock.sight()
    clock.show_life()
    assert clock.sight() != before
    clock.after_update(update(1))
    before = clock.sight()
    clock.show_life()  # a line in an update is none
    assert clock.sight() == before


def test_a_rank_that_may_wait_for_others_is_not_ended_until_it_may_not() -> None:
    clock = PhaseClock()
    told: list[str] = []
    heard, is_strict = threading.Event(), threading.Event()

    def hear(what: str) -> None:
        assert is_strict.is_set()
        told.append(what)
        heard.set()

    limits = {**LIMITS, "start": 0.05}
    with Watchdog(clock, least_s=9.0, limits_s=limits, on_hang=hear, tick_s=0.01) as dog:
        dog.be_patient(True)
        assert not heard.wait(0.5)
        is_strict.set()
        dog.be_patient(False)
        assert heard.wait(60)
    assert told[0].startswith("no sign of life for 0 s (start; the limit is 0 s)")


def test_ranks_wait_for_the_first_one_that_measures_and_for_nothing_afterwards() -> None:
    clock, told = PhaseClock(), threading.Event()
    limits = {**LIMITS, "evaluation": 0.05}

    def hear(_what: str) -> None:
        told.set()

    with Watchdog(clock, least_s=9.0, limits_s=limits, on_hang=hear, tick_s=0.01) as dog:
        run = SimpleNamespace(
            times=SimpleNamespace(clock=clock), watchdog=dog, context=SimpleNamespace(rank=1)
        )
        with _leave_out(cast(Run, run), Throughput(0)):
            assert not told.wait(0.5)
        dog.be_patient(True)
        with _leave_out(cast(Run, run), Throughput(0)), clock.during("evaluation"):
            pass
        with clock.during("evaluation"):
            assert not told.wait(0.5)  # it was patient before
        dog.be_patient(False)
        run.context.rank = 0
        with _leave_out(cast(Run, run), Throughput(0)):
            assert told.wait(60)


def test_the_limit_grows_with_the_slowest_update_of_late_saves_and_grids_apart() -> None:
    time = Seconds()
    clock = PhaseClock(now=time)
    dog = Watchdog(clock, least_s=60.0, limits_s=LIMITS, on_hang=print)

    def train(seconds: float, images: int) -> None:
        time.now += seconds
        report = update(images)
        clock.after_update(report)
        dog.after_update(report)

    train(500.0, 1)
    train(1.0, 2)
    assert dog.limit_s == 60.0
    train(10.0, 3)
    assert dog.limit_s == SLOWEST_UPDATES * 10.0
    with clock.during("checkpoint"):
        time.now += 1000.0
    train(1.0, 4)
    assert dog.limit_s == SLOWEST_UPDATES * 10.0
    for images in range(5, 200):
        train(1.0, images)
    assert dog.limit_s == 60.0


class BrokenStore(MemoryStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        raise StoreError("Cannot write memory://…: the disk is full.")


class HangingStore(MemoryStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        threading.Event().wait()


@pytest.mark.parametrize("kind", [MemoryStore, BrokenStore, HangingStore])
def test_the_stacks_are_told_everywhere_whatever_hangs(
    kind: type[MemoryStore],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "_WRITE_S", 0.2)
    monkeypatch.setattr(module, "_LAST_WORDS_S", 0.0)
    store, codes, never = kind(), [], threading.Event()

    def a_collective_without_peers() -> None:
        never.wait()

    stuck = threading.Thread(target=a_collective_without_peers, name="trains", daemon=True)
    stuck.start()
    assert stuck.ident is not None
    report = HangReport(store, lambda: KEY, watched=stuck.ident, end=codes.append)
    report("no update for 180 s (step; the limit is 180 s)")
    never.set()
    stuck.join()
    assert codes == [STOOD_STILL]
    assert f"a_collective_without_peers ({Path(__file__).name}:" in caplog.text
    assert store.uri(KEY) in caplog.text
    said = capfd.readouterr().err
    # The driver shows what is written there: all stacks of all ranks only if need be.
    assert ("no update for 180 s" in said) == (kind is not MemoryStore)
    assert ("in a_collective_without_peers" in said) == (kind is not MemoryStore)
    if kind is MemoryStore:
        text = store.objects[KEY].decode()
        assert "in a_collective_without_peers" in text
        assert f"0x{stuck.ident:016x} trains" in text


class Held(logging.Handler):
    """A log handler whose lock a thread holds that stands still."""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes what comes once the lock is free."""


def test_a_thread_that_stands_still_with_a_logs_lock_does_not_keep_the_rank_alive(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_WRITE_S", 0.2)
    monkeypatch.setattr(module, "_LAST_WORDS_S", 0.0)
    store, codes, handler = MemoryStore(), [], Held()
    is_held, may_end = threading.Event(), threading.Event()

    def stand_in_the_handler() -> None:
        handler.acquire()
        is_held.set()
        may_end.wait()
        handler.release()

    stuck = threading.Thread(target=stand_in_the_handler, daemon=True)
    stuck.start()
    assert is_held.wait(60)
    assert stuck.ident is not None
    module.logger.addHandler(handler)
    try:
        HangReport(store, lambda: KEY, watched=stuck.ident, end=codes.append)("no update")
    finally:
        module.logger.removeHandler(handler)
        may_end.set()
        stuck.join()
    assert codes == [STOOD_STILL]
    assert "in stand_in_the_handler" in capfd.readouterr().err
    assert "in stand_in_the_handler" in store.objects[KEY].decode()


def test_a_report_that_cannot_be_made_ends_the_process_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "all_stacks", refuse)
    codes: list[int] = []
    report = HangReport(MemoryStore(), lambda: KEY, watched=0, end=codes.append)
    # Out of the process's end, which this one is not, the error would come to light.
    with pytest.raises(OSError, match="no space left"):
        report("no update")
    assert codes == [STOOD_STILL]
