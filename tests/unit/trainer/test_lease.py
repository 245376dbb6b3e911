"""A run is one launch's, and of that one attempt's, whatever dies, stands still or comes back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import seal, validate_as
from tests.unit.trainer.checkpoint.stores import MemoryStore
from tests.unit.trainer.checkpoint.worlds import (
    RUN,
    SCIENCE,
    Savings,
    even_cuts,
    load_newest,
    random_state,
    split,
)
from trainer.storage import lease as module
from trainer.storage.errors import LeaseLost, RunHeld, StoreUnreachable, SupersededAttempt
from trainer.storage.kept import read_sealed
from trainer.storage.lease import Fence, Holder, Lease, LeaseTiming, hold_lease
from trainer.storage.local import LocalStore
from trainer.storage.store import Store

QUICK = LeaseTiming(beat_s=0.02, look_s=0.02, looks=20)
STILL = LeaseTiming(beat_s=3600.0, look_s=0.001, looks=5)


@contextmanager
def held(
    store: Store, *, timing: LeaseTiming = STILL, told: list[str] | None = None
) -> Iterator[Lease]:
    lines = [] if told is None else told
    with hold_lease(
        store,
        RUN,
        report=lines.append,
        on_lost=lambda error: lines.append(str(error)),
        timing=timing,
    ) as lease:
        yield lease


def move_elsewhere(store: MemoryStore, **changes: Any) -> None:
    """Let the newest launch be one of another machine, whose processes nobody here sees."""
    key = max(key for key in store.objects if key.endswith("holder.json"))
    record = json.loads(store.objects[key])
    del record["sha256"]
    elsewhere = {"host": "elsewhere", "process": "other-boot pid:[1] 77", **changes}
    store.objects[key] = json.dumps(seal({**record, **elsewhere})).encode()


def is_ours(store: Store, lease: Lease, attempt: int = 0) -> bool:
    try:
        Fence(store, lease, attempt=attempt).check()
    except (LeaseLost, SupersededAttempt):
        return False
    return True


def test_a_second_launch_is_refused_and_told_whom_to_stop() -> None:
    store = MemoryStore()
    with held(store) as lease:
        with pytest.raises(RunHeld, match=rf"process {os.getpid()} of .*another run=NAME"):
            held(store).__enter__()
        assert is_ours(store, lease)


def test_a_launch_that_has_ended_is_followed_at_once() -> None:
    store, told = MemoryStore(), []
    with held(store) as first:
        pass
    move_elsewhere(store)
    with held(store, told=told) as second:
        assert second.token == first.token + 1
        assert not is_ours(store, first)
        assert is_ours(store, second)
        assert {key.split("/")[2] for key in store.objects} == {f"{second.token:012d}"}
    assert told == []


def _hold_until_killed(root: Path, ready: Any) -> None:
    with hold_lease(LocalStore(root), RUN, report=print, on_lost=print, timing=QUICK):
        ready.set()
        signal.pause()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_launch_of_this_machine_is_followed_at_once(
    tmp_path: Path, is_reaped: bool
) -> None:
    """Also if its parent does not ask how it ended: then its number is still there."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=_hold_until_killed, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    store, told = LocalStore(tmp_path), []
    with pytest.raises(RunHeld, match=f"process {process.pid} of "):
        held(store).__enter__()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    if is_reaped:
        process.join()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with held(store, told=told) as lease:
        assert lease.token == 2
    assert "was left without a word" in told[0]
    process.join()


def test_a_launch_of_another_machine_that_beats_keeps_the_run() -> None:
    store, told = MemoryStore(), []
    with held(store, timing=QUICK) as lease:
        move_elsewhere(store, launch=lease.launch)
        with pytest.raises(RunHeld, match="on elsewhere, since "):
            held(store, timing=replace(QUICK, looks=10**6), told=told).__enter__()
        assert "looking up to" in told[0]
        assert is_ours(store, lease)


