"""Where a run's wall time went: over all its launches, whatever ended them.

The driver keeps a sheet of its launch: its own clock, and what the first rank tells of each attempt
every few seconds. It lies in the store as `<run>/goodput/<token>.json`, one for each launch, and is
replaced with each sign of life; so of a launch that was killed seconds are missing and no more.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field

from pipelines.documents import seal
from pipelines.formats import format_duration
from trainer.evaluation.reports import GoodputPoint, RunTime
from trainer.storage.errors import StoreError
from trainer.storage.kept import read_or_pass_over, read_or_set_aside
from trainer.storage.lease import Lease
from trainer.storage.store import Store, check_key
from trainer.training.hooks import UpdateReport
from trainer.training.phases import PhaseClock

logger = logging.getLogger(__name__)

Kind = Literal[
    "step",
    "data_wait",
    "checkpoint",
    "evaluation",
    "start",
    "restart",
    "lost_work",
    "waiting_for_room",
]
"""What time is spent on. `start` is also what ending takes. `restart` is from the last that was
heard of workers which failed to the first update of the next. `lost_work` is steps, and waits for
their data, that came after the checkpoint from which the run went on."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_TOLD_EVERY_S = 5.0
_MAX_MARKS = 64
_ROOM = re.compile(r"(^|Z )(attempt \d+: )?waiting (up to|for room)")
_STARTS = re.compile(r"(^|Z )(attempt \d+|workers): ")

_Seconds = Annotated[float, Field(ge=0)]
_Images = Annotated[int, Field(ge=0)]


class Mark(NamedTuple):
    """How long an attempt had worked when it had seen so many images of the run."""

    images: _Images
    step_s: _Seconds
    data_wait_s: _Seconds


@dataclass(frozen=True, kw_only=True)
class AttemptTime:
    """One start of a launch's workers.

    Attributes:
        began_s: When its first rank was first heard of, in seconds of the launch.
        room_s: Of the time before, how long there was no room for it.
        resumed_images: Images of the checkpoint that it went on from; None if it told of none,
            because it began from nothing or ended before.
        seconds: What the first rank spent, by phase.
        marks: How far it had come when, in the order of images.
    """

    began_s: _Seconds
    room_s: _Seconds = 0.0
    resumed_images: _Images | None = None
    seconds: dict[str, _Seconds] = field(default_factory=dict)
    marks: tuple[Mark, ...] = ()

    @property
    def end_s(self) -> float:
        """When it was last heard of, in seconds of the launch."""
        return self.began_s + sum(self.seconds.values())

    @property
    def first_images(self) -> int | None:
        """From how many images it went on; None while it may still go on from any number."""
        return 0 if self.resumed_images is None and self.marks else self.resumed_images


@dataclass(frozen=True, kw_only=True)
class LaunchTime:
    """One launch.

    Attributes:
        wall_s: How long it has lasted.
        room_s: How long there was no room for workers that were never heard of.
        attempts: The starts of its workers.
        curve: The goodput in its course, over all launches until then.
    """

    wall_s: _Seconds
    room_s: _Seconds = 0.0
    attempts: tuple[AttemptTime, ...] = ()
    curve: tuple[GoodputPoint, ...] = ()


class _Span(NamedTuple):
    """Work on the images from one number to another."""

    begin: int
    end: int
    step_s: float
    data_wait_s: float


def total_time(launches: Sequence[LaunchTime]) -> dict[Kind, float]:
    """Split the wall time of launches, in their order.

    Returns:
        Seconds for each kind, which add up to the time that the launches have lasted.
    """
    total: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    done: list[_Span] = []
    for launch in launches:
        heard_s = 0.0
        for number, attempt in enumerate(launch.attempts):
            kind: Kind = "restart" if number else "start"
            total[kind] += max(0.0, attempt.began_s - heard_s - attempt.room_s)
            total[kind] += attempt.seconds.get("start", 0.0)
            total["waiting_for_room"] += attempt.room_s
            total["checkpoint"] += attempt.seconds.get("checkpoint", 0.0)
            total["evaluation"] += attempt.seconds.get("evaluation", 0.0)
            if (first := attempt.first_images) is not None:
                kept = [_up_to(span, first) for span in done]
                total["lost_work"] += _worked_s(done) - _worked_s(kept)
                done = [*kept, *_spans(attempt, first)]
            heard_s = attempt.end_s
        total["waiting_for_room"] += launch.room_s
        total["start"] += max(0.0, launch.wall_s - heard_s - launch.room_s)
    total["step"] = sum(span.step_s for span in done)
    total["data_wait"] = sum(span.data_wait_s for span in done)
    return total


def _worked_s(spans: Sequence[_Span]) -> float:
    return sum(span.step_s + span.data_wait_s for span in spans)


