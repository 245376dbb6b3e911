"""A run as MLflow shows it: found or begun, told its settings and saves, and closed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.console import typed
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.upload import SaveReport
from trainer.config import paths
from trainer.config.job import JobConfig, fingerprinted
from trainer.config.reading import defaults, to_dict
from trainer.data.splits import Split
from trainer.metrics.history import keep_history
from trainer.metrics.journal import JournalPlace, identities, recorded_address
from trainer.metrics.mlflow_backend import (
    PORT,
    TrackerUnreachable,
    cause,
    check_tracker,
    page,
    tracking_uri,
)
from trainer.metrics.mlflow_run import TrackedSweep
from trainer.metrics.mlflow_tracker import MlflowTracker, TrackedRun
from trainer.metrics.tracker import Point, Tracker, TrackingConfig
from trainer.storage.errors import LeaseLost, SupersededAttempt
from trainer.storage.lease import Lease
from trainer.storage.store import Store
from trainer.training.resume import Restored, SavedCounters
from trainer.training.run_page import about_run, describe_run

_ALWAYS_TOLD = (
    *(("data", "name"), ("model", "depth"), ("model", "width"), ("flow", "scales")),
    *(("optim", "learning_rate"), ("train", "global_batch"), ("train", "seed")),
)
"""Settings that are parameters in MLflow also where they are the defaults."""
_DRIVER = "driver"  # comes after the numbers of a launch's attempts


@contextmanager
def track_run(
    job: JobConfig,
    chosen: Mapping[str, Any],
    *,
    restored: Restored,
    store: Store,
    writer: str,
    images: Split,
    origin: Mapping[str, str],
    device: torch.device,
    report: Callable[[dict[str, Any]], None],
) -> Iterator[Tracker]:
    """Track a run for the length of a `with` block, which closes the tracker when all went well.

    Args:
        job: The configuration.
        chosen: Its science.
        restored: Where the run goes on.
        store: Where runs are kept.
        writer: This attempt's number among all of the run.
        images: What it is trained on.
        origin: What the launch comes from, as `origin_of` tells it.
        device: What the first rank computes on.
        report: Takes for the driver, which outlives this process, by what the run is found.

    Yields:
        The tracker; a failure of the block ends the run as FAILED, unless it is another's by now.
    """
    tracked = _tracked(job, store, identity_of(job, restored.fingerprint))
    told = {"kind": "tracked", "identity": tracked.identity}
    report(told)

    def opened(run_id: str) -> None:
        report({**told, "run_id": run_id})

    tracker = MlflowTracker(job.tracking, tracked, writer=writer, opened=opened)
    try:
        tracker.begin()
        _tell_settings(tracker, job, chosen)
        describe_run(tracker, job, restored.fingerprint, images=images, origin=origin)
        with keep_history(
            tracker,
            store,
            run=job.run,
            writer=writer,
            identity=tracked.identity,
            about=about_run(job, origin=origin, images=len(images), device=device),
            settings=to_dict(job),
            science=fingerprinted(chosen),
            began_images=restored.state.images,
        ) as kept:
            for point in restored.unsent:
                kept.metrics(point.values, images=point.images)
            yield kept
    except (LeaseLost, SupersededAttempt):
        tracker.flush(is_last=False)  # how the run is now is for whoever trains it to say
        raise
    except BaseException as error:
        tracker.close("FAILED", f"{type(error).__name__}: {cause(error)}")
        raise


def _tell_settings(tracker: MlflowTracker, job: JobConfig, chosen: Mapping[str, Any]) -> None:
    settings, science, usual = to_dict(job), fingerprinted(chosen), defaults(JobConfig)
    tracker.config(
        settings,
        lasting=_told_science(science, usual),
        present=_unusual_settings(science, settings, usual),
    )


def identity_of(job: JobConfig, fingerprint: str) -> str:
    """Tell a training from every other by its place and the science with which it began."""
    text = f"{paths.run_uri(job)} {fingerprint}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def track_sweep(
    job: JobConfig, sweep: str, store: Store, *, token: int, opened: Callable[[str], None]
) -> MlflowTracker:
    """Return the tracker of a sweep, below whose run MLflow shows those that it makes.

    Args:
        job: The configuration of one of its runs.
        sweep: Its name.
        store: Where sweeps are kept.
        token: Number of this launch of the sweep.
        opened: Takes MLflow's ID of the sweep's run, once that is known.
    """
    identity = _sweep_identity(job, sweep)
    home = paths.home(job)
    tracked = TrackedRun(
        name=sweep,
        place=paths.sweep_uri(job, sweep),
        identity=identity,
        journal=JournalPlace.of(home, store, run=sweep, identity=identity),
        home=str(home),
    )
    writer = f"{token:012d}-{_DRIVER}"
    return MlflowTracker(job.tracking, tracked, writer=writer, opened=opened)


def _sweep_identity(job: JobConfig, sweep: str) -> str:
    return hashlib.sha256(paths.sweep_uri(job, sweep).encode()).hexdigest()[:32]


def _tracked(job: JobConfig, store: Store, identity: str) -> TrackedRun:
    home = paths.home(job)
    name = job.tracking.sweep
    return TrackedRun(
        name=job.run,
        place=paths.run_uri(job),
        identity=identity,
        journal=JournalPlace.of(home, store, run=job.run, identity=identity),
        home=str(home),
        sweep=None if name is None else TrackedSweep(name, _sweep_identity(job, name)),
    )


def add_to_run(
    job: JobConfig,
    store: Store,
    *,
    token: int,
    identity: str,
    figures: Mapping[str, float],
    images: int,
    status: str | None = None,
    reason: str = "",
    documents: Mapping[str, str] | None = None,
    patience_s: float | None = None,
) -> None:
    """Tell MLflow what the driver knows once the workers are gone, after what those have left.

    Args:
        job: The configuration.
        store: Where runs are kept.
        token: Number of the launch.
        identity: The training's.
        figures: Metrics of the whole run so far, which have the last word.
        images: Their position of the run.
        status: How the run ended, if its workers could not say so.
        reason: Why.
        documents: Files about the run, by their names among its artifacts.
        patience_s: How long to wait for MLflow; None is as configured.
    """
    writer = f"{token:012d}-{_DRIVER}"
    config = job.tracking
    if patience_s is not None:
        config = replace(config, flush_timeout_s=min(config.flush_timeout_s, patience_s))
    tracker = MlflowTracker(config, _tracked(job, store, identity), writer=writer)
    if figures:
        tracker.totals(figures, images=images)
    for name, html in (documents or {}).items():
        tracker.report(name, html)
    if status is not None:
        tracker.end(status, reason, if_running=True)
    tracker.flush()


def is_waiting(job: JobConfig, complete: Manifest, *, store: Store) -> bool:
    """Tell whether the journal of a complete run holds anything still.

    A launch looks more closely: what MLflow had not taken when the last checkpoint was saved it may
    have since, which its journal would not tell if it was lost with its disk.

    Args:
        job: The configuration.
        complete: The run's last checkpoint.
        store: Where runs are kept.

    Raises:
        StoreError: The store fails.
    """
    identity = identity_of(job, complete.config_fingerprint)
    return bool(_tracked(job, store, identity).journal.names())


def has_unsent(job: JobConfig, complete: Manifest, *, store: Store) -> bool:
    """Tell whether MLflow has not taken all when a run was complete.

    Args:
        job: The configuration.
        complete: The run's last checkpoint.
        store: Where runs are kept.

    Raises:
        InvalidManifest: The checkpoint holds something else than points.
        StoreError: The store fails.
    """
    tracked = _tracked(job, store, identity_of(job, complete.config_fingerprint))
    return bool(SavedCounters.of(complete).unsent or tracked.journal.names())


def send_unsent(
    job: JobConfig, complete: Manifest, figures: Mapping[str, float], *, store: Store, token: int
) -> None:
    """Send what MLflow had not taken when a run was complete.

    Args:
        job: The configuration.
        complete: The run's last checkpoint.
        figures: What its evaluation measured, by names that tell the protocol.
        store: Where runs are kept.
        token: Number of this launch.

    Raises:
        InvalidManifest: The checkpoint holds something else than points.
    """
    tracked = _tracked(job, store, identity_of(job, complete.config_fingerprint))
    tracker = MlflowTracker(job.tracking, tracked, writer=f"{token:012d}-{_DRIVER}")
    points = (*SavedCounters.of(complete).unsent, Point(complete.images, dict(figures)))
    for point in points:
        tracker.metrics(point.values, images=point.images)
    tracker.close("FINISHED")


class Shipped(NamedTuple):
    """What became of the journal of one training.

    Attributes:
        uri: Where it went.
        entries: How many entries MLflow has now.
        is_whole: Whether that is all.
    """

    uri: str
    entries: int
    is_whole: bool


def ship(
    store: Store,
    lease: Lease,
    *,
    place: str,
    home: Path,
    to: TrackingConfig,
    experiment: str | None,
) -> list[Shipped]:
    """Send what processes of a run, which are gone, have left to tell.

    Args:
        store: Where runs are kept.
        lease: The hold on the run.
        place: The run's place.
        home: Folder of this machine that holds its journal.
        to: Where to and how long; without an address, where it was to go.
        experiment: The MLflow experiment; None is the recorded one.

    Raises:
        StoreError: The store fails.
    """
    shipped, run = [], lease.run
    for identity in identities(home, store, run=run):
        journal = JournalPlace.of(home, store, run=run, identity=identity)
        told = recorded_address(journal)
        config = replace(
            to,
            uri=to.uri or told.get("uri"),
            experiment=experiment or told.get("experiment", to.experiment),
        )
        tracked = TrackedRun(
            name=run,
            place=told.get("place", place),
            identity=identity,
            journal=journal,
            home=str(home),
            sweep=TrackedSweep(told["sweep"], told.get("sweep_identity", ""))
            if "sweep" in told
            else None,
        )
        tracker = MlflowTracker(config, tracked, writer=f"{lease.token:012d}-{_DRIVER}")
        # Whoever would end it is gone.
        tracker.end("KILLED", "its processes ended without a word", if_running=True)
        is_whole = tracker.flush() and not journal.names()
        shipped.append(Shipped(tracking_uri(config, str(home)), tracker.arrived, is_whole))
    return shipped


def _unusual_settings(
    lasting: Mapping[str, Any], settings: Mapping[str, Any], usual: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings that are not among the lasting ones, where they are not as usual."""
    beside: dict[str, Any] = {}
    for key, value in settings.items():
        fixed, default = lasting.get(key, {}), usual.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            fixed = fixed if isinstance(fixed, Mapping) else {}
            if part := _unusual_settings(fixed, value, default):
                beside[key] = part
        elif key not in lasting and value != default:
            beside[key] = value
    return beside


