"""Tries, several at a time, until the time is over."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from pipelines.progress import Pace, Progress
from tests.fuzz.attempt import PATIENCE_S, Attempt, Task, first_ended
from tests.fuzz.damage.kind import learn
from tests.fuzz.kinds import KINDS, kind_of
from tests.fuzz.material import Material
from tests.fuzz.table import Tally

_REPORT_EVERY_S = 10.0


class Campaign:
    """Makes tries and counts what comes of them.

    Args:
        material: What to attack copies of.
        folder: An empty folder for the tries.
        tally: Counts; its seed decides them all.
        at_once: How many run at a time.
        report: Takes lines for the user.
    """

    def __init__(
        self,
        material: Material,
        *,
        folder: Path,
        tally: Tally,
        at_once: int,
        report: Callable[[str], None],
    ) -> None:
        self._material = material
        self._folder = folder
        self._at_once = at_once
        self._report = report
        self.tally = tally

    def learn(self) -> None:
        """Read what is undamaged, to compare with."""
        task = Task("learn", self.tally.seed, 0)
        attempt = Attempt(task, learn, material=self._material, folder=self._place("learn"))
        try:
            attempt.result()
        except KeyboardInterrupt:
            attempt.end()
            raise

    def run(self, tasks: Iterator[Task], *, seconds: float, most: int | None = None) -> None:
        """Make tries until the time is over, or until so many are made."""
        running: dict[Attempt, float] = {}

        def line(pace: Pace) -> str:
            bad, rate = len(self.tally.findings), self.tally.tried / max(pace.done, 1e-9)
            left_s = max(0.0, pace.total - pace.done)
            return f"{self.tally.tried:,} tries, {bad} bad, {rate:.1f} tries/s, {left_s:.0f} s left"

        try:
            with Progress(
                *("trying", seconds),
                report=self._report,
                line=line,
                figures=line,
                every_s=_REPORT_EVERY_S,
                last=False,
            ) as progress:
                self._make(tasks, running, progress, seconds=seconds, most=most)
        finally:
            for attempt in running:  # interrupted
                attempt.end()

    def _make(
        self,
        tasks: Iterator[Task],
        running: dict[Attempt, float],
        progress: Progress,
        *,
        seconds: float,
        most: int | None,
    ) -> None:
        began = time.monotonic()
        while True:
            now = time.monotonic()
            progress.add(now - began - progress.done)
            over = now - began > seconds or (most is not None and self._begun(running) >= most)
            while not over and len(running) < self._at_once:
                if (task := next(tasks, None)) is None:
                    over = True
                    break
                running[self._started(task)] = time.monotonic()
                over = most is not None and self._begun(running) >= most
            if not running:
                return
            self._take(running)

    def _begun(self, running: dict[Attempt, float]) -> int:
        return self.tally.tried + len(running)

    def _started(self, task: Task) -> Attempt:
        kind = KINDS[task.kind].kind
        folder = self._place(f"{task.kind}-{task.number}")
        return Attempt(task, kind, material=self._material, folder=folder)

    def _take(self, running: dict[Attempt, float]) -> None:
        """Count those that have ended, or run for too long."""
        ended = first_ended(list(running), timeout_s=1.0)
        late = [each for each, since in running.items() if time.monotonic() - since > PATIENCE_S]
        for attempt in dict.fromkeys([*ended, *late]):
            seen = attempt.result(patience_s=0 if attempt in late else 5.0)
            del running[attempt]
            before = len(self.tally.findings)
            self.tally.add(attempt.task, seen)
            for finding in self.tally.findings[before:]:
                self._report(finding.text())
            task = attempt.task
            shutil.rmtree(self._folder / f"{task.kind}-{task.number}", ignore_errors=True)

    def _place(self, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir()
        return folder


def tasks_of(seed: int, *, only: str | None, first: int = 0) -> Iterator[Task]:
    """Return the tries of a seed, of one kind or of all."""
    for number in count(first):
        yield Task(only or kind_of(seed, number), seed, number)
