"""Each second of a run's launches is told once, and as what it was, whatever ended them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.checkpoint.stores import MemoryStore
from trainer.metrics.tracker import Tracker
from trainer.storage.errors import StoreUnreachable
from trainer.storage.lease import Lease
from trainer.training.goodput import (
    KINDS,
    LaunchTime,
    Timesheet,
    goodput,
    read_launches,
    time_line,
    time_metrics,
    total_time,
)
from trainer.training.goodput_curve import draw_goodput

RUN = "night-1"
BATCH = 10


@dataclass
class Simulation:
    """A driver and the first rank of its workers, whose every second is known."""

    now: float = 0.0
    attempt: int = -1
    images: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    uncertain: list[tuple[int, float]] = field(default_factory=list)
    saved: int = 0
    is_from_nothing: bool = False

    def __post_init__(self) -> None:
        self.sheet = Timesheet(now=lambda: self.now)

    def launch(self) -> None:
        self.attempt = -1
        self.sheet = Timesheet(now=lambda: self.now)

    def idle(self, seconds: float, kind: str) -> None:
        self.now += seconds
        self.truth[kind] += seconds

    def wait_for_room(self, seconds: float) -> None:
        self.sheet.hear_line("2026-11-30 08:05:30Z waiting for room for 2 workers: 1 node answers")
        self.idle(seconds / 2, "waiting_for_room")
        self.sheet.hear_line("warning: no worker goes to left: its disk is full")
        self.idle(seconds / 2, "waiting_for_room")
        self.sheet.hear_line("workers: waiting for 2 of them to load and to meet")

    def begin(self, start_s: float) -> None:
        kind = "restart" if self.attempt >= 0 else "start"
        self.attempt += 1
        self.spent = {}
        self.tell(0)
        self.images = self.saved
        self.is_from_nothing = self.saved == 0  # which shows in its first update
        if self.saved:
            self.sheet.hear({"kind": "resumed", "images": self.saved, "uri": "…"})
            self.lose()
        self.spend("start", start_s, told_as=kind)
        self.tell(0)

    def die_before_restore(self, start_s: float) -> None:
        kind = "restart" if self.attempt >= 0 else "start"
        self.attempt += 1
        self.spent = {}
        self.tell(0)
        self.spend("start", start_s, told_as=kind)
        self.tell(0)

    def lose(self) -> None:
        """What came after the checkpoint is lost."""
        while self.uncertain and self.uncertain[-1][0] > self.saved:
            _, seconds = self.uncertain.pop()
            self.truth["step"] -= seconds
            self.truth["lost_work"] += seconds

    def spend(self, phase: str, seconds: float, *, told_as: str | None = None) -> None:
        self.now += seconds
        self.spent[phase] = self.spent.get(phase, 0.0) + seconds
        self.truth[told_as or phase] += seconds

    def update(self, seconds: float) -> None:
        if self.is_from_nothing:
            self.lose()
            self.is_from_nothing = False
        self.spend("step", seconds)
        self.images += BATCH
        self.uncertain.append((self.images, seconds))
        self.tell(self.images)

    def save(self, seconds: float) -> None:
        self.spend("checkpoint", seconds)
        self.tell(self.images)
        self.saved = self.images

    def tell(self, images: int) -> None:
        message = {"kind": "time", "attempt": self.attempt, "images": images}
        self.sheet.hear({**message, "seconds": dict(self.spent)})


_SECONDS = st.integers(0, 100).map(float)
_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["update", "update", "save", "crash", "die", "kill", "kill twice", "room"]),
        _SECONDS,
    ),
    max_size=40,
)


@settings(deadline=None)
@given(_EVENTS)
def test_every_second_of_a_random_life_is_told_as_what_it_was(
    events: list[tuple[str, float]],
) -> None:
    life, launches = Simulation(), []
    life.idle(3.0, "start")
    life.begin(2.0)
    for event, seconds in events:
        match event:
            case "update":
                life.update(seconds + 1.0)
            case "save":
                life.save(seconds)
            case "crash" | "die" | "room":
                life.idle(seconds, "restart")
                if event == "die":
                    life.die_before_restore(seconds)
                    life.idle(1.0, "restart")
                if event == "room":
                    life.wait_for_room(seconds)
                life.begin(2.0)
            case "kill" | "kill twice":
                life.idle(seconds, "start")
                launches.append(life.sheet.launch)
                life.launch()
                life.idle(3.0, "start")
                if event == "kill twice":
                    life.die_before_restore(seconds)
                    launches.append(life.sheet.launch)
                    life.launch()
                life.begin(2.0)
    life.idle(4.0, "start")
    launches.append(life.sheet.launch)
    total = total_time(launches)
    assert total == pytest.approx(life.truth)
    assert sum(total.values()) == pytest.approx(life.now)


def test_a_long_attempt_keeps_few_marks_and_every_second() -> None:
    life = Simulation()
    life.begin(0.0)
    for _ in range(1000):
        life.update(1.0)
        life.save(0.5)
    (attempt,) = life.sheet.launch.attempts
    assert len(attempt.marks) <= 64
    for _ in range(3):
        life.update(1.0)
    life.begin(0.0)
    total = total_time([life.sheet.launch])
    assert total["lost_work"] == pytest.approx(3.0)
    assert total["step"] == pytest.approx(1000.0)


def test_a_last_start_that_dies_before_its_restore_loses_no_work() -> None:
    life = Simulation()
    life.begin(2.0)
    life.update(60.0)
    life.save(1.0)
    life.update(5.0)
    life.idle(3.0, "restart")
    life.die_before_restore(4.0)
    total = total_time([life.sheet.launch])
    assert total == life.truth
    assert total["step"] == 65.0


@pytest.mark.parametrize("saves", [True, False])
def test_many_attempts_keep_few_marks_and_every_second(saves: bool) -> None:
    life = Simulation()
    for _ in range(30):
        life.begin(1.0)
        for number in range(50):
            life.update(1.0)
            if saves and number == 44:
                life.save(0.5)
        life.idle(2.0, "restart")
    life.begin(1.0)
    life.update(1.0)
    launch = life.sheet.launch
    assert sum(len(attempt.marks) for attempt in launch.attempts) <= 3 * len(launch.attempts)
    total = total_time([launch])
    assert total == pytest.approx(life.truth)
    assert total["step"] == (30 * 45 + 1 if saves else 1)


class SlowStore(MemoryStore):
    """Its first write takes until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def put(self, key: str, data: bytes | memoryview) -> None:
        if not self.has_begun.is_set():
            self.has_begun.set()
            assert self.may_end.wait(60)
        super().put(key, data)