def _spans(attempt: AttemptTime, first: int) -> list[_Span]:
    last = Mark(first, 0.0, 0.0)
    spans = []
    for mark in attempt.marks:
        spans.append(
            _Span(
                last.images,
                mark.images,
                mark.step_s - last.step_s,
                mark.data_wait_s - last.data_wait_s,
            )
        )
        last = mark
    return spans


def _up_to(span: _Span, images: int) -> _Span:
    """Leave out what came after so many images."""
    if images >= span.end:
        return span
    share = max(0, images - span.begin) / max(1, span.end - span.begin)
    return _Span(span.begin, max(images, span.begin), share * span.step_s, share * span.data_wait_s)


def _marks_around(marks: Sequence[Mark], images: int) -> tuple[Mark, ...]:
    """Leave of a past attempt's marks those that tell how far it was there, and at its end."""
    until = [mark for mark in marks if mark.images <= images][-1:]
    after = [mark for mark in marks if mark.images > images]
    return (*until, *after[:1], *after[1:][-1:])


class TimeTeller:
    """Tells the driver, every few seconds, what the first rank has spent its time on.

    Args:
        clock: The rank's.
        report: Takes a message for the driver.
        attempt: Which start of the workers this is.

    Attributes:
        clock: The rank's.
    """

    def __init__(
        self, clock: PhaseClock, report: Callable[[dict[str, Any]], None], *, attempt: int
    ) -> None:
        self.clock = clock
        self._report = report
        self._attempt = attempt
        self._last_s = -_TOLD_EVERY_S

    def after_update(self, report: UpdateReport) -> None:
        """Note the update, and tell the driver if the last time is a while ago."""
        self.clock.after_update(report)
        now = time.monotonic()
        if now - self._last_s >= _TOLD_EVERY_S:
            self._last_s = now
            self.tell(report.images)

    def tell(self, images: int) -> None:
        """Tell it now.

        Args:
            images: Images that the run has seen.
        """
        seconds = self.clock.seconds()
        self._report(
            {"kind": "time", "attempt": self._attempt, "images": images, "seconds": seconds}
        )