def test_a_silent_launch_of_another_machine_is_taken_over_and_hears_of_it() -> None:
    store = MemoryStore()
    first_told: list[str] = []
    told: list[str] = []
    heard = threading.Event()
    with hold_lease(
        store,
        RUN,
        report=first_told.append,
        on_lost=lambda _: heard.set(),
        timing=LeaseTiming(beat_s=0.3, look_s=0.0, looks=1),
    ) as first:
        move_elsewhere(store)
        beat = store.objects[f"{RUN}/lease/{first.token:012d}/beat.json"]
        with held(store, timing=replace(STILL, looks=2), told=told) as second:
            assert b'"number": 0' in beat
            assert "no sign of life of process" in told[-1]
            assert heard.wait(60)
            assert not is_ours(store, first)
            assert is_ours(store, second)
    # The one that was thought dead has ended by now, and took nothing from the other.
    with held(store) as third:
        assert third.token == second.token + 1


def test_of_launches_that_come_at_once_one_gets_the_run(tmp_path: Path) -> None:
    begin, leases, refused = threading.Barrier(6), [], []

    def launch() -> None:
        begin.wait()
        try:
            stack.enter_context(held(LocalStore(tmp_path)))
            leases.append(1)
        except RunHeld:
            refused.append(1)

    with ExitStack() as stack:
        threads = [threading.Thread(target=launch) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(leases), len(refused)) == (1, 5)


@pytest.mark.parametrize("change", [None, {"host": "h" * 256}, {"pid": "1"}])
def test_a_record_that_is_damaged_holds_until_nothing_beats(change: Any) -> None:
    store, told = MemoryStore(), []
    with held(store) as first:
        if change is None:
            store.objects[f"{RUN}/lease/{first.token:012d}/holder.json"] = b"{"
        else:
            move_elsewhere(store, **change)
        with held(store, told=told) as second:
            assert second.token == 2
    assert "a launch whose record is damaged" in told[0]


def test_the_last_number_is_told_and_not_passed() -> None:
    store = MemoryStore()
    with held(store) as lease:
        pass
    for name in ("holder.json", "beat.json"):
        content = store.objects[f"{RUN}/lease/{lease.token:012d}/{name}"]
        store.objects[f"{RUN}/lease/{'9' * 12}/{name}"] = content
    with pytest.raises(RunHeld, match="the last number that there is"):
        held(store).__enter__()


def test_a_store_without_a_trace_is_another_store() -> None:
    with held(MemoryStore()) as lease, pytest.raises(LeaseLost, match="another store than"):
        Fence(MemoryStore(), lease, attempt=0).enter()


def test_of_a_run_that_is_taken_meanwhile_the_one_that_took_it_is_named() -> None:
    store = MemoryStore()
    with ExitStack() as stack:
        stack.enter_context(held(store))
        move_elsewhere(store)

        def take(line: str) -> None:
            if "looking up to" in line:
                stack.enter_context(held(store))
                move_elsewhere(store, host="newcomer")

        with pytest.raises(RunHeld, match=r"another launch: process .* on newcomer, since "):
            hold_lease(store, RUN, report=take, on_lost=print, timing=STILL).__enter__()


def test_a_process_of_which_nothing_is_shown_is_gone_only_if_its_number_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told = MemoryStore(), []
    with held(store, timing=QUICK):
        ended = multiprocessing.get_context("fork").Process(target=int)
        ended.start()
        ended.join()
        monkeypatch.setattr(module, "_PROCESSES", tmp_path)
        with pytest.raises(RunHeld, match=f"process {os.getpid()} of "):
            held(store, timing=replace(QUICK, looks=10**6), told=told).__enter__()
        assert "looking up to" in told[0]
        key = max(key for key in store.objects if key.endswith("holder.json"))
        mine = validate_as(Holder, read_sealed(store, key))
        assert mine.is_running is None
        assert replace(mine, pid=ended.pid).is_running is False