def test_what_is_written_late_does_not_replace_the_last_sheet() -> None:
    store, life, lease = SlowStore(), Simulation(), Lease(run=RUN, token=1, launch="a")

    def close() -> None:
        with life.sheet.closing(store, lease):
            life.idle(7.0, "start")

    late = threading.Thread(target=life.sheet.write, args=(store, lease))
    late.start()
    assert store.has_begun.wait(60)
    closing = threading.Thread(target=close)
    closing.start()
    closing.join(0.2)  # it waits for the one that is late
    store.may_end.set()
    late.join()
    closing.join()
    life.idle(1.0, "start")
    life.sheet.write(store, lease)
    (launch,) = read_launches(store, RUN)
    assert launch.wall_s == 7.0


def test_workers_that_were_replaced_are_not_listened_to() -> None:
    life = Simulation()
    life.begin(0.0)
    life.begin(0.0)
    before = life.sheet.launch
    life.sheet.hear({"kind": "time", "attempt": 0, "images": 990, "seconds": {"step": 9.0}})
    assert life.sheet.launch == before


def test_a_launch_that_found_no_room() -> None:
    life = Simulation()
    life.idle(5.0, "start")
    line = "attempt 0: waiting for room for 2 workers: 1 node answers"
    for _ in range(2):
        life.sheet.hear_line(f"2026-11-30 08:05:35Z {line}")
        life.idle(30.0, "waiting_for_room")
    life.sheet.hear_line("10.0.0.7 has come, and is fit for workers")
    life.idle(120.0, "waiting_for_room")
    life.sheet.hear_line("2026-11-30 08:08:35Z attempt 1: 2 workers on 2 nodes")
    life.idle(5.0, "start")
    assert total_time([life.sheet.launch]) == life.truth