class Timesheet:
    """The driver's sheet of its launch.

    Args:
        now: Monotonic clock in seconds.

    Attributes:
        total: Seconds for each kind over all launches, once the launch has ended; None if the store
            did not give those of before.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._is_closed = False
        self._attempts: list[AttemptTime] = []
        self._number = -1
        self._room_s = 0.0
        self._room_since: float | None = None
        self._earlier: Sequence[LaunchTime] = ()
        self._curve: list[GoodputPoint] = []
        self.total: dict[Kind, float] | None = None

    def hear_line(self, text: str) -> None:
        """Take a line of the cluster: it says that it waits for room, and that workers start."""
        with self._lock:
            if _ROOM.search(text):
                if self._room_since is None:
                    self._room_since = self._now()
            elif _STARTS.search(text):
                self._leave_room()

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take a message of the workers."""
        kind = message.get("kind")
        if kind not in ("time", "resumed"):
            return
        with self._lock:
            if kind == "time":
                self._hear_time(message["attempt"], message["images"], message["seconds"])
            elif self._attempts:
                self._replace(resumed_images=message["images"])

    @property
    def launch(self) -> LaunchTime:
        """The sheet until now."""
        with self._lock:
            now = self._now()
            waiting_s = 0.0 if self._room_since is None else now - self._room_since
            return LaunchTime(
                wall_s=now - self._began,
                room_s=self._room_s + waiting_s,
                attempts=tuple(self._attempts),
                curve=tuple(self._curve),
            )

    def follow(self, earlier: Sequence[LaunchTime]) -> None:
        """Take the sheets of the launches before, which points of the curve count too."""
        self._earlier = earlier

    def add_point(self, images: int) -> dict[Kind, float]:
        """Add a point to the curve.

        Args:
            images: Images that the run has seen.

        Returns:
            Seconds for each kind until now, over all launches.
        """
        total = total_time([*self._earlier, self.launch])
        with self._lock:
            self._curve.append(GoodputPoint(images, sum(total.values()), goodput(total)))
            if len(self._curve) > _MAX_MARKS:
                del self._curve[1:_MAX_MARKS:2]
        return total

    @property
    def run_time(self) -> RunTime | None:
        """What the time of all launches went into; None as long as `total` is."""
        if self.total is None:
            return None
        curve = [point for launch in (*self._earlier, self.launch) for point in launch.curve]
        seconds: dict[str, float] = {kind: self.total[kind] for kind in KINDS}
        return RunTime(seconds=seconds, curve=tuple(curve))

    def write(self, store: Store, lease: Lease) -> None:
        """Put the sheet into the store, unless it has been closed.

        Raises:
            StoreError: The store fails.
        """
        with self._writing:
            if not self._is_closed:
                self._put(store, lease)

    @contextmanager
    def closing(self, store: Store, lease: Lease) -> Iterator[None]:
        """Write the sheet at the end of a `with` block, and add up those of all launches."""
        with suppress(StoreError):  # the curve is then that of this launch alone
            self.follow(read_launches(store, lease.run, before=lease.token))
        try:
            yield
        finally:
            try:
                with self._writing:  # what another thread writes meanwhile is older
                    self._is_closed = True
                    self._put(store, lease)
                self.total = total_time(read_launches(store, lease.run))
            except StoreError as error:
                logger.warning("what the run's time was spent on is not known: %s", error)

    def _put(self, store: Store, lease: Lease) -> None:
        record = json.dumps(seal(asdict(self.launch)))
        store.put(f"{_folder(lease.run)}{lease.token:012d}.json", record.encode())

    def _hear_time(self, number: int, images: int, seconds: Mapping[str, float]) -> None:
        self._leave_room()
        if number < self._number:
            return  # workers that were replaced and still speak
        if number > self._number:
            self._number = number
            began_s = self._now() - self._began
            self._attempts.append(AttemptTime(began_s=began_s, room_s=self._room_s))
            self._room_s = 0.0
        marks = list(self._attempts[-1].marks)
        step_s, data_wait_s = seconds.get("step", 0.0), seconds.get("data_wait", 0.0)
        if marks and marks[-1].images == images:
            marks.pop()
        if step_s + data_wait_s > 0:
            marks.append(Mark(images, step_s, data_wait_s))
        # Runs go on from late marks; of the early ones every second will do.
        if len(marks) > _MAX_MARKS:
            marks[: _MAX_MARKS // 2] = marks[1 : _MAX_MARKS // 2 : 2]
        works = marks and not self._attempts[-1].marks
        self._replace(seconds=dict(seconds), marks=tuple(marks))
        if works:
            self._thin_out()

    def _thin_out(self) -> None:
        """Keep of attempts before what the newest, which has begun to work, left of them.

        Sheets are read up to a size, and a launch may have hundreds of attempts.
        """
        first = self._attempts[-1].first_images or 0
        self._attempts[:-1] = [
            replace(attempt, marks=_marks_around(attempt.marks, first))
            for attempt in self._attempts[:-1]
        ]

    def _leave_room(self) -> None:
        if self._room_since is not None:
            self._room_s += self._now() - self._room_since
            self._room_since = None

    def _replace(self, **changes: Any) -> None:
        self._attempts[-1] = replace(self._attempts[-1], **changes)


def read_launches(
    store: Store, run: str, *, before: int | None = None, only_read: bool = False
) -> list[LaunchTime]:
    """Read the sheets of a run's launches, in their order; damaged ones are set aside.

    Args:
        store: Where runs are kept.
        run: Name of the run.
        before: Only those of launches with a lower token.
        only_read: Leave damaged ones where they are, as who does not train the run has to.

    Raises:
        StoreError: The store fails.
    """
    keys = [key for key in store.list(_folder(run)) if key.endswith(".json")]
    if before is not None:
        keys = [key for key in keys if key < f"{_folder(run)}{before:012d}.json"]
    read = read_or_pass_over if only_read else read_or_set_aside
    found = (read(store, key, LaunchTime) for key in keys)
    return [launch for launch in found if launch is not None]


def read_launch(store: Store, lease: Lease) -> LaunchTime | None:
    """Read the sheet of one launch as it is now; None if there is none yet.

    Raises:
        StoreError: The store fails.
    """
    return read_or_set_aside(store, f"{_folder(lease.run)}{lease.token:012d}.json", LaunchTime)


def goodput(total: Mapping[Kind, float]) -> float:
    """Return the share of the time that went into steps which count, 0 to 1."""
    return total["step"] / max(sum(total.values()), 1e-9)


def time_metrics(total: Mapping[Kind, float]) -> dict[str, float]:
    """Return the seconds, and the goodput, under the names that the tracker shows."""
    return {f"time/{kind}_s": total[kind] for kind in KINDS} | {"time/goodput": goodput(total)}


def time_line(total: Mapping[Kind, float]) -> str:
    """Say for people where the time went, the largest part first."""
    whole_s = sum(total.values())
    parts = sorted(KINDS, key=lambda kind: -total[kind])
    shares = [
        f"{kind.replace('_', ' ')} {total[kind] / max(whole_s, 1e-9):.1%}"
        for kind in parts
        if total[kind] > 0
    ]
    return f"{format_duration(whole_s)} in all launches: {', '.join(shares)}"


def _folder(run: str) -> str:
    return f"{check_key(run)}/goodput/"
