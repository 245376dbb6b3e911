"""Many runs by one command: one after the other on this machine, or as jobs of a Ray cluster.

Each run is a launch of its own, in a process or job of its own, so whatever ends one leaves the
others. What is complete is not begun again: the state of a sweep is that of its runs.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Literal

from models.transformer.cost import training_flops
from pipelines.command import Outcome
from pipelines.console import say, typed, visible
from pipelines.documents import DocumentError, parse_json
from pipelines.errors import DataError
from pipelines.formats import format_duration, format_table
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.ending import final_report
from trainer.cli.sweep_table import (
    RunResults,
    SweepTable,
    as_cell,
    as_markdown,
    as_text,
    read_results,
    tables_of,
)
from trainer.config import paths
from trainer.config.job import JobConfig, changed_science, science
from trainer.config.reading import ConfigError
from trainer.config.sweeps import Sweep, SweepPoint, expand_sweep
from trainer.data.splits import open_split
from trainer.errors import is_user_error
from trainer.evaluation.model_record import ModelRecord
from trainer.metrics.mlflow_backend import TrackerUnreachable, check_tracker
from trainer.metrics.mlflow_tracker import MlflowTracker
from trainer.planning.placing import model_shape
from trainer.storage.errors import CheckpointError, RunHeld, StoreError
from trainer.storage.lease import Lease, hold_lease
from trainer.storage.open import open_store, set_environment
from trainer.storage.store import Store
from trainer.training.run_page import origin_of
from trainer.training.tracking import is_waiting, track_sweep, tracking_ui_hint

logger = logging.getLogger(__name__)

_FAILED, _REFUSED, _UNSAVED = 1, 2, 3
_ON_A_PAGE = 12
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_What = Literal["complete", "failed", "refused", "unsaved", "stopped", "not begun"]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of a run of a sweep.

    Attributes:
        point: The run.
        what: In one word.
        error: Why it is not complete, for people.
        seconds: How long this launch took; 0 where there was none.
    """

    point: SweepPoint
    what: _What
    error: str = ""
    seconds: float = 0.0


class StopRequest:
    """Signals that came while a sweep is made; the run that is being made hears of them too.

    Attributes:
        received: Number of the first one; 0 before.
        process: The launch that is running on this machine.
    """

    def __init__(self) -> None:
        self.received = 0
        self.process: subprocess.Popen[str] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals for requests in a `with` block; after it they do what they did before."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        is_first = not self.received
        self.received = self.received or number
        # A terminal's Ctrl-C reaches the launch by itself too. To that a SIGTERM just after it is
        # the same request; further ones are a person's orders, which it is to hear once.
        is_heard = number == signal.SIGINT and not is_first and _is_in_foreground()
        if self.process is not None and not is_heard:
            self.process.send_signal(signal.SIGTERM)


