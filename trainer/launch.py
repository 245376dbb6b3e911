"""The command: compose the configuration, check everything, run the job, show what came out."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import yaml

from pipelines.console import SayingHandler, say
from trainer.checkpoint.errors import CheckpointError, StoreError
from trainer.composition import composed, members
from trainer.data import with_classes
from trainer.mistakes import is_users_mistake
from trainer.placing import resolve_placement
from trainer.schema import JobConfig, to_dict
from trainer.validate import validate

_DESCRIPTION = """\
Train LapFlow: compose an experiment, check it, run it on Ray workers, evaluate it.

  python -m trainer.launch +exp=digits                 train on real images in minutes, on a laptop
  python -m trainer.launch +exp=digits train.seed=1 run=digits-1
  python -m trainer.launch +exp=imagenet_xl dry_run=true    what XL costs, before anything starts
  ray job submit --working-dir . -- python -m trainer.launch +exp=digits

Run the same command again and the run goes on from its newest valid checkpoint."""

_EPILOG = """\
common settings (every key is listed by --cfg job):
  run=NAME                     name of the run; the default is the experiment's
  resume=auto|never|URI        continue it, insist on a new one, or start from a checkpoint
  dry_run=true                 print the configuration and its cost, then stop
  train.total_images=N         length of the run; train.global_batch=N, train.seed=N
  model=xl_2 data=... optim=...   another member of a group under configs/
  cluster.workers=N            one worker per device; cluster.backend=local runs without Ray
  store.uri=s3://BUCKET/PREFIX store.endpoint_url=http://HOST:PORT
                               where shards, checkpoints and results are; credentials come from
                               the usual AWS places
  tracking.uri=http://HOST:5000   an MLflow server instead of a file under home
  home=FOLDER                  local files; default $LAPFLOW_HOME or ~/lapflow

exit codes: 0 done, 1 failed, 2 refused before it began, 3 went to its end or was stopped but
checkpoints could not be saved, 130 or 143 stopped by a signal, its last state saved"""

_FAILED, _REFUSED, _UNSAVED = 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        handlers=[SayingHandler()],
    )
    try:
        job = with_classes(composed(options.overrides))
        validate(job)
        if options.cfg or job.dry_run:
            say(described(job))
            return 0
        return _launch(job)
    except (ValueError, CheckpointError) as error:
        if not is_users_mistake(error) and not isinstance(error, CheckpointError):
            raise
        say(f"error: {error}", to=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def described(job: JobConfig) -> str:
    """Return the configuration as YAML, with what it costs as comments below."""
    from trainer.cost_table import cost_table

    table = "\n".join(f"# {line}" for line in cost_table(job).splitlines())
    return f"{yaml.safe_dump(to_dict(job), sort_keys=False)}\n{table}"


def _launch(job: JobConfig) -> int:
    from cluster.contract import ClusterUnavailable
    from cluster.failure import WorkerFailed
    from cluster.launcher import run
    from trainer import places
    from trainer.preflight import preflight
    from trainer.summary import Console, summary
    from trainer.worker import train_worker

    began = time.monotonic()
    console = Console()
    console.note(f"run {job.run}: {places.run_uri(job)}")
    newest = preflight(job, note=console.note)
    complete = newest is not None and newest.images >= job.train.total_images
    if complete and (table := summary(job, seconds=0.0)) is not None:
        console.note("this run is complete; train.total_images=N makes it longer")
        say(table)
        return 0

    with _stop_on_signals() as (stop, received):
        try:
            outcome = run(
                job.cluster,
                train_worker,
                to_dict(job),
                on_message=console.message,
                stop=stop,
                kept_together=resolve_placement(job).unit,
            )
        except (WorkerFailed, ClusterUnavailable) as error:
            say(f"error: {error}", to=sys.stderr)
            if console.last_checkpoint:
                say(f"run the same command again to continue from {console.last_checkpoint}")
            return _REFUSED if isinstance(error, ValueError) and not console.begun else _FAILED
        stopped = outcome.status == "stopped" and not console.finished
        if stopped:
            place = console.last_checkpoint or "from the beginning"
            console.note(f"stopped; run the same command again to continue {place}")
        table = None
        if not stopped:
            try:
                table = summary(job, seconds=time.monotonic() - began)
            except StoreError as error:
                console.note(f"warning: the results cannot be shown: {error}")
    if table is not None:
        say(table)
    if console.failed_saves:
        images, reason = max(console.failed_saves.items())
        count = len(console.failed_saves)
        say(
            f"error: {count} checkpoint{'s' * (count > 1)} of this launch could not be saved, the "
            f"last after {images:,} images: {reason}",
            to=sys.stderr,
        )
        return _UNSAVED
    if stopped:
        return 128 + (received[0] if received else signal.SIGINT)
    if table is None:
        say("error: the run ended without a report; run the same command again", to=sys.stderr)
        return _FAILED
    return 0


@contextmanager
def _stop_on_signals() -> Iterator[tuple[threading.Event, list[int]]]:
    """Turn the first SIGINT or SIGTERM into a stop request and the second into an interrupt.

    Yields:
        The request, and the number of the signal once there was one. After the block the signals
        do what they did before.
    """
    stop = threading.Event()
    received: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("stopping after a final checkpoint; once more ends at once")
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.launch",
        description=_DESCRIPTION,
        epilog=f"{_experiments()}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="+exp=NAME | key=value")
    parser.add_argument(
        "--cfg", choices=["job"], help="print the resolved configuration and its cost, then stop"
    )
    return parser


def _experiments() -> str:
    text = f"experiments: {', '.join(members('exp'))}"
    return textwrap.fill(text, width=100, subsequent_indent="  ", break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
