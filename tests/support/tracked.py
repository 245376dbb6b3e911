"""A run as its tracker knows it, in a home whose store is a folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow

from trainer.metrics.journal import JournalPlace
from trainer.metrics.mlflow_backend import check_tracker
from trainer.metrics.mlflow_tracker import MlflowTracker, TrackedRun
from trainer.metrics.tracker import TrackingConfig
from trainer.storage.local import LocalStore


def tracked_run(home: Path, *, name: str = "r", identity: str = "0123") -> TrackedRun:
    """Describe a run of a home."""
    store = LocalStore(home / "store" / "runs")
    return TrackedRun(
        name=name,
        place=f"{home}/store/runs/{name}",
        identity=identity,
        journal=JournalPlace.of(home, store, run=name, identity=identity),
        home=str(home),
    )


def open_tracker(
    config: TrackingConfig,
    home: Path,
    *,
    launch: int = 1,
    name: str = "r",
    identity: str = "0123",
) -> MlflowTracker:
    """Begin a tracker, as the first rank of a launch does."""
    run = tracked_run(home, name=name, identity=identity)
    tracker = MlflowTracker(config, run, writer=f"{launch:012d}-00000", gather_s=0.05)
    tracker.begin()
    return tracker


def local_tracker(
    home: Path, empty_tracker: Path, *, launch: int = 1, **changes: Any
) -> MlflowTracker:
    """Begin a tracker over the SQLite file of a home, which is made of an empty one."""
    config = TrackingConfig(flush_timeout_s=60, **changes)
    if not (home / "mlflow.db").exists():
        shutil.copy(empty_tracker, home / "mlflow.db")
    check_tracker(config, str(home))
    return open_tracker(config, home, launch=launch)


def local_client(home: Path) -> mlflow.MlflowClient:
    """Ask the SQLite file of a home."""
    return mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def only_run(client: mlflow.MlflowClient) -> Any:
    """Return the one run that there is."""
    experiment = client.get_experiment_by_name("lapflow")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait as long as it takes."""
    while not holds():
        time.sleep(0.02)


def pictures(client: mlflow.MlflowClient, run_id: str) -> list[str]:
    """Return the pictures that MLflow shows with a slider, without the time of each."""
    items = [item.path for item in client.list_artifacts(run_id, "images")]
    return [path.partition("+timestamp")[0] for path in items if path.endswith(".png")]


def history(client: mlflow.MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return a curve."""
    points = client.get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)
