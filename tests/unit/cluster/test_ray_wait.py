"""A run without workers says so every half minute, since when and for how long at most."""

import threading
import time

import pytest

from cluster import ray_train, ray_wait
from cluster.assignment import Node, WorkerGroupSpec
from cluster.contract import Caller, ClusterConfig, ClusterTooSmall
from cluster.failure import WorkerFailed
from cluster.ray_gate import NodeGate
from cluster.ray_wait import Wait

SPEC = WorkerGroupSpec(workers=2, group_size=1, cpus=1, gpus=0)


class Clock:
    """A clock that goes on when somebody sleeps; it begins at 07:10:02."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def gmtime(self) -> time.struct_time:
        return time.gmtime(7 * 3600 + 10 * 60 + 2 + self.now)

    strftime = staticmethod(time.strftime)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (ray_wait, ray_train):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_wait_is_told_after_five_seconds_and_then_every_thirty(clock: Clock) -> None:
    told: list[tuple[float, str]] = []
    wait = Wait(lambda text: told.append((clock.now, text)), room_timeout_s=100)
    wait.look()
    wait.begin()
    while clock.now < 70:
        wait.look()
        clock.sleep(1)
        wait.note(f"room for {clock.now // 40:.0f}")
        wait.begin()  # also by a start that fails meanwhile
        wait.note(f"room for {clock.now // 40:.0f}")
    assert told == [
        (5, "room for 0, since 07:10:02Z"),
        (35, "room for 0, since 07:10:02Z"),
        (65, "room for 1, since 07:10:02Z"),
    ]
    wait.end()
    wait.look()
    wait.note("room for 1")
    clock.sleep(99)
    wait.look()
    assert told[3:] == [(169, "room for 1, since 07:11:12Z")]
    clock.sleep(2)
    with pytest.raises(WorkerFailed, match=r"since 07:11:12Z, for 101 s \(cluster.room_timeout_s"):
        wait.look()


class Gate(NodeGate):
    """One of the nodes is unfit."""

    def __init__(self) -> None:
        self._unfit = {"c": ("no cache",)}
        self._fit = {"a", "b"}

    def look(self) -> None:
        """There is nothing to see."""


def test_the_first_start_tells_which_nodes_answer_and_since_when_it_waits(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [Node(id=name, address=name, cpus=1, gpus=0) for name in "ac"]
    monkeypatch.setattr(ray_train, "free_nodes", lambda: tuple(free))
    told: list[str] = []
    caller = Caller(on_message=print, stop=threading.Event(), report=told.append, listener=None)  # type: ignore[arg-type]
    config = ClusterConfig(start_timeout_s=70)
    with pytest.raises(ClusterTooSmall, match=r"within 70 s \(cluster.start_timeout_s\): wait"):
        ray_train._wait_for_room(config, SPEC, caller, Gate())
    line = (
        "waiting for room for 2 workers: 1 node answers (a has 1 CPUs free), room for 1; 1 more "
        "unfit, since 07:10:02Z, up to 70 s (cluster.start_timeout_s)"
    )
    times = ["07:10:07Z", "07:10:37Z", "07:11:07Z"]
    assert told == [f"1970-01-01 {when} {line}" for when in times]


def test_the_first_start_waits_no_longer_than_for_room_or_a_stop(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [Node(id=name, address=name, cpus=1, gpus=0) for name in "ab"]
    monkeypatch.setattr(ray_train, "free_nodes", lambda: tuple(free))
    caller = Caller(on_message=print, stop=threading.Event(), report=print, listener=None)  # type: ignore[arg-type]
    assert ray_train._wait_for_room(ClusterConfig(), SPEC, caller, None)
    assert clock.now == 0
    free.pop()
    caller.stop.set()
    assert not ray_train._wait_for_room(ClusterConfig(), SPEC, caller, None)
