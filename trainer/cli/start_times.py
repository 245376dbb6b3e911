"""Where the time from the command to the first update went, for `runtime.timing=true`.

Whatever takes seconds says so beforehand, in the driver and in each worker. So a row of the table
is a line that was said, and the time until the same process said the next one. Of workers, which
all say the same, a row is the one that took longest. Lines of other nodes are timed as they come
in, by one clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil

from cluster.contract import Line
from pipelines.command import tell_event
from pipelines.formats import format_table
from trainer.log_lines import FIRST_UPDATE, OWN_PACKAGES

_SHOWN_BY = "trainer.cli.worker_lines"
"""Logs the workers' lines once more, as the driver's."""
_MOST_TEXT = 70


class _Said(NamedTuple):
    """A line of a process."""

    at_s: float
    """When, in seconds of the launch."""
    text: str


class StartTimes(logging.Handler):
    """Hears what is said until the first update, and tells once how long each thing took.

    Args:
        show: Takes the table, line by line.
        now: Clock in seconds.
        began: When this process did, on that clock; None asks the system.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        *,
        now: Callable[[], float] = time.time,
        began: float | None = None,
    ) -> None:
        super().__init__(level=logging.INFO)
        self._show = show
        self._now = now
        self._began = psutil.Process().create_time() if began is None else began
        self._driver = [_Said(0.0, "starting Python, reading and checking the settings")]
        self._workers: dict[int, list[_Said]] = {}
        self._is_told = False

    @contextmanager
    def listening(self) -> Iterator[StartTimes]:
        """Hear what this process logs for the length of a `with` block."""
        loggers = [logging.getLogger(name) for name in OWN_PACKAGES]
        for each in loggers:
            each.addHandler(self)
        try:
            yield self
        finally:
            for each in loggers:
                each.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Hear what the driver is at."""
        if record.levelno == logging.INFO and record.name != _SHOWN_BY:
            self.hear_driver(record.getMessage())

    def hear_driver(self, text: str) -> None:
        """Hear what the driver, or the cluster for it, is at."""
        if not self._workers:
            self._driver.append(_Said(self._now() - self._began, text))

    def hear_worker(self, line: Line) -> None:
        """Hear what a worker is at; the last first update makes the table."""
        if self._is_told or line.level != "INFO" or line.attempt > 0:
            return
        lines = self._workers.setdefault(line.rank, [])
        if lines and lines[-1].text == FIRST_UPDATE:
            return  # it goes on, while another may still be on its way there
        lines.append(_Said(self._now() - self._began, line.text))
        if all(lines[-1].text == FIRST_UPDATE for lines in self._workers.values()):
            self._tell()

    def _tell(self) -> None:
        self._is_told = True
        rows = self._rows()
        head = ("where the start went", "began", "took", "slowest")
        cells = [
            (_short(text), f"{at_s:.1f} s", f"{took_s:.1f} s", who)
            for text, at_s, took_s, who in rows
        ]
        last_s = max(lines[-1].at_s for lines in self._workers.values())
        cells.append(("all until the first update", "", f"{last_s:.1f} s", ""))
        for line in format_table([head, *cells], align="<>><").splitlines():
            self._show(line)
        told = [{"what": what, "began_s": at, "took_s": took} for what, at, took, _ in rows]
        tell_event("start", {"first_update_s": last_s, "parts": told})

    def _rows(self) -> list[tuple[str, float, float, str]]:
        """What was said, when, how long it took and who took longest, in the order of time."""
        met_s = min(lines[0].at_s for lines in self._workers.values())
        rows = [
            (said.text, said.at_s, until_s - said.at_s, "")
            for said, until_s in _with_ends(self._driver, met_s)
        ]
        slowest: dict[str, tuple[float, float, str]] = {}
        for rank, lines in sorted(self._workers.items()):
            for said, until_s in _with_ends(lines[:-1], lines[-1].at_s):
                began_s, took_s, who = slowest.get(said.text, (said.at_s, -1.0, ""))
                if until_s - said.at_s > took_s:
                    took_s, who = until_s - said.at_s, f"worker {rank}"
                slowest[said.text] = min(began_s, said.at_s), took_s, who
        workers = [(text, *each) for text, each in slowest.items()]
        return rows + sorted(workers, key=lambda row: row[1])


def _with_ends(lines: list[_Said], last_s: float) -> Iterator[tuple[_Said, float]]:
    """Yield each line with the time at which the next one was said."""
    yield from zip(lines, [*(said.at_s for said in lines[1:]), last_s], strict=True)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1]}…"
