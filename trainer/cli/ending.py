"""What the user sees: progress while a job runs, its results, and how it ended."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from pipelines.console import say, say_error, visible
from pipelines.errors import DataError
from pipelines.formats import format_duration, format_table
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import JobConfig
from trainer.config.reading import to_dict
from trainer.data.splits import open_images
from trainer.evaluation.reports import EvaluationReport, evaluation_key
from trainer.log_lines import was_shown
from trainer.metrics.mlflow_backend import end_run
from trainer.storage.errors import StoreError
from trainer.storage.kept import read_or_set_aside
from trainer.storage.open import open_store
from trainer.training.tracking import tracking_ui_hint

logger = logging.getLogger(__name__)


class Console:
    """Prints notes and the workers' messages.

    Attributes:
        last_checkpoint: URI of the newest checkpoint heard of, or "".
        finished: Whether the workers said that the run reached its end.
        begun: Whether training has made progress in this launch.
        failed_saves: Why checkpoints could not be saved, by images.
        unmeasured: Why the samples could not be measured at the end, or "".
        unwritten: Why the report could not be written, or "".
        figures: What that report tells; None if it was written.
        tracked: MLflow's ID of the run, or "" as long as it is unknown.
    """

    def __init__(self) -> None:
        self.last_checkpoint = ""
        self.finished = False
        self.begun = False
        self.failed_saves: dict[int, str] = {}
        self.unmeasured = ""
        self.unwritten = ""
        self.figures: EvaluationReport | None = None
        self.tracked = ""

    def note(self, text: str) -> None:
        """Print a line."""
        say(visible(text))

    def page(self, text: str) -> None:
        """Print lines that are laid out, in which what comes from outside is visible."""
        say(text)

    def message(self, message: Mapping[str, Any]) -> None:
        """Show what a worker told."""
        match message.get("kind"):
            case "progress":
                self.begun = True
                self.note(str(message["text"]))
            case "note":
                self.note(str(message["text"]))
            case "phase":
                logger.info("%s", message["text"])
            case "warning":
                self._warn(str(message["text"]), rank=message.get("rank"))
            case "checkpoint":
                self.last_checkpoint = str(message["uri"])
                # It was given up before, perhaps by workers that were started again since.
                self.failed_saves.pop(int(message["images"]), None)
                self.note(f"checkpoint: {message['uri']}")
            case "checkpoint_failed":
                self.failed_saves[int(message["images"])] = str(message["text"])
                self.note(f"warning: {message['uri']} could not be saved: {message['text']}")
            case "resumed":
                self.last_checkpoint = str(message["uri"])
                self.note(f"resumed after {message['images']:,} images from {message['uri']}")
            case "unmeasured":
                self.unmeasured = str(message["text"])
            case "unwritten":
                self.unwritten = str(message["text"])
                self.figures = EvaluationReport.from_json(str(message["report"]).encode())
            case "tracked":
                self.tracked = str(message["run_id"])
            case "end":
                self.finished = message["end"] == "finished"

    def _warn(self, text: str, *, rank: int | None) -> None:
        # The workers meet again what the checks before the start have met and told.
        if not was_shown(text):
            self.note(f"warning: {text}" if rank is None else f"warning: worker {rank}: {text}")


def final_report(job: JobConfig) -> EvaluationReport | None:
    """Read what was measured at the end of a run; None if that is still to do.

    A report that cannot be believed is put aside with a warning. One of other `eval` settings, of
    another checkpoint or of other held-out images tells nothing.

    Args:
        job: The configuration.

    Raises:
        StoreError: The store fails.
        DataError: The held-out images are missing or out of reach.
    """
    store = open_store(paths.runs_uri(job), job.store)
    newest = CheckpointReader(store, run=job.run).newest_valid()
    if newest is None:
        return None
    key = evaluation_key(job.run, newest.images, "report.json")
    report = read_or_set_aside(store, key, EvaluationReport)
    if report is None or report.settings != to_dict(job.eval):
        return None
    told, held_out = report.origin, open_images(job, "test").digest
    wanted = (job.run, newest.attempt, held_out)
    if (told.run, told.attempt, told.held_out_index) == wanted:
        return report
    logger.warning(
        "%s tells of another checkpoint or of other held-out images, so it is measured again",
        store.uri(key),
    )
    return None


def summary(
    job: JobConfig, report: EvaluationReport, *, seconds: float, written: bool = True
) -> str:
    """Render the closing table of a complete run.

    Args:
        job: The configuration.
        report: What was measured at its end.
        seconds: Wall time of this launch; 0 leaves it out.
        written: Whether the samples are in the store.
    """
    store = open_store(paths.runs_uri(job), job.store)

    def place(name: str) -> str:
        return store.uri(evaluation_key(job.run, report.images, name))

    rows = [
        (
            "run",
            f"{job.run}, {report.images:,} images"
            + (f", {format_duration(seconds)} in this launch" if seconds else ""),
        ),
        *(
            [("samples", place("samples.npz")), ("sample grid", place("grid.png"))]
            if written
            else []
        ),
        ("checkpoint", store.uri(f"{job.run}/checkpoints/{report.images:012d}")),
        (
            f"Fréchet distance ({report.features})",
            f"{report.frechet:.4f} of {report.samples:,} samples to {_held_out(report)} "
            f"({report.network_evaluations:g} network evaluations per sample)",
        ),
        ("  real halves / untrained", _references(report)),
    ]
    if report.labels is not None:
        rows.append(
            (
                "classifier reads the label",
                f"{report.labels.samples:.1%} of samples, {report.labels.held_out:.1%} of held-out "
                "images",
            )
        )
    return format_table(rows)


def _held_out(report: EvaluationReport) -> str:
    counted = "" if report.real_images is None else f"{report.real_images:,} "
    unusable = report.unusable_real_images
    more = f" ({unusable:,} more cannot be used)" if unusable else ""
    return f"{counted}held-out images{more}"


def _references(report: EvaluationReport) -> str:
    """Say what the distance has to be compared with."""
    halves, gap = report.frechet_real_halves, report.gap_closed
    if halves is None or gap is None:
        return f"too few held-out images for halves / {report.frechet_untrained:.4f}"
    reached = (
        f"{gap:.1%} of the gap closed" if gap <= 1 else "below that of halves (docs/evaluate.md)"
    )
    return f"{halves:.4f} / {report.frechet_untrained:.4f}: {reached}"


FAILED, REFUSED, UNSAVED = 1, 2, 3


def failed(job: JobConfig, console: Console, error: Exception) -> int:
    """Say why the workers could not go on, and whether the same command can.

    Args:
        job: The configuration.
        console: What was heard of the run.
        error: A ValueError is a mistake in what was asked for, which would be met again.

    Returns:
        The exit code.
    """
    if console.tracked:
        end_run(job.tracking, str(paths.home(job)), console.tracked, "FAILED")
    tail = getattr(error, "traceback_tail", "")
    say_error(str(error).removesuffix(f"\n{tail}") if tail else error)
    if tail and not isinstance(error, ValueError):
        say("\n".join(f"  {visible(line)}" for line in tail.split("\n")), to=sys.stderr)
    if isinstance(error, ValueError):
        if console.last_checkpoint:
            say(f"the run's last checkpoint is {console.last_checkpoint}")
        return FAILED if console.begun else REFUSED
    if console.last_checkpoint:
        say(f"once the cause is gone, {how_to_go_on(job, console)}")
    return FAILED


def interrupted(job: JobConfig, console: Console) -> None:
    """Have MLflow know that the workers were ended at once."""
    if console.tracked:
        end_run(job.tracking, str(paths.home(job)), console.tracked, "KILLED")


def stopped(job: JobConfig, console: Console, *, signal_number: int) -> int:
    """Say how a run goes on that was asked to stop, and return the exit code.

    Args:
        job: The configuration.
        console: What was heard of the run.
        signal_number: What asked.
    """
    console.note(f"stopped; {how_to_go_on(job, console)}")
    console.note(f"look at the run: {tracking_ui_hint(job)}")
    return _unsaved(console) or 128 + signal_number


def done(job: JobConfig, console: Console, *, seconds: float) -> int:
    """Show the results of a run that went to its end, and return the exit code.

    Args:
        job: The configuration.
        console: What was heard of the run.
        seconds: Wall time of this launch.
    """
    report = None
    try:
        report = final_report(job)
    except (StoreError, DataError) as error:
        console.note(f"warning: the results cannot be shown: {error}")
    if report is not None:
        console.page(summary(job, report, seconds=seconds))
    elif console.figures is not None:
        console.page(summary(job, console.figures, seconds=seconds, written=False))
    console.page(f"\nlook at the run: {visible(tracking_ui_hint(job))}")
    if code := _unsaved(console):
        return code
    if console.unmeasured:
        say_error(
            f"the run is trained to its end ({console.last_checkpoint}), but its samples could not "
            f"be measured: {console.unmeasured}"
        )
        return FAILED
    if report is None and console.unwritten:
        say(
            f"error: the run is trained to its end ({console.last_checkpoint}), but its report "
            f"could not be written, so that its figures stand above and nowhere else: "
            f"{console.unwritten} The same command measures again, without training",
            to=sys.stderr,
        )
        return FAILED
    if report is None:
        say_error("the run ended without a report; run the same command again")
        return FAILED
    return 0


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


def _unsaved(console: Console) -> int:
    if not console.failed_saves:
        return 0
    images, reason = max(console.failed_saves.items())
    count = len(console.failed_saves)
    say_error(
        f"{count} checkpoint{'s' * (count > 1)} of this launch could not be saved, the "
        f"last after {images:,} images: {reason}"
    )
    return UNSAVED