class WatchedStore(MemoryStore):
    """Counts requests, and holds a launch's third sign of life up until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.is_held_up = threading.Event()
        self.may_go_on = threading.Event()

    def put(self, key: str, data: bytes | memoryview) -> None:
        if b'"number": 2,' in data:
            self.is_held_up.set()
            assert self.may_go_on.wait(60)
        self.requests.append("put")
        super().put(key, data)

    def get(self, key: str) -> bytes:
        self.requests.append("get")
        return super().get(key)

    def list(self, prefix: str) -> dict[str, int]:
        self.requests.append("list")
        return super().list(prefix)


def test_a_look_before_a_commit_takes_two_requests() -> None:
    store = WatchedStore()
    with held(store) as lease:
        store.requests.clear()
        assert is_ours(store, lease)
        assert store.requests == ["list", "get"]


def keepers() -> set[threading.Thread]:
    """Threads that give signs of life."""
    return {each for each in threading.enumerate() if each.name == "lease"}


def test_a_sign_of_life_that_is_late_does_not_replace_the_last_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, told = WatchedStore(), []
    before = keepers()
    with hold_lease(
        store,
        RUN,
        report=told.append,
        on_lost=print,
        on_beat=lambda _: told.append("beat"),
        timing=QUICK,
    ):
        assert store.is_held_up.wait(60)
        (keeper,) = keepers() - before
    assert "is not released, so the next launch may look for a minute" in caplog.text
    assert not any(b'"left": true' in data for data in store.objects.values())
    store.may_go_on.set()
    keeper.join()
    assert told == ["beat"]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(["launch", "restart", "check"]), max_size=12), st.data())
def test_at_no_time_may_two_attempts_commit(events: list[str], data: st.DataObject) -> None:
    """Whoever began last may; all before it are refused for good."""
    store = MemoryStore()
    begun: list[Fence] = []
    with ExitStack() as stack:
        lease, attempt = stack.enter_context(held(store)), -1
        for event in events:
            if event == "launch":
                move_elsewhere(store)
                lease, attempt = stack.enter_context(held(store)), -1
            elif event == "restart":
                attempt += 1
                begun.append(Fence(store, lease, attempt=attempt))
                begun[-1].enter()
            elif begun:
                old = data.draw(st.sampled_from(begun))
                if old is not begun[-1] or attempt < 0:
                    with pytest.raises((LeaseLost, SupersededAttempt)):
                        old.check()
                    with pytest.raises((LeaseLost, SupersededAttempt)):
                        old.enter()
                else:
                    old.check()


@pytest.mark.parametrize("reason", ["launch", "attempt"])
def test_what_was_thought_dead_commits_nothing(reason: str) -> None:
    store = MemoryStore()
    fragments = split(random_state(0), even_cuts(1))[0]
    save = {"fragments": fragments, "train_state": {}, **SCIENCE}
    with held(store) as lease:
        mine = Savings(store, fence=Fence(store, lease, attempt=0).check)
        mine.save(images=10, **save)
        before = {key for key in store.objects if "/checkpoints/" in key}
        with ExitStack() as stack:
            if reason == "launch":
                move_elsewhere(store)
                stack.enter_context(held(store))
            else:
                Fence(store, lease, attempt=1).enter()
            kind = LeaseLost if reason == "launch" else SupersededAttempt
            with pytest.raises(kind, match="saves nothing more"):
                mine.save(images=20, **save)
    assert {key for key in store.objects if "/checkpoints/" in key} == before
    found = load_newest(store)
    assert found is not None
    assert found[0] == 10


class AwayStore(MemoryStore):
    """Fails on request."""

    away = False

    def put(self, key: str, data: bytes | memoryview) -> None:
        if self.away:
            raise StoreUnreachable("Cannot write memory://…: the service does not answer.")
        super().put(key, data)


def test_a_store_that_is_away_for_a_while_costs_no_lease(caplog: pytest.LogCaptureFixture) -> None:
    store = AwayStore()
    with held(store, timing=QUICK) as lease:
        store.away = True
        while "is not renewed" not in caplog.text:
            threading.Event().wait(0.01)
        key = f"{RUN}/lease/{lease.token:012d}/beat.json"
        old = store.objects[key]
        store.away = False
        while store.objects[key] == old:
            threading.Event().wait(0.01)
        assert is_ours(store, lease)
    with held(store):
        pass