def _told_science(lasting: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a training from others.

    MLflow's pages write all parameters of a run above each of its pictures, and a hundred of them
    push the picture out of sight.
    """
    told = {group: {} for group in lasting} | _unusual_settings({}, lasting, usual)
    for group, name in _ALWAYS_TOLD:
        told[group][name] = lasting[group][name]
    del told["data_set"]  # of which the page has more than the digest
    return told


def tracking_ui_hint(job: JobConfig, *, run_id: str = "") -> str:
    """Say how the pages of the job's runs are opened; asks MLflow which they are.

    Args:
        job: The configuration.
        run_id: MLflow's ID of the run, whose own page is opened if it is known.
    """
    home = str(paths.home(job))
    uri = tracking_uri(job.tracking, home)
    try:
        experiment = check_tracker(job.tracking, home)
    except TrackerUnreachable as error:
        return f"nowhere for now: {error}"
    if uri.startswith("http"):
        return page(uri, experiment, run_id=run_id)
    words = [typed("trainer.ui", python=sys.executable)]
    words += [f"home={home}"] if job.tracking.uri is None else [f"uri={uri}"]
    if job.tracking.experiment != type(job.tracking).experiment:
        words.append(f"experiment={job.tracking.experiment}")
    address = page(f"http://127.0.0.1:{PORT}", experiment, run_id=run_id)
    return f"{' '.join(words)}   opens {address}"


class CheckpointReporter:
    """Passes on how each save ended.

    Args:
        tracker: Takes where the checkpoint is, what it cost, or why there is none.
        report: Takes the same for the user.
    """

    def __init__(self, tracker: Tracker, report: Callable[[dict[str, Any]], None]) -> None:
        self._tracker = tracker
        self._report = report

    def __call__(self, report: SaveReport) -> None:
        """Pass on one report."""
        name = f"{report.images:012d}"
        saved = {"images": report.images, "uri": report.uri}
        self._tracker.metrics(
            {
                "speed/checkpoint_blocked_s": report.blocked_s,
                "speed/checkpoint_upload_s": report.upload_s,
                "speed/checkpoint_size_gib": report.size_bytes / 2**30,
                "speed/checkpoint_failed": float(report.error is not None),
            },
            images=report.images,
        )
        if report.error is not None:
            self._tracker.tags({f"checkpoint_failed.{name}": report.error})
            self._report({"kind": "checkpoint_failed", "text": report.error, **saved})
            return
        self._tracker.checkpoint(report.uri, images=report.images)
        self._report({"kind": "checkpoint", **saved})
