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
from typing import TYPE_CHECKING

from pipelines.command import REFUSED, CommandParser, Outcome, command_parser
from pipelines.console import say, write
from trainer.cli.command import parse_settings, run_logged
from trainer.cli.settings_page import ExplainAction, commented_yaml
from trainer.config.groups import check_members, members

if TYPE_CHECKING:
    from trainer.config.job import JobConfig

_DESCRIPTION = """\
Train LapFlow: compose an experiment, check it, run it on Ray workers, evaluate it.

  python -m trainer.launch +exp=digits                 train on real images in minutes, on a laptop
  python -m trainer.launch +exp=digits train.seed=1 run=digits-1
  python -m trainer.launch +exp=imagenet_xl dry_run=true    what XL costs, before anything starts
  ray job submit --working-dir . -- python -m trainer.launch +exp=digits

Run the same command again and the run goes on from its newest valid checkpoint."""

_EPILOG = """\
common settings (--explain KEY says what a setting, or each of a group, means; --cfg job lists all):
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

_ONE_RUN = """\
--multirun: a launch makes one run; start one after the other, each with a run=NAME of its own: \
for seed in 0 1; do python -m trainer.launch +exp=digits train.seed=$seed run=digits-$seed; done"""

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    return run_logged(lambda words: parse_settings(parser, words), _launch_or_describe, arguments)


def _launch_or_describe(options: argparse.Namespace) -> Outcome:
    if options.multirun:
        return Outcome("", exit_code=REFUSED, error=_ONE_RUN)
    try:
        job = _check(options.overrides)
        if options.cfg or job.dry_run:
            return describe(job, explained=bool(options.cfg))
        return _launch(job)
    except KeyboardInterrupt:
        return Outcome("", {"outcome": "interrupted", "error": "interrupted"}, 128 + signal.SIGINT)


def _check(overrides: Sequence[str]) -> JobConfig:
    """Compose and check the configuration; a name that does not exist costs no heavy import."""
    check_members(overrides)
    from trainer.config.composition import compose_job
    from trainer.data.splits import with_classes
    from trainer.training.validate import validate

    job = with_classes(compose_job(overrides))
    validate(job)
    return job


def describe(job: JobConfig, *, explained: bool = False) -> Outcome:
    """Return the configuration as YAML, with what it costs as comments below.

    Args:
        job: The configuration.
        explained: Put above each setting what it means.
    """
    import yaml

    from trainer.config.reading import to_dict
    from trainer.planning.placing import cost_table

    costs = cost_table(job)
    table = "\n".join(f"# {line}" for line in costs.splitlines())
    values = to_dict(job)
    text = f"{yaml.safe_dump(values, sort_keys=False)}\n{table}"
    if explained:
        text = f"{commented_yaml(type(job), values)}\n\n{table}"
    return Outcome(text, {"configuration": values, "costs": costs.splitlines()})


def _launch(job: JobConfig) -> Outcome:
    from trainer.config import paths

    say(f"run {job.run}: {paths.run_uri(job)}")
    logger.info("loading libraries")
    from cluster.contract import ClusterUnavailable
    from cluster.failure import WorkerFailed
    from cluster.launcher import run
    from trainer.cli import ending
    from trainer.cli.ending import Console
    from trainer.config.reading import to_dict
    from trainer.planning.placing import resolve_placement
    from trainer.training.preflight import preflight
    from trainer.training.tracking import send_unsent
    from trainer.training.worker import train_worker

    began = time.monotonic()
    console = Console()
    newest = preflight(job, report=console.note)
    complete = newest is not None and newest.images >= job.train.total_images
    if newest is not None and complete and (report := ending.final_report(job)) is not None:
        console.note("this run is complete; train.total_images=N makes it longer")
        send_unsent(job, newest, report.metrics())
        return ending.complete(job, console, report, seconds=0.0)

    with _stop_on_signals() as (stop, received):
        logger.info("starting %d workers on %s", job.cluster.workers, job.cluster.backend)
        try:
            outcome = run(
                job.cluster,
                train_worker,
                to_dict(job),
                on_message=console.message,
                report=console.note,
                stop=stop,
                group_size=resolve_placement(job).unit,
            )
        except (WorkerFailed, ClusterUnavailable) as error:
            return ending.end_failed(job, console, error)
        except KeyboardInterrupt:
            ending.end_interrupted(job, console)
            raise
        if outcome.status == "stopped" and not console.finished:
            number = received[0] if received else signal.SIGINT
            return ending.end_stopped(job, console, signal_number=number)
        return ending.end_finished(job, console, seconds=time.monotonic() - began)


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
        write("stopping after a final checkpoint; once more ends at once", sys.stdout)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> CommandParser:
    parser = command_parser(
        "trainer.launch", description=_DESCRIPTION, epilog=f"{_experiments()}\n\n{_EPILOG}"
    )
    parser.add_argument("overrides", nargs="*", metavar="+exp=NAME | key=value")
    parser.add_argument(
        "--cfg",
        choices=["job"],
        help="print every setting with its meaning and value, and what the job costs, then stop",
    )
    parser.add_argument("--explain", action=ExplainAction, kind=_job_config)
    parser.add_argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)
    return parser


def _job_config() -> type[JobConfig]:
    from trainer.config.job import JobConfig

    return JobConfig


def _experiments() -> str:
    text = f"experiments: {', '.join(members('exp'))}"
    return textwrap.fill(text, width=100, subsequent_indent="  ", break_on_hyphens=False)
