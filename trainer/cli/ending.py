"""What the user sees at the end of a launch: results, how it ended, and what to do next."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from pipelines.command import Outcome
from pipelines.console import say_error, typed, visible, write
from pipelines.errors import DataError
from pipelines.formats import format_duration, format_table
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.console import Console
from trainer.cli.report import PAGE, put_page
from trainer.config import paths
from trainer.config.job import JobConfig
from trainer.config.reading import to_dict
from trainer.data.splits import open_images
from trainer.evaluation.reports import EvaluationReport, RunTime, evaluation_key
from trainer.page.page import make_page
from trainer.page.story import read_story
from trainer.storage.errors import LeaseLost, StoreError
from trainer.storage.kept import read_or_pass_over, read_or_set_aside
from trainer.storage.open import open_store
from trainer.training.goodput import Timesheet, time_line, time_metrics
from trainer.training.tracking import add_to_run, tracking_ui_hint

logger = logging.getLogger(__name__)


def final_report(job: JobConfig, *, only_read: bool = False) -> EvaluationReport | None:
    """Read what was measured at the end of a run; None if that is still to do.

    A report that cannot be believed is put aside with a warning. One of other `eval` settings, of
    another checkpoint or of other held-out images tells nothing.

    Args:
        job: The configuration.
        only_read: Leave a report that cannot be believed where it is.

    Raises:
        StoreError: The store fails.
        DataError: The held-out images are missing or out of reach.
    """
    store = open_store(paths.runs_uri(job), job.store)
    newest = CheckpointReader(store, run=job.run).newest_valid()
    if newest is None:
        return None
    key = evaluation_key(job.run, newest.images, "report.json")
    read = read_or_pass_over if only_read else read_or_set_aside
    report = read(store, key, EvaluationReport)
    if report is None or _of_the_end(report.settings) != _of_the_end(to_dict(job.eval)):
        return None
    told = report.origin
    reference = told.held_out_index  # a file is known by its place, which is among the settings
    if job.eval.reference in ("test", "train"):
        reference = open_images(job, job.eval.reference).digest
    wanted = (job.run, newest.attempt, reference)
    if (told.run, told.attempt, told.held_out_index) == wanted:
        return report
    logger.warning(
        "%s tells of another checkpoint or of other real images, so it is measured again",
        store.uri(key),
    )
    return None


def _of_the_end(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the settings of an evaluation what concerns other checkpoints than the last."""
    return {name: value for name, value in settings.items() if name != "during"}


def _summary(
    job: JobConfig, report: EvaluationReport, *, times: Timesheet, written: bool
) -> tuple[str, dict[str, Any]]:
    """Render the closing table of a complete run, and say where everything is.

    Args:
        job: The configuration.
        report: What was measured at its end.
        times: What the run's time was spent on.
        written: Whether the samples are in the store.
    """
    store = open_store(paths.runs_uri(job), job.store)

    def place(name: str) -> str:
        return store.uri(evaluation_key(job.run, report.images, name))

    samples = {"samples": place("samples.npz"), "grid": place("grid.png")} if written else {}
    checkpoint = store.uri(f"{job.run}/checkpoints/{report.images:012d}")
    rows = [
        (
            "run",
            f"{job.run}, {report.images:,} images"
            + (f", {format_duration(times.launch.wall_s)} in this launch" if times.total else ""),
        ),
        *((("time", time_line(times.total)),) if times.total else ()),
        *((f"sample {name}" if name == "grid" else name, uri) for name, uri in samples.items()),
        ("checkpoint", checkpoint),
        *_figures(report),
    ]
    if report.labels is not None:
        rows.append(
            (
                "classifier reads the label",
                f"{report.labels.samples:.1%} of samples, {report.labels.held_out:.1%} of held-out "
                "images",
            )
        )
    values = {**samples, "checkpoint": checkpoint, "images": report.images}
    return format_table(rows), values


def _figures(report: EvaluationReport) -> list[tuple[str, str]]:
    """Say how far samples are from real images, beside what that has to be compared with."""
    drawn_in = report.origin.precision
    calls = f"({report.network_evaluations:g} network evaluations per sample"
    calls += f", in {drawn_in})" if drawn_in else ")"
    name = f"Fréchet distance ({report.features})"
    if report.frechet is None:
        few = "not measured: there are too few held-out images, see the warning above"
        return [("samples", f"{report.samples:,} {calls}"), (name, few)]
    return [
        (
            name,
            f"{report.frechet:.4f} of {report.samples:,} samples to {_compared_with(report)} "
            f"{calls}",
        ),
        ("  real / untrained", _references(report, report.frechet)),
        *_further(report),
        *_variety(report),
    ]


_FURTHER = {
    "spatial_frechet": "spatial Fréchet distance",
    "inception_score": "Inception Score",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "sliced_wasserstein": "sliced Wasserstein distance",
}