def _is_in_foreground() -> bool:
    """Tell whether a terminal sends its Ctrl-C to this process and those that it has started."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


Make = Callable[[Sequence[SweepPoint], StopRequest], Iterator[Ended]]
"""What makes runs, and tells of each once it has ended, or is not begun for a stop."""


def plan_sweep(words: Sequence[str], *, check: Callable[[JobConfig], JobConfig]) -> Sweep:
    """Compose and check all runs of a sweep before the first one begins.

    Args:
        words: The words of the command line.
        check: Checks a configuration, and fills in what the data set tells.

    Raises:
        ConfigError: The words make one run, or one that cannot be.
    """
    sweep = expand_sweep(words)
    if len(sweep.points) == 1:
        raise ConfigError(
            "--multirun: these words make one run; give a setting several values, separated by "
            "commas, as in train.seed=0,1,2 or '+exp=glob(ablation/*)', or leave --multirun out"
        )
    points = []
    for point in sweep.points:
        try:
            points.append(replace(point, job=check(point.job)))
        except ValueError as error:
            if not is_user_error(error):
                raise
            raise ConfigError(f"run {point.job.run} of this sweep: {error}") from error
    return replace(sweep, points=tuple(points))


def describe_sweep(sweep: Sweep) -> Outcome:
    """Answer which runs a sweep makes, what they cost by formula, and which are complete."""
    rows, values = [], []
    total = 0.0
    for point in sweep.points:
        job = point.job
        flops = training_flops(model_shape(job)) * job.train.total_images
        is_done = is_complete(job)
        total += 0 if is_done else flops
        told = " ".join(f"{key}={value}" for key, value in point.varied.items())
        images = f"{job.train.total_images:,}"
        rows.append((job.run, told, images, f"{flops / 1e15:.4g}", "complete" * is_done))
        values.append(
            {"run": job.run, "words": point.words, "flops": flops, "is_complete": is_done}
        )
    table = format_table([("run", "what varies", "images", "PFLOP", ""), *rows])
    text = (
        f"sweep {sweep.name}: {len(rows)} runs\n{table}\nstill to train: {total / 1e15:.4g} PFLOP"
    )
    return Outcome(text, {"sweep": sweep.name, "runs": values, "flops": total})


def is_complete(job: JobConfig) -> bool:
    """Tell whether a run is trained to its end, measured as its settings say, and told to MLflow.

    What cannot be looked at from here is not complete: its launch tells why.
    """
    try:
        store = open_store(paths.runs_uri(job), job.store)
        newest = CheckpointReader(store, run=job.run).newest_valid()
        if newest is None or newest.images < job.train.total_images:
            return False
        trained_on = open_split(job, "train").digest
        # Of an autoencoder the settings are compared, and its weights once the run goes on.
        codec_digest = ModelRecord.of(newest).autoencoder_sha256
        chosen = science(job, data_digest=trained_on, codec_digest=codec_digest)
        return (
            not changed_science(newest.science, chosen)
            and final_report(job, only_read=True) is not None
            and not is_waiting(job, newest, store=store)
        )
    except (CheckpointError, DataError, ConfigError):
        return False


def make_here(*, quiet: bool) -> Make:
    """Return what makes one run after the other on this machine.

    Args:
        quiet: Whether launches tell warnings and errors alone.
    """

    def make(points: Sequence[SweepPoint], stop: StopRequest) -> Iterator[Ended]:
        # A launch also stops by itself, where this machine is about to be taken away.
        is_over = False
        for number, point in enumerate(points, 1):
            if stop.received or is_over:
                yield Ended(point=point, what="not begun")
                continue
            say(f"run {number} of {len(points)}: {point.job.run}")
            run = _launch_here(point, stop, quiet=quiet)
            is_over = run.what == "stopped"
            yield run

    return make


def _launch_here(point: SweepPoint, stop: StopRequest, *, quiet: bool) -> Ended:
    command = [sys.executable, "-m", "trainer.launch", *point.words, "--json"]
    began = time.monotonic()
    # Its lines for people go to the same standard error as ours.
    with subprocess.Popen(
        [*command, *["--quiet"] * quiet], stdout=subprocess.PIPE, text=True
    ) as process:
        stop.process = process
        if stop.received:  # it came while the process was made
            process.terminate()
        out, _ = process.communicate()
        stop.process = None
    answer, code = answer_in(out), process.returncode
    error = str(answer.get("error") or "")
    if code < 0:
        error = error or f"its process was ended by signal {-code}"
        code = 128 - code
    return ended(point, code, error=error, seconds=time.monotonic() - began)


def ended(point: SweepPoint, code: int, *, error: str, seconds: float) -> Ended:
    """Say what the exit code of a launch means.

    Args:
        point: The run.
        code: The exit code.
        error: What it said was wrong.
        seconds: How long it took.
    """
    known: dict[int, _What] = {0: "complete", _REFUSED: "refused", _UNSAVED: "unsaved"}
    what = known.get(code, "stopped" if code in _STOPPED else "failed")
    told = "" if what in ("complete", "stopped") else error or f"exit code {code}"
    return Ended(point=point, what=what, error=told, seconds=seconds)


def answer_in(text: str) -> Mapping[str, Any]:
    """Return the last JSON object that a command has written; nothing if there is none."""
    lines = text.splitlines(keepends=True)
    for number in reversed(range(len(lines))):
        if not lines[number].startswith("{"):
            continue
        try:
            answer: Mapping[str, Any] = parse_json("".join(lines[number:]).encode())
        except DocumentError:
            continue
        return answer
    return {}


def run_sweep(sweep: Sweep, words: Sequence[str], *, make: Make) -> Outcome:
    """Make all runs of a sweep that are not complete, and answer with their figures.

    Args:
        sweep: The runs.
        words: The words of the command line.
        make: Makes them.

    Raises:
        RunHeld: Another command makes the sweep.
        StoreError: The store fails.
        TrackerUnreachable: If MLflow cannot be used and `tracking.required` is true.
    """
    job = sweep.points[0].job
    set_environment(job.store)
    _check_tracker(job)
    store = open_store(paths.sweeps_uri(job), job.store)
    begun: list[str] = []
    with _hold(store, sweep.name) as lease:
        tracker = track_sweep(job, sweep.name, store, token=lease.token, opened=begun.append)
        made, stop = _Made(sweep, words, tracker), StopRequest()
        try:
            with stop.listening():
                made.run(make, stop)
        except BaseException as error:
            tracker.close("FAILED", f"{type(error).__name__}: {error}")
            raise
        made.end(stop)
        try:
            store.put(f"{sweep.name}/table.md", made.page().encode())
        except StoreError as error:
            say(f"warning: the table cannot be written: {error}")
    return made.outcome(stop, run_id=begun[-1] if begun else "")


@contextmanager
def _hold(store: Store, name: str) -> Iterator[Lease]:
    """Hold a sweep as a launch holds its run; those of a sweep are held one by one besides."""
    with ExitStack() as stack:
        try:
            held = hold_lease(store, name, report=say, on_lost=lambda lost: say(f"warning: {lost}"))
            lease = stack.enter_context(held)
        except RunHeld as error:
            raise RunHeld(
                f"the sweep {name} is made by another command, which holds it as a launch holds "
                f"its run (tracking.sweep=NAME names another sweep): {error}"
            ) from error
        yield lease


def _check_tracker(job: JobConfig) -> None:
    """Make what MLflow needs once, before several runs would at the same time."""
    home = paths.home(job)
    home.mkdir(parents=True, exist_ok=True)
    try:
        check_tracker(job.tracking, str(home))
    except TrackerUnreachable as error:
        if job.tracking.required:
            raise
        say(f"warning: {error}")


class _Made:
    """What has become of a sweep so far, told as it changes.

    Args:
        sweep: The runs.
        words: The words of the command line.
        tracker: The sweep's.
    """

    def __init__(self, sweep: Sweep, words: Sequence[str], tracker: MlflowTracker) -> None:
        self._sweep = sweep
        self._words = words
        self._tracker = tracker
        self._ended: dict[str, Ended] = {}
        self._results: dict[str, RunResults] = {}

    def run(self, make: Make, stop: StopRequest) -> None:
        """Make what is not complete."""
        tracker, points = self._tracker, self._sweep.points
        tracker.begin()
        origin = origin_of(["--multirun", *self._words])
        tracker.tags(
            {
                "mlflow.source.name": origin["command"],
                "mlflow.source.type": "LOCAL",
                "mlflow.user": origin["user"],
            }
        )
        logger.info("looking for runs that are complete")
        complete = [point for point in points if is_complete(point.job)]
        for point in complete:
            self._take(Ended(point=point, what="complete"))
        tracker.runs([paths.run_uri(point.job) for point in complete])
        say(f"sweep {self._sweep.name}: {len(points)} runs, {len(complete)} of them complete")
        tracker.page(self.page())
        for each in make([point for point in points if point not in complete], stop):
            self._take(each)
            if each.seconds:
                told = f" ({each.error})" if each.error else ""
                spent = format_duration(each.seconds)
                say(visible(f"run {each.point.job.run}: {each.what} after {spent}{told}"))
            tracker.page(self.page())

    def _take(self, ended: Ended) -> None:
        name = ended.point.job.run
        self._ended[name] = ended
        if ended.what == "complete":
            try:
                self._results[name] = read_results(ended.point)
            except CheckpointError as error:
                say(f"warning: the figures of {name} cannot be read: {error}")

    def end(self, stop: StopRequest) -> None:
        """Tell the tracker how the sweep has ended."""
        status = "FINISHED" if self._is_complete else "KILLED" if stop.received else "FAILED"
        self._tracker.close(status, "" if self._is_complete else self._counts())

    @property
    def _is_complete(self) -> bool:
        return all(each.what == "complete" for each in self._ended.values())

    @property
    def tables(self) -> list[SweepTable]:
        """What complete runs have come to."""
        names = [point.job.run for point in self._sweep.points]
        return tables_of([self._results[name] for name in names if name in self._results])

    def _counts(self) -> str:
        counted = Counter(each.what for each in self._ended.values())
        return ", ".join(f"{count} {what}" for what, count in counted.items())

    def _faults(self) -> list[tuple[str, str]]:
        return [
            (f"{each.point.job.run}: {each.what}", each.error)
            for each in self._ended.values()
            if each.what != "complete"
        ]

    def page(self) -> str:
        """Describe the sweep in Markdown."""
        command = visible(f"{typed('trainer.launch')} -m {shlex.join(self._words)}")
        command = command.replace("`", "'")
        faults = "\n".join(f"- {as_cell(f'{name}. {error}')}" for name, error in self._faults())
        parts = (f"```\n{command}\n```", as_markdown(self.tables), faults)
        return "\n\n".join(filter(None, parts)) + "\n"

    def outcome(self, stop: StopRequest, *, run_id: str) -> Outcome:
        """Answer with the tables, and with what is not complete."""
        tables, job = self.tables, self._sweep.points[0].job
        hint = tracking_ui_hint(job, run_id=run_id)
        parts = [as_text(tables), f"sweep {self._sweep.name}: {self._counts()}"]
        if faults := self._faults():
            parts[-1] += "\n" + format_table([(f"  {name}", error) for name, error in faults])
            parts[-1] += "\nthe same command goes on with what is not complete"
        parts.append(f"look at the sweep: {visible(hint)}")
        complete = [each.point.job for each in self._ended.values() if each.what == "complete"]
        if 1 < len(complete) <= _ON_A_PAGE:
            uris = shlex.join(map(paths.run_uri, complete))
            parts[-1] += f"\nput its runs on one page: {typed('trainer.report')} {uris}"
        values = {
            "sweep": self._sweep.name,
            "runs": [
                {
                    "run": each.point.job.run,
                    "uri": paths.run_uri(each.point.job),
                    "varied": each.point.varied,
                    "outcome": each.what,
                    "error": each.error or None,
                }
                for each in self._ended.values()
            ],
            "tables": [
                {"protocol": table.heading, "rows": [each.told() for each in table.figures]}
                for table in tables
            ],
            "look_at_it": hint,
        }
        code = 128 + stop.received if stop.received else 0 if self._is_complete else _FAILED
        return Outcome("\n\n".join(filter(None, parts)), values, code)
