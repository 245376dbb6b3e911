"""Ends a rank that stands still, so that the run is started again, and tells where it stood.

A rank that is stopped, a loader that hangs, a collective that one rank does not enter: with gloo
and NCCL alike all ranks then wait, for as long as a collective may take. Each rank watches itself,
and since the ranks wait for one another in every update, all of them notice within moments.

Before the loop and after it, and while they draw and measure in between, ranks wait for the first
one, however long its store takes or its measuring. There it is watched alone: whoever stands still
keeps it waiting.

What holds Python's interpreter lock for ever stops the watch of its rank too; there the other ranks
end the run, or Ray does, which asks each process whether it is there.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Self

from cluster.failure import STOOD_STILL
from trainer.config.job import RuntimeConfig
from trainer.storage.store import Store
from trainer.training.hooks import UpdateReport
from trainer.training.phases import Phase, PhaseClock, Sight

logger = logging.getLogger(__name__)

SLOWEST_UPDATES = 20
"""An update may take so many times as long as the slowest of late."""
SLOW_PHASE_S = 1800.0
"""What has no measured time before it may take so long without a sign of life, which is a line of
the log or a block of a checkpoint: each part of the start, the first update, drawing a grid, the
evaluation."""

_STANDARD_ERROR = 2
_RECENT = 100
_FRAMES = 4
_WRITE_S = 10.0
_LAST_WORDS_S = 5.0
"""What the other ranks get to notice it too, before a lost connection ends them."""


class Watchdog:
    """Watches the thread that makes it, for the length of a `with` block.

    Args:
        clock: What the rank is at.
        least_s: An update may always take so long, however fast those before were.
        limits_s: Seconds that each other phase may take.
        on_hang: Called in a thread when something takes longer, with what that is, as a clause. The
            process is to end there.
        tick_s: How often it looks.

    Attributes:
        images: Images that the run has seen.
    """

    def __init__(
        self,
        clock: PhaseClock,
        *,
        least_s: float,
        limits_s: Mapping[Phase, float],
        on_hang: Callable[[str], None],
        tick_s: float = 1.0,
    ) -> None:
        self._clock = clock
        self._least_s = least_s
        self._limits_s = limits_s
        self._on_hang = on_hang
        self._tick_s = tick_s
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._last_s: float | None = None
        self._is_patient = False
        self.images = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def be_patient(self, is_patient: bool) -> None:
        """Say whether this rank may wait for others however long, from now on."""
        self._clock.show_life()
        self._is_patient = is_patient

    @contextmanager
    def patient(self, is_patient: bool) -> Iterator[None]:
        """Say for a `with` block that this rank may wait; one that is patient already stays so."""
        before = self._is_patient
        self.be_patient(before or is_patient)
        try:
            yield
        finally:
            self.be_patient(before)

    @property
    def limit_s(self) -> float:
        """Seconds that an update may take as things are."""
        return max(self._least_s, SLOWEST_UPDATES * max(self._recent, default=0.0))

    def after_update(self, report: UpdateReport) -> None:
        """Measure the update; the first one, which has the start in it, does not count."""
        self.images = report.images
        worked_s = sum(
            seconds
            for phase, seconds in self._clock.seconds().items()
            if phase in ("step", "data_wait")
        )
        if self._last_s is not None:
            self._recent.append(worked_s - self._last_s)
        self._last_s = worked_s
        if len(self._recent) == 1:
            logger.info(
                "the hang watchdog is armed: after %.0f s without an update, or %d times the "
                "slowest one, it tells where all threads stand and has the workers started again",
                self._least_s,
                SLOWEST_UPDATES,
            )

    def _watch(self) -> None:
        standing = Standstill(
            self._clock.sight(), time.monotonic(), longest_look_s=2 * self._tick_s
        )
        while not self._ended.wait(self._tick_s):
            seen = self._clock.sight()
            stood_s = standing.look(seen, time.monotonic())
            limit_s = self.limit_s if seen.phase == "step" else self._limits_s[seen.phase]
            if stood_s > limit_s and not self._is_patient:
                what = "update" if seen.phase == "step" else "sign of life"
                self._on_hang(
                    f"no {what} for {stood_s:.0f} s ({seen.phase.replace('_', ' ')}; the limit is "
                    f"{limit_s:.0f} s)"
                )
                return


class Standstill:
    """Measures how long nothing has happened.

    Args:
        seen: The first sight.
        now: When that was, in seconds.
        longest_look_s: What passed between two looks counts for no more: a process that was stopped
            as a whole, and goes on, has not been standing still.
    """

    def __init__(self, seen: Sight, now: float, *, longest_look_s: float) -> None:
        self._seen = seen
        self._now = now
        self._longest_look_s = longest_look_s
        self._stood_s = 0.0

    def look(self, seen: Sight, now: float) -> float:
        """Return the seconds for which there has been no other sight."""
        self._stood_s += min(now - self._now, self._longest_look_s)
        if seen != self._seen:
            self._stood_s = 0.0
        self._seen, self._now = seen, now
        return self._stood_s


class HangReport:
    """Tells where the threads of this process stand, and ends it.

    Args:
        store: Where the stacks go.
        key: Says under which key.
        watched: Number of the thread that trains.
        end: Ends the process.
    """

    def __init__(
        self,
        store: Store,
        key: Callable[[], str],
        *,
        watched: int,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._store = store
        self._key = key
        self._watched = watched
        self._end = end
        self._is_kept = False

    def __call__(self, what: str) -> None:
        """Tell it the driver and the store, and end whatever of these hangs.

        Where one of them does not take it, all of it is written to standard error. Else it is not,
        for the driver shows what is written there.

        Args:
            what: What takes too long, as a clause.
        """
        try:
            self._tell(what)
        finally:
            # Also where the disk is full, or no thread can be started: nobody else ends it.
            self._end(STOOD_STILL)

    def _tell(self, what: str) -> None:
        stacks = all_stacks()
        key = self._key()
        deadline = time.monotonic() + _WRITE_S
        # The thread that stands still may hold the lock of a stream or of a log's handler, and the
        # store may be what hangs. So each is told by a thread of its own.
        telling = [
            _in_thread(self._tell_driver, what, self._place(), key),
            _in_thread(self._write, key, f"{what}\n{stacks}"),
        ]
        for thread in telling:
            thread.join(max(0.0, deadline - time.monotonic()))
        if telling[0].is_alive() or not self._is_kept:
            _in_thread(_write_error, f"{what}\n{stacks}").join(_WRITE_S)
        time.sleep(_LAST_WORDS_S)

    def _tell_driver(self, what: str, place: str, key: str) -> None:
        logger.error("%s: it stands in %s; all threads: %s", what, place, self._store.uri(key))

    def _place(self) -> str:
        """Return the innermost calls of the thread that trains."""
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return "no thread any more"
        calls = reversed(traceback.extract_stack(frame)[-_FRAMES:])
        return " < ".join(
            f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in calls
        )

    def _write(self, key: str, text: str) -> None:
        try:
            self._store.put(key, text.encode())
            self._is_kept = True
        except Exception as error:
            logger.warning("the stacks are on standard error alone: %s", error)


@contextmanager
def watch(
    clock: PhaseClock,
    config: RuntimeConfig,
    store: Store,
    *,
    key: Callable[[int], str],
    patience_s: float,
    saving_s: float,
    end: Callable[[int], None],
) -> Iterator[Watchdog]:
    """Watch this thread for the length of a `with` block.

    Args:
        clock: What the rank is at.
        config: Says after how long nothing moves.
        store: Where the stacks go.
        key: Says under which key, given the images that the run has seen.
        patience_s: How long an update may wait for its data.
        saving_s: How long a save may wait for the store.
        end: Ends this process, with an exit code.

    Yields:
        The watchdog, which does nothing if the configuration wants none.
    """
    watchdog = Watchdog(
        clock,
        least_s=config.hang_s + patience_s,
        limits_s={
            "start": SLOW_PHASE_S,
            "checkpoint": SLOW_PHASE_S + saving_s,
            "evaluation": SLOW_PHASE_S,
        },
        on_hang=HangReport(
            store, lambda: key(watchdog.images), watched=threading.get_ident(), end=end
        ),
    )
    with watchdog if config.hang_s else nullcontext():
        yield watchdog


def _in_thread(step: Callable[..., None], *arguments: str) -> threading.Thread:
    thread = threading.Thread(target=step, args=arguments, daemon=True)
    thread.start()
    return thread


def _write_error(text: str) -> None:
    """Write to standard error past all that Python keeps for it: buffer, lock, what replaced it."""
    rest = f"{text}\n".encode(errors="backslashreplace")
    with suppress(OSError):
        while rest:
            rest = rest[os.write(_STANDARD_ERROR, rest) :]


def hang_key(run: str, *, images: int, attempt: int, rank: int) -> str:
    """Return the store key of what a rank tells that stood still.

    Args:
        run: Name of the run.
        images: Images that the run had seen.
        attempt: Which start of the workers it was.
        rank: The rank.
    """
    return f"{run}/hangs/{images:012d}-attempt-{attempt:05d}/rank-{rank:05d}.txt"


def all_stacks() -> str:
    """Return where each thread of this process stands, innermost call first."""
    names = [f"0x{thread.ident:016x} {thread.name}" for thread in threading.enumerate()]
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return "\n".join(["threads:", *names, "", file.read()])