def _further(report: EvaluationReport) -> list[tuple[str, str]]:
    """Lay out the other figures, each beside that of real images."""
    if report.more is None:
        return []
    found, real = asdict(report.more), None if report.real is None else report.real.more
    beside = {} if real is None else asdict(real)
    return [
        (words, f"{found[name]:.4g}" + _real_too(beside.get(name)))
        for name, words in _FURTHER.items()
        if found[name] is not None
    ]


def _real_too(value: float | None) -> str:
    return "" if value is None else f" (real {value:.4g})"


def _compared_with(report: EvaluationReport) -> str:
    """Say what samples are compared with."""
    reference = str(report.settings.get("reference", "test"))
    if reference not in ("test", "train"):
        return f"the statistics in {reference}"
    counted = f"{report.real_images:,} " if report.real_images else ""
    unusable = report.unusable_real_images
    more = f" ({unusable:,} more cannot be used)" if unusable else ""
    return f"{counted}{'held-out' if reference == 'test' else 'training'} images{more}"


def _references(report: EvaluationReport, frechet: float) -> str:
    """Say what the distance has to be compared with."""
    before = report.frechet_untrained
    untrained = "not measured" if before is None else f"{before:.4f}"
    if report.real is None:
        return f"no training images to compare with / {untrained}"
    real = report.real.frechet
    times = f": {frechet / real:.3g} times that of real images" if real > 0 else ""
    return f"{real:.4f} of {report.real.images:,} real images / {untrained}{times}"


def _variety(report: EvaluationReport) -> list[tuple[str, str]]:
    """Say whether samples are as varied as real images, and no copies of them."""
    rows, real = [], report.real
    if report.diversity is not None:
        beside = _real_too(None if real is None else real.diversity)
        rows.append(("diversity within classes", f"{report.diversity:.4g}{beside}"))
    if report.nearest is not None and real is not None:
        rows.append(
            (
                "nearest training image",
                f"{report.nearest.mean:.4g} away on average (held-out images "
                f"{real.nearest.mean:.4g}); {report.nearest.close_share:.1%} of samples are closer "
                f"than 99 % of held-out images",
            )
        )
    return rows


FAILED, REFUSED, UNSAVED = 1, 2, 3


def end_failed(job: JobConfig, console: Console, error: Exception) -> Outcome:
    """Say why the workers could not go on, and answer whether the same command can.

    Args:
        job: The configuration.
        console: What was heard of the run.
        error: A ValueError is a mistake in what was asked for, which would be met again.
    """
    tail = getattr(error, "traceback_tail", "")
    reason = str(error).removesuffix(f"\n{tail}") if tail else str(error)
    _tell_time(job, console, status="FAILED", reason=reason)
    say_error(reason)
    is_mistake = isinstance(error, ValueError)
    if tail and not is_mistake:
        write("\n".join(f"  {visible(line)}" for line in tail.split("\n")), sys.stderr)
    text = ""
    if console.last_checkpoint:
        text = f"once the cause is gone, {how_to_go_on(job, console)}"
        if is_mistake:
            text = f"the run's last checkpoint is {console.last_checkpoint}"
    values = {**_values(job, console, "failed"), "error": reason}
    return Outcome(text, values, REFUSED if is_mistake and not console.begun else FAILED)


def end_lost(job: JobConfig, console: Console, lost: LeaseLost) -> Outcome:
    """Answer that another launch has taken the run; what MLflow shows of it is that one's to say.

    Args:
        job: The configuration.
        console: What was heard of the run.
        lost: Who took it.
    """
    return Outcome("", {**_values(job, console, "failed"), "error": str(lost)}, FAILED, str(lost))


def end_interrupted(job: JobConfig, console: Console) -> None:
    """Have MLflow know that the workers were ended at once."""
    _track(job, console, status="KILLED", reason="interrupted", patience_s=_INTERRUPTED_S)


def end_stopped(job: JobConfig, console: Console, *, signal_number: int) -> Outcome:
    """Answer how a run goes on that was asked to stop.

    Args:
        job: The configuration.
        console: What was heard of the run.
        signal_number: What asked.
    """
    hint = tracking_ui_hint(job, run_id=console.tracked)
    _tell_time(job, console)
    lines = (f"stopped; {how_to_go_on(job, console)}", f"look at the run: {hint}")
    values = {**_values(job, console, "stopped"), "look_at_it": hint}
    unsaved = _report_unsaved(console)
    code = UNSAVED if unsaved else 128 + signal_number
    return Outcome("\n".join(map(visible, lines)), values, code, unsaved)


def end_finished(job: JobConfig, console: Console) -> Outcome:
    """Answer with the results of a run that went to its end.

    Args:
        job: The configuration.
        console: What was heard of the run.
    """
    report = None
    try:
        report = final_report(job)
        if report is not None and (time := console.times.run_time) is not None:
            report = _add_time(job, report, time)
    except (StoreError, DataError) as error:
        console.note(f"warning: the results cannot be shown: {error}")
    page = write_page(job, console)
    _track(job, console, documents={} if page is None else {PAGE: page.html})
    shown = complete(job, console, report, page=page)
    if unsaved := _report_unsaved(console):
        return replace(shown, exit_code=UNSAVED, error=unsaved)
    trained = f"the run is trained to its end ({console.last_checkpoint}), but its"
    if console.unmeasured:
        wrong = f"{trained} samples could not be measured: {console.unmeasured}"
    elif report is not None:
        return shown
    elif console.unwritten:
        wrong = (
            f"{trained} report could not be written, so that its figures stand above and nowhere "
            f"else: {console.unwritten} The same command measures again, without training"
        )
    else:
        wrong = "the run ended without a report; run the same command again"
    return replace(shown, exit_code=FAILED, error=wrong)


