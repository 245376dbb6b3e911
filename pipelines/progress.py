"""How far something is: a bar on a terminal, and otherwise a line every few seconds.

Files, pipes and the logs of jobs get lines, which stay greppable. Only the process of a command
that has the terminal to itself shows a bar.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self, TextIO, cast

from pipelines.console import drop_buffered, has_room_for_a_bar, lines_above, visible
from pipelines.formats import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_REFRESHES_PER_S = 4


class Pace(NamedTuple):
    """How far something is.

    Attributes:
        done: How much is done.
        total: How much there is.
        fraction: The part that is done.
        rate: How much is done in a second; 0 as long as that is unknown.
        left_s: Seconds until the end; infinite as long as that is unknown.
    """

    done: float
    total: float
    fraction: float
    rate: float
    left_s: float


def figures_in(unit: str) -> Callable[[Pace], str]:
    """Return what stands behind a bar whose progress is counted in so much, or in "bytes"."""

    def figures(pace: Pace) -> str:
        if not pace.rate:
            return f"{pace.fraction:4.0%}"
        rate = f"{format_bytes(pace.rate)}" if unit == "bytes" else f"{pace.rate:,.1f} {unit}"
        return f"{pace.fraction:4.0%}  {rate}/s  ETA {format_duration(pace.left_s)}"

    return figures


class Progress:
    """Tells how far something is, for the length of a `with` block; from any thread.

    Args:
        what: What is done, before the bar.
        total: How much there is to do.
        report: Takes the lines.
        line: Makes one.
        figures: Makes what stands behind the bar.
        every_s: Seconds between two lines.
        last: Whether a line tells the end too, also below a bar.
    """

    def __init__(
        self,
        what: str,
        total: float,
        *,
        report: Callable[[str], None],
        line: Callable[[Pace], str],
        figures: Callable[[Pace], str],
        every_s: float = 5.0,
        last: bool = True,
    ) -> None:
        self._what = what
        self._total = total
        self._report = report
        self._line = line
        self._figures = figures
        self._every_s = every_s
        self._last = last
        self._done = self._fresh = 0.0
        self._began = self._reported = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Show the bar, where there is room for it."""
        if has_room_for_a_bar():
            self._bar = self._open.enter_context(_make_bar(self.figures))
            self._bar.add_task(visible(self._what), total=self._total or 1)
            # Plain: what a line quotes is no markup. Whole: the terminal wraps it, as any other.
            write = self._bar.console.print
            put = partial(write, markup=False, emoji=False, highlight=False, soft_wrap=True)
            self._open.enter_context(lines_above(put))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        shown, self._bar = self._bar is not None, None
        self._open.close()
        if shown and self._last and kind is None and self._done >= self._total:
            self._report(self._line(self.pace()))

    @property
    def done(self) -> float:
        """How much is done."""
        return self._done

    def add(self, amount: float, *, fresh: bool = True) -> None:
        """Count so much as done.

        Args:
            amount: How much.
            fresh: Whether that took its time; what an earlier start has done tells nothing of the
                speed.
        """
        with self._lock:
            self._done += amount
            self._fresh += amount if fresh else 0
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)
                return
            now = time.monotonic()
            is_due = now - self._reported >= self._every_s
            if self._last if self._done >= self._total else is_due:
                self._reported = now
                self._report(self._line(self.pace()))

    def pace(self) -> Pace:
        """Return how far it is."""
        rate = self._fresh / max(time.monotonic() - self._began, 1e-9)
        left = self._total - self._done
        return Pace(
            done=self._done,
            total=self._total,
            fraction=self._done / self._total if self._total else 1.0,
            rate=rate,
            left_s=left / rate if rate else float("inf"),
        )

    def figures(self) -> str:
        """Return what stands behind the bar now."""
        return self._figures(self.pace())


def _make_bar(figures: Callable[[], str]) -> Bar:
    """Make the bar; the library is imported where one is seen, and nowhere else."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Figures(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(figures(), no_wrap=True)

    return Progress(
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        BarColumn(bar_width=24),
        Figures(Column(no_wrap=True)),
        console=Console(file=cast(IO[str], _Terminal(sys.stderr)), force_terminal=True),
        transient=True,
        # Our lines are put above the bar; what goes elsewhere is not to come here.
        redirect_stdout=False,
        redirect_stderr=False,
        refresh_per_second=_REFRESHES_PER_S,
    )


class _Terminal:
    """A terminal that may go away, and may lack characters, while a bar is drawn on it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            drop_buffered(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop_buffered(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
