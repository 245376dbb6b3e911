"""A run as MLflow shows it: found or begun, told its settings and saves, and closed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.console import typed
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.upload import SaveReport
from trainer.config import paths
from trainer.config.job import JobConfig, config_fingerprint, fingerprinted
from trainer.config.reading import defaults, to_dict
from trainer.metrics.mlflow_backend import TrackerUnreachable, check_tracker, page, tracking_uri
from trainer.metrics.mlflow_tracker import MlflowTracker
from trainer.metrics.tracker import Point, Tracker
from trainer.training.resume import SavedCounters


@contextmanager
def track_run(
    job: JobConfig,
    chosen: Mapping[str, Any],
    *,
    unsent: Sequence[Point],
    report: Callable[[dict[str, Any]], None],
) -> Iterator[Tracker]:
    """Track a run for the length of a `with` block, which closes the tracker when all went well.

    Args:
        job: The configuration.
        chosen: Its science.
        unsent: Points of its curves that an earlier launch could not send.
        report: Takes MLflow's ID of the run for the driver, which outlives this process.

    Yields:
        The tracker; a failure of the block ends the run as FAILED.
    """
    tracker = MlflowTracker(
        job.tracking,
        home=str(paths.home(job)),
        run=job.run,
        identity=f"{paths.run_uri(job)} {config_fingerprint(chosen)}",
        opened=lambda run_id: report({"kind": "tracked", "run_id": run_id}),
    )
    try:
        lasting = fingerprinted(chosen)
        tracker.config(
            to_dict(job),
            lasting=lasting,
            present=_unusual_settings(lasting, to_dict(job), defaults(JobConfig)),
        )
        for point in unsent:
            tracker.metrics(point.values, images=point.images)
        yield tracker
    except BaseException:
        tracker.close("FAILED")
        raise


def send_unsent(job: JobConfig, complete: Manifest, figures: Mapping[str, float]) -> None:
    """Send what MLflow had not taken when a run was complete, if there is anything.

    Args:
        job: The configuration.
        complete: The run's last checkpoint.
        figures: What its evaluation measured.

    Raises:
        InvalidManifest: The checkpoint holds something else than points.
    """
    unsent = SavedCounters.of(complete).unsent
    if not unsent:
        return
    with track_run(job, complete.science, unsent=unsent, report=lambda _: None) as tracker:
        tracker.metrics(figures, images=complete.images)
        tracker.close("FINISHED")


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


PORT = 5000
"""Where the pages of runs in a local file are shown unless told otherwise."""


def tracking_ui_hint(job: JobConfig) -> str:
    """Say how the pages of the job's runs are opened; asks MLflow which they are."""
    home = str(paths.home(job))
    uri = tracking_uri(job.tracking, home)
    try:
        experiment = check_tracker(job.tracking, home)
    except TrackerUnreachable as error:
        return f"nowhere for now: {error}"
    if uri.startswith("http"):
        return page(uri, experiment)
    words = [typed("trainer.ui", python=sys.executable)]
    words += [f"home={home}"] if job.tracking.uri is None else [f"uri={uri}"]
    if job.tracking.experiment != type(job.tracking).experiment:
        words.append(f"experiment={job.tracking.experiment}")
    return f"{' '.join(words)}   opens {page(f'http://127.0.0.1:{PORT}', experiment)}"


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
                "checkpoint/blocked_s": report.blocked_s,
                "checkpoint/upload_s": report.upload_s,
                "checkpoint/size_gib": report.size_bytes / 2**30,
                "checkpoint/failed": float(report.error is not None),
            },
            images=report.images,
        )
        if report.error is not None:
            self._tracker.tag(f"checkpoint_failed.{name}", report.error)
            self._report({"kind": "checkpoint_failed", "text": report.error, **saved})
            return
        self._tracker.tag("checkpoint", report.uri)
        self._tracker.tag(f"checkpoint.{name}", report.uri)
        self._report({"kind": "checkpoint", **saved})