class WrittenPage(NamedTuple):
    """The page about a run."""

    place: str
    html: str


def write_page(job: JobConfig, console: Console) -> WrittenPage | None:
    """Write the page about a run beside its checkpoints; None, and a warning, where that fails."""
    try:
        store = open_store(paths.runs_uri(job), job.store)
        html = make_page([read_story(store, job.run)])
        return WrittenPage(put_page(store, job.run, html), html)
    except Exception as error:  # what is trained to its end does not fail by a picture of it
        console.note(f"warning: there is no page about the run: {type(error).__name__}: {error}")
        return None


def complete(
    job: JobConfig,
    console: Console,
    report: EvaluationReport | None,
    *,
    page: WrittenPage | None,
) -> Outcome:
    """Answer with the results of a complete run, and with what to do next.

    Args:
        job: The configuration.
        console: What was heard of the run.
        report: What its end has; without one, that which could not be written is shown.
        page: The page about it; None if it could not be written.
    """
    hint = tracking_ui_hint(job, run_id=console.tracked)
    figures = report or console.figures
    lines = [] if page is None else [f"read the report: {page.place}"]
    lines += [f"look at the run: {hint}", *_next_steps(job)]
    text = "\n".join(["", *map(visible, lines)])
    place = None if page is None else page.place
    values = {**_values(job, console, "complete"), "look_at_it": hint, "report": place}
    if figures is not None:
        table, places = _summary(job, figures, times=console.times, written=report is not None)
        text = f"{table}\n{text}"
        values |= {**places, "figures": figures.metrics()}
    return Outcome(text, values)


def _next_steps(job: JobConfig) -> list[str]:
    """Say what a complete run is good for."""
    words = [f"checkpoint={paths.run_uri(job)}"]
    if job.store.endpoint_url is not None:
        words.append(f"store.endpoint_url={job.store.endpoint_url}")
    steps = [
        f"draw more samples: {typed('trainer.sample', python=sys.executable)} {shlex.join(words)}"
    ]
    if job.optim.decay == "constant":  # other schedules end with the run
        longer = 2 * job.train.total_images
        steps.append(f"train it further: the same command with train.total_images={longer}")
    return steps


def _values(job: JobConfig, console: Console, outcome: str) -> dict[str, Any]:
    return {
        "run": job.run,
        "uri": paths.run_uri(job),
        "outcome": outcome,
        "images": console.images,
        "checkpoint": console.last_checkpoint or None,
        "mlflow_run_id": console.tracked or None,
        "time_s": console.times.total,
    }


def _add_time(job: JobConfig, report: EvaluationReport, time: RunTime) -> EvaluationReport:
    """Write into the report what the run's time was spent on, which its workers did not know."""
    store = open_store(paths.runs_uri(job), job.store)
    whole = replace(report, time=time)
    store.put(evaluation_key(job.run, report.images, "report.json"), whole.to_json())
    return whole


_INTERRUPTED_S = 3.0


def _track(
    job: JobConfig,
    console: Console,
    *,
    status: str | None = None,
    reason: str = "",
    documents: Mapping[str, str] | None = None,
    patience_s: float | None = None,
) -> None:
    """Tell MLflow what the workers, which are gone, could not: time, and how they ended."""
    if not console.identity:
        return
    total = console.times.total
    add_to_run(
        job,
        open_store(paths.runs_uri(job), job.store),
        token=console.token,
        identity=console.identity,
        figures={} if total is None else time_metrics(total),
        images=console.images,
        status=status,
        reason=reason,
        documents=documents,
        patience_s=patience_s,
    )


def _tell_time(
    job: JobConfig, console: Console, *, status: str | None = None, reason: str = ""
) -> None:
    _track(job, console, status=status, reason=reason)
    if console.times.total is not None:
        console.note(f"time: {time_line(console.times.total)}")


def how_to_go_on(job: JobConfig, console: Console) -> str:
    """Say what continues the run from where it is saved."""
    if not console.last_checkpoint:
        return "nothing is saved yet, so the same command begins anew"
    if job.resume == "never":
        return (
            "run the same command without resume=never, which insists on a new run, to continue "
            f"{console.last_checkpoint}"
        )
    return f"run the same command again to continue {console.last_checkpoint}"


def _report_unsaved(console: Console) -> str:
    if not console.failed_saves:
        return ""
    images, reason = max(console.failed_saves.items())
    count = len(console.failed_saves)
    return (
        f"{count} checkpoint{'s' * (count > 1)} of this launch could not be saved, the "
        f"last after {images:,} images: {reason}"
    )
