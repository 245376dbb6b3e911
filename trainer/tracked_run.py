"""A training run as MLflow shows it: found or begun, told its settings, and closed in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from trainer import places
from trainer.checkpoint.manifest import Manifest
from trainer.metrics.tracker import Tracker
from trainer.metrics.tracker_mlflow import MlflowTracker
from trainer.metrics.unsent import Point
from trainer.schema import JobConfig, counted, defaults, science_hash, to_dict


@contextmanager
def tracked_run(
    job: JobConfig,
    chosen: Mapping[str, Any],
    *,
    unsent: Sequence[Point],
    tell: Callable[[dict[str, Any]], None],
) -> Iterator[Tracker]:
    """Track a run for the length of a `with` block, which closes the tracker when all went well.

    Args:
        job: The configuration.
        chosen: Its science.
        unsent: Points of its curves that an earlier launch could not send.
        tell: Takes MLflow's ID of the run for the driver, which outlives this process.

    Yields:
        The tracker; a failure of the block ends the run as FAILED.
    """
    tracker = MlflowTracker(
        job.tracking,
        home=str(places.home(job)),
        run=job.run,
        identity=f"{places.run_uri(job)} {science_hash(chosen)}",
        opened=lambda run_id: tell({"kind": "tracked", "run_id": run_id}),
    )
    try:
        lasting = counted(chosen)
        tracker.config(
            to_dict(job),
            lasting=lasting,
            present=_chosen_beside(lasting, to_dict(job), defaults()),
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
    """
    unsent = [Point.from_json(each) for each in complete.train_state.get("unsent_points", [])]
    if not unsent:
        return
    with tracked_run(job, complete.science, unsent=unsent, tell=lambda _: None) as tracker:
        tracker.metrics(figures, images=complete.images)
        tracker.close("FINISHED")


def _chosen_beside(
    lasting: Mapping[str, Any], settings: Mapping[str, Any], usual: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings that are not among the lasting ones, where they are not as usual."""
    beside: dict[str, Any] = {}
    for key, value in settings.items():
        fixed, default = lasting.get(key, {}), usual.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if part := _chosen_beside(fixed, value, default):
                beside[key] = part
        elif key not in lasting and value != default:
            beside[key] = value
    return beside
