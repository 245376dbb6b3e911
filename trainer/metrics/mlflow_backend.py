"""Where MLflow keeps runs, the page that shows them, and the curves it recorded."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from pipelines.proxies import proxy_hint
from trainer.metrics.tracker import TrackingConfig

# A dead server must not hold one call for minutes: our own queue retries. Users can override.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

_log = logging.getLogger(__name__)

_SQLITE = "sqlite:///"
_OTHER_SCHEMA = "out-of-date database schema"  # MLflow says so of newer ones too


class TrackerUnreachable(ValueError):
    """The tracking server or file cannot be used; the message says which and what to do."""


class ExperimentDeleted(TrackerUnreachable):
    """The experiment was deleted in MLflow, which takes nothing for it until it is restored."""


def tracking_uri(config: TrackingConfig, home: str) -> str:
    """Return the configured URI, or that of the SQLite file in the home folder."""
    return config.uri or f"sqlite:///{Path(home) / 'mlflow.db'}"


def check_tracker(config: TrackingConfig, home: str) -> str:
    """Create the experiment if needed, which proves that the tracker can be written.

    Returns:
        The experiment's ID.

    Raises:
        ExperimentDeleted: If it was deleted.
        TrackerUnreachable: If MLflow cannot be used.
    """
    uri = tracking_uri(config, home)
    _check_file(uri)
    try:
        return experiment_id(connect(uri), config.experiment, uri, home)
    except ExperimentDeleted:
        raise
    except Exception as error:
        if _OTHER_SCHEMA in str(error):
            raise TrackerUnreachable(
                f"MLflow at tracking.uri={uri} keeps its runs as another version of MLflow does "
                f"({cause(error).partition('. ')[0]}). Use the version that wrote it, bring an "
                "older file up to date with `mlflow db upgrade` after a backup, or name another "
                "one with tracking.uri"
            ) from error
        raise TrackerUnreachable(
            f"MLflow at tracking.uri={uri} cannot be used: {cause(error)}.{proxy_hint(uri)} Start "
            "the server or correct tracking.uri; tracking.required=false trains without waiting "
            "for it"
        ) from error


def _check_file(uri: str) -> None:
    """Write to the SQLite file of a tracking URI; MLflow tries one that it cannot for minutes."""
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    if not uri.startswith(_SQLITE) or path in ("", ":memory:"):
        return
    try:
        if Path(path).is_dir():
            raise sqlite3.OperationalError("it is a folder")
        with closing(sqlite3.connect(path)) as database:
            ((version,),) = database.execute("PRAGMA user_version").fetchall()
            database.execute(f"PRAGMA user_version = {version}")
    except sqlite3.Error as error:
        if "locked" in str(error):
            return  # another program is at it, for which MLflow waits
        raise TrackerUnreachable(
            f"MLflow's file of tracking.uri={uri} cannot be used: {error}. Move it away, make it "
            "and its folder writable, make room on its disk, or name another one with "
            "tracking.uri=sqlite:////FOLDER/mlflow.db; tracking.required=false trains without "
            "waiting for it"
        ) from error


def connect(uri: str) -> Any:
    """Return a client of MLflow; nothing is sent yet."""
    import mlflow

    # MLflow and Alembic report every schema migration of a new SQLite file.
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return mlflow.MlflowClient(tracking_uri=uri)


def experiment_id(client: Any, name: str, uri: str, home: str) -> str:
    """Return the ID of the experiment of a name, which is created if there is none.

    Raises:
        ExperimentDeleted: If it was deleted.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = uri.startswith("sqlite:")
        location = (Path(home) / "mlartifacts").resolve().as_uri() if local else None
        return str(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage == "deleted":
        raise ExperimentDeleted(
            f"tracking.experiment={name} was deleted in MLflow at {uri}, which takes nothing for "
            f"it any more. Restore it with MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}, or give another tracking.experiment=NAME"
        )
    return str(experiment.experiment_id)


def page(server: str, experiment: str) -> str:
    """Return the address of an experiment's runs.

    Args:
        server: Address of the MLflow server that shows them.
        experiment: ID of the experiment.
    """
    # Without the last part the pages open on what concerns language models.
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def end_run(config: TrackingConfig, home: str, run_id: str, status: str) -> None:
    """End a run whose own process is gone, as "FAILED" or "KILLED"; never raises.

    Args:
        config: Where it is tracked.
        home: Folder of the default SQLite file.
        run_id: MLflow's ID of the run; it is left alone unless it counts as running.
        status: How it ended.
    """
    uri = tracking_uri(config, home)
    try:
        client = connect(uri)
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status)
    except Exception as error:
        _log.warning("MLflow at %s still shows the run as running: %s", uri, cause(error))


def cause(error: BaseException) -> str:
    """Return the first line of what an error says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def run_curves(uri: str, *, experiment: str, run: str) -> dict[str, dict[int, float]]:
    """Read all metrics of the newest run of a name.

    Args:
        uri: Tracking URI.
        experiment: Experiment that holds the run.
        run: Name of the run.

    Returns:
        For each metric its values by images seen.

    Raises:
        TrackerUnreachable: The tracker cannot be read, or holds no such run.
    """
    from mlflow.entities import ViewType

    local = uri.removeprefix("sqlite:///")
    if local != uri and not Path(local).exists():
        raise TrackerUnreachable(f"run {run} cannot be read: there is no tracker file {local}")
    try:
        client = connect(uri)
        known = client.get_experiment_by_name(experiment)
        runs = []
        if known is not None:
            name = run.replace("'", "\\'")
            runs = client.search_runs(
                [known.experiment_id],
                f"attributes.run_name = '{name}'",
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=1,
                order_by=["attributes.start_time DESC"],
            )
        if runs:
            return {
                metric: {
                    point.step: point.value
                    for point in client.get_metric_history(runs[0].info.run_id, metric)
                }
                for metric in runs[0].data.metrics
            }
    except Exception as error:
        raise TrackerUnreachable(
            f"MLflow at {uri} cannot be read: {cause(error)}.{proxy_hint(uri)}"
        ) from error
    raise TrackerUnreachable(
        f"MLflow at {uri} has no run named {run!r} in the experiment {experiment!r}; the pages of "
        "`make ui` list the names"
    )