def test_the_launches_of_a_run_are_read_in_their_order_and_added_up() -> None:
    store, first, second = MemoryStore(), Simulation(), Simulation()
    first.begin(1.0)
    first.update(10.0)
    first.sheet.write(store, Lease(run=RUN, token=9, launch="a"))
    second.begin(1.0)  # from nothing: all of that is lost
    second.update(4.0)
    with second.sheet.closing(store, Lease(run=RUN, token=10, launch="b")):
        second.idle(1.0, "start")
    assert read_launches(store, RUN) == [first.sheet.launch, second.sheet.launch]
    total = second.sheet.total
    assert total is not None
    assert total == {**dict.fromkeys(KINDS, 0.0), "step": 4.0, "lost_work": 10.0, "start": 3.0}
    assert goodput(total) == 4 / 17
    assert time_metrics(total)["time/lost_work_s"] == 10.0
    assert time_line(total) == "17s in all launches: lost work 58.8%, step 23.5%, start 17.6%"


def test_a_damaged_sheet_is_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    store, life = MemoryStore(), Simulation()
    life.begin(1.0)
    life.sheet.write(store, Lease(run=RUN, token=2, launch="b"))
    store.put(f"{RUN}/goodput/{1:012d}.json", b"{}")
    assert read_launches(store, RUN) == [life.sheet.launch]
    assert "cannot be believed" in caplog.text


class AwayStore(MemoryStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        raise StoreUnreachable("Cannot write memory://…: the service does not answer.")


def test_a_store_that_is_away_at_the_end_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    life = Simulation()
    with life.sheet.closing(AwayStore(), Lease(run=RUN, token=1, launch="a")):
        life.begin(1.0)
    assert life.sheet.total is None
    assert "what the run's time was spent on is not known" in caplog.text


def test_an_empty_launch_is_all_start() -> None:
    assert total_time([LaunchTime(wall_s=2.0)])["start"] == 2.0


def test_a_curve_goes_on_over_launches_and_keeps_few_points() -> None:
    store, life, lease = MemoryStore(), Simulation(), Lease(run=RUN, token=1, launch="a")
    life.idle(5.0, "start")
    life.begin(5.0)
    told: list[tuple[int, float]] = []
    with life.sheet.closing(store, lease):
        for _ in range(100):
            life.update(10.0)
            told.append((life.images, goodput(life.sheet.add_point(life.images))))
        life.save(0.0)
    curve = life.sheet.launch.curve
    assert len(curve) <= 64
    assert (curve[0].images, curve[-1].images) == (10, 1000)
    assert {(point.images, point.goodput) for point in curve} <= set(told)
    assert curve[-1] == (1000, 1010.0, 1000 / 1010)

    life.launch()
    again = Lease(run=RUN, token=2, launch="b")
    life.sheet.follow(read_launches(store, RUN, before=2))
    with life.sheet.closing(store, again):
        life.idle(990.0, "start")
        life.begin(0.0)
        life.update(10.0)
        life.sheet.add_point(life.images)
    assert life.sheet.run_time is not None
    assert life.sheet.run_time.curve == (*curve, (1010, 2010.0, 1010 / 2010))
    assert life.sheet.run_time.seconds["step"] == 1010.0
    assert [launch.curve for launch in read_launches(store, RUN)] == [
        curve,
        life.sheet.run_time.curve[-1:],
    ]


class Points(Tracker):
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.has_two = threading.Event()

    def metrics(self, values: Mapping[str, float], *, images: int) -> None:
        self.points.append((images, values["time/goodput"]))
        if len(self.points) == 2:
            self.has_two.set()


def test_the_first_rank_shows_what_the_driver_has_written_and_nothing_twice() -> None:
    store, life, tracker = MemoryStore(), Simulation(), Points()
    life.idle(10.0, "start")
    life.begin(0.0)
    life.update(10.0)
    life.save(0.0)
    with life.sheet.closing(store, Lease(run=RUN, token=1, launch="a")):
        pass
    life.launch()
    lease = Lease(run=RUN, token=2, launch="b")
    with draw_goodput(tracker, store, lease, least_s=0.01):
        life.begin(0.0)
        life.sheet.write(store, lease)  # no update yet
        life.update(20.0)
        life.sheet.write(store, lease)
        while not tracker.points:
            time.sleep(0.01)
        life.update(60.0)
        life.sheet.write(store, lease)
        assert tracker.has_two.wait(60)
    assert tracker.points == [(20, 30.0 / 40.0), (30, 90.0 / 100.0)]
