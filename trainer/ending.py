"""How a launch ends: its last words, and the code that it leaves with."""

from __future__ import annotations

import sys

from pipelines.console import say, say_error, visible
from pipelines.errors import DataError
from trainer import places
from trainer.checkpoint.errors import StoreError
from trainer.metrics.mlflow_place import end_run
from trainer.pages import where_to_look
from trainer.schema import JobConfig
from trainer.summary import Console, final_report, summary

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
        end_run(job.tracking, str(places.home(job)), console.tracked, "FAILED")
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
        end_run(job.tracking, str(places.home(job)), console.tracked, "KILLED")


def stopped(job: JobConfig, console: Console, *, signal_number: int) -> int:
    """Say how a run goes on that was asked to stop, and return the exit code.

    Args:
        job: The configuration.
        console: What was heard of the run.
        signal_number: What asked.
    """
    console.note(f"stopped; {how_to_go_on(job, console)}")
    console.note(f"look at the run: {where_to_look(job)}")
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
    console.page(f"\nlook at the run: {visible(where_to_look(job))}")
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
