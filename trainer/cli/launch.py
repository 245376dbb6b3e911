"""The command: compose the configuration, check everything, run the job, show what came out."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING

from pipelines.command import REFUSED, CommandParser, Outcome, command_parser
from pipelines.console import say, write
from trainer.cli.command import parse_settings, run_logged
from trainer.cli.settings_page import ExplainAction, commented_yaml
from trainer.config.groups import check_members, members

if TYPE_CHECKING:
    from cluster.contract import Outcome as ClusterOutcome
    from trainer.cli.console import Console
    from trainer.cli.start_times import StartTimes
    from trainer.config.job import JobConfig
    from trainer.storage.errors import LeaseLost
    from trainer.storage.lease import Lease
    from trainer.storage.store import Store

_DESCRIPTION = """\
Train LapFlow: compose an experiment, check it, run it on Ray workers, evaluate it.

  python -m trainer.launch +exp=digits                 train on real images in minutes, on a laptop
  python -m trainer.launch +exp=digits train.seed=1 run=digits-1
  python -m trainer.launch --multirun +exp=digits train.seed=0,1,2     one run after the other
  python -m trainer.launch +exp=imagenet_xl_latents dry_run=true    what XL costs, before it starts
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
checkpoints could not be saved, 130 or 143 stopped by a signal, or (143) since its node is
taken away, its last state saved"""

_MANY_RUNS = "--jobs and --address are for several runs: give --multirun too"

_SAME_REQUEST_S = 5.0

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    return run_logged(lambda words: parse_settings(parser, words), _launch_or_describe, arguments)


def _launch_or_describe(options: argparse.Namespace) -> Outcome:
    if not options.multirun and (options.jobs is not None or options.address is not None):
        return Outcome("", exit_code=REFUSED, error=_MANY_RUNS)
    try:
        if options.multirun:
            return _sweep(options)
        job = _check(options.overrides)
        if options.cfg or job.dry_run:
            return describe(job, explained=bool(options.cfg))
        if not job.runtime.timing:
            return _launch(job, options.overrides)
        from trainer.cli.start_times import StartTimes

        with StartTimes(say).listening() as start:
            return _launch(job, options.overrides, start)
    except KeyboardInterrupt:
        return Outcome("", {"outcome": "interrupted", "error": "interrupted"}, 128 + signal.SIGINT)


def _check(overrides: Sequence[str]) -> JobConfig:
    """Compose and check the configuration; a name that does not exist costs no heavy import."""
    check_members(overrides)
    from trainer.config.composition import compose_job

    return _checked(compose_job(overrides))


def _checked(job: JobConfig) -> JobConfig:
    from trainer.data.splits import with_classes
    from trainer.training.validate import validate

    job = with_classes(job)
    validate(job)
    return job


def _sweep(options: argparse.Namespace) -> Outcome:
    """Make a run of each of the values that words have."""
    words = options.overrides
    check_members(words, several=True)
    from trainer.cli.sweep import describe_sweep, make_here, plan_sweep, run_sweep

    sweep = plan_sweep(words, check=_checked)
    if options.cfg or sweep.points[0].job.dry_run:
        return describe_sweep(sweep)
    if options.jobs is None and options.address is None:
        return run_sweep(sweep, words, make=make_here(quiet=options.quiet))
    from trainer.cli.sweep_jobs import make_as_jobs  # jobs lack what sends jobs

    make = make_as_jobs(options.jobs or 1, address=options.address)
    return run_sweep(sweep, words, make=make)


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


def _launch(job: JobConfig, words: Sequence[str], start: StartTimes | None = None) -> Outcome:
    from trainer.config import paths

    say(f"run {job.run}: {paths.run_uri(job)}")
    logger.info("loading libraries")
    from cluster.launcher import prepare

    prepare(job.cluster, _warming(job))
    from cluster.contract import ClusterUnavailable
    from cluster.failure import WorkerFailed
    from trainer.cli import ending
    from trainer.cli.console import Console
    from trainer.storage.open import open_store
    from trainer.training.preflight import preflight
    from trainer.training.tracking import has_unsent, send_unsent

    console = Console(start)
    newest = preflight(job, report=console.note)
    store = open_store(paths.runs_uri(job), job.store)
    complete = newest is not None and newest.images >= job.train.total_images
    if newest is not None and complete and (report := ending.final_report(job)) is not None:
        console.note("this run is complete; train.total_images=N makes it longer")
        if has_unsent(job, newest, store=store):
            with _hold(job, store, console, threading.Event(), []) as lease:
                send_unsent(job, newest, report.points(), store=store, token=lease.token)
        return ending.complete(job, console, report, page=ending.write_page(job, console))

    stop = threading.Event()
    lost: list[LeaseLost] = []
    with _hold(job, store, console, stop, lost) as lease, _stop_on_signals(stop) as received:
        console.token = lease.token
        logger.info("starting %d workers on %s", job.cluster.workers, job.cluster.backend)
        try:
            outcome = _run_workers(job, words, console, store, lease=lease, stop=stop)
        except (WorkerFailed, ClusterUnavailable) as error:
            # Workers whose save finds it out before this process does fail by it.
            if taken := _find_loss(store, lease, lost):
                return ending.end_lost(job, console, taken)
            return ending.end_failed(job, console, error)
        except KeyboardInterrupt:
            ending.end_interrupted(job, console)
            raise
        if outcome.status == "stopped" and not console.finished:
            if not received and (taken := _find_loss(store, lease, lost)):
                return ending.end_lost(job, console, taken)
            # Without a signal it was told that its node goes, as by SIGTERM elsewhere.
            number = received[0] if received else signal.SIGTERM
            return ending.end_stopped(job, console, signal_number=number)
        return ending.end_finished(job, console)


def _warming(job: JobConfig) -> Callable[[], None]:
    """What a process that waits to become a worker of this job imports."""
    return warm_up if job.engine.kind_of(job.cluster.workers) == "zero" else warm_up_alone


def warm_up() -> None:
    """Import all that one of several workers needs."""
    from trainer.engine.zero import import_deepspeed

    import_deepspeed()
    warm_up_alone()


def warm_up_alone() -> None:
    """Import all that a worker needs which trains without DeepSpeed."""
    from trainer.metrics.mlflow_backend import import_mlflow

    import_mlflow()
    for module in (
        *("trainer.training.worker", "pipelines.decode.dali"),
        "mlflow.store.tracking.sqlalchemy_store",
    ):
        importlib.import_module(module)


def _run_workers(
    job: JobConfig,
    words: Sequence[str],
    console: Console,
    store: Store,
    *,
    lease: Lease,
    stop: threading.Event,
) -> ClusterOutcome:
    from cluster.launcher import run
    from trainer.config.reading import to_dict
    from trainer.planning.placing import resolve_placement
    from trainer.training.nodes import node_check
    from trainer.training.run_page import origin_of
    from trainer.training.worker import train_worker

    with (
        console.times.closing(store, lease),
        console.lines.kept_in(store, lease),
        console.show_bar(f"training {job.run}", job.train.total_images),
    ):
        return run(
            job.cluster,
            train_worker,
            {"job": to_dict(job), "lease": asdict(lease), "origin": origin_of(words)},
            on_message=console.message,
            report=console.cluster_line,
            listener=console.lines,
            stop=stop,
            group_size=resolve_placement(job).unit,
            fewer=_fewer_workers(job, console),
            check=node_check(job, lease),
            warm_up=_warming(job),
        )


def _fewer_workers(job: JobConfig, console: Console) -> dict[int, int]:
    """Say with how many workers an elastic job goes on, and give those below its own number."""
    from trainer.training.validate import fewer_workers

    fewer = fewer_workers(job)
    if job.cluster.min_workers is not None and job.cluster.backend == "ray":
        counts = ", ".join(map(str, [*fewer, job.cluster.workers]))
        console.note(f"workers: as many as there is room for, of {counts}")
    return fewer


def _hold(
    job: JobConfig, store: Store, console: Console, stop: threading.Event, lost: list[LeaseLost]
) -> AbstractContextManager[Lease]:
    """Hold the run for the length of a `with` block; once it is another's, the workers stop.

    Args:
        job: The configuration.
        store: Where the run is.
        console: Takes what there is to tell.
        stop: Asks the workers to stop.
        lost: Takes the error that tells who has taken the run.
    """
    from trainer.storage.lease import hold_lease

    def beat(lease: Lease) -> None:
        if console.images:
            console.times.add_point(console.images)
        console.times.write(store, lease)

    def end(error: LeaseLost) -> None:
        console.note(f"warning: {error}")
        lost.append(error)
        stop.set()

    return hold_lease(
        store,
        job.run,
        report=console.note,
        on_lost=end,
        on_beat=beat,
    )


def _find_loss(store: Store, lease: Lease, lost: Sequence[LeaseLost]) -> LeaseLost | None:
    """Tell who has taken the run; None if nobody has, or if the store does not tell."""
    from trainer.storage.errors import LeaseLost, StoreError
    from trainer.storage.lease import MAX_ATTEMPTS, Fence

    if lost:
        return lost[0]
    try:
        Fence(store, lease, attempt=MAX_ATTEMPTS).check()
    except LeaseLost as error:
        return error
    except StoreError:
        pass
    return None


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into a stop request and the second into an interrupt.

    A SIGTERM that comes within seconds of another is the same request: Ray and `uv run` each pass
    it on, and so does whoever signals a whole process group.

    Args:
        stop: The request.

    Yields:
        The number of the signal once there was one. After the block the signals do what they did
        before.
    """
    received: list[int] = []
    began = 0.0

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal began
        if received:
            if number == signal.SIGTERM and time.monotonic() - began < _SAME_REQUEST_S:
                return
            raise KeyboardInterrupt
        began = time.monotonic()
        received.append(number)
        write("stopping after a final checkpoint; once more ends at once", sys.stdout)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
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
    parser.add_argument(
        "--events",
        action="store_true",
        help="on standard output a JSON object a line for what happens; the last is the answer",
    )
    parser.add_argument(
        *("-m", "--multirun"),
        action="store_true",
        help="make a run of each value: train.seed=0,1,2 or '+exp=glob(ablation/*)'; what is "
        "complete is not begun again (docs/sweeps.md)",
    )
    parser.add_argument(
        "--jobs",
        type=_count,
        metavar="N",
        help="with --multirun: send the runs to a Ray cluster as jobs, N at a time",
    )
    parser.add_argument(
        "--address",
        metavar="http://HOST:8265",
        help="with --jobs: the job server; else $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or this "
        "machine's",
    )
    return parser


def _count(word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of jobs; give 1 or more")
    return value


def _job_config() -> type[JobConfig]:
    from trainer.config.job import JobConfig

    return JobConfig


def _experiments() -> str:
    text = f"experiments: {', '.join(members('exp'))}"
    return textwrap.fill(text, width=100, subsequent_indent="  ", break_on_hyphens=False)
