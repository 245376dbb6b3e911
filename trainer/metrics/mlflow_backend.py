"""Where MLflow keeps runs, the page that shows them, and the curves it recorded."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pipelines.addresses import hide_credentials
from pipelines.files import draft
from pipelines.proxies import proxy_hint
from trainer.metrics.tracker import TrackingConfig

# A dead server must not hold one call for minutes: our own queue retries. Users can override.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What is printed is ours, and may be JSON.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

PORT = 5000
"""Where the pages of runs in a local file are shown unless told otherwise."""
_SQLITE = "sqlite:///"
_MEMORY = "/dev/shm"
_TRAINING = "?workflowType=machine_learning"  # or the pages open on what concerns language models
_PASSING = (408, 409, 425, 429, 499)  # of HTTP: too slow, too early, too many, in conflict
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
    if (file := _local_file(uri)) is not None:
        # What a full or strange disk does not take is told by the look at the file.
        with suppress(OSError):
            make_file(file)
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


def _local_file(uri: str) -> Path | None:
    """Return the SQLite file of a tracking URI; None if it has none."""
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    return Path(path) if uri.startswith(_SQLITE) and path not in ("", ":memory:") else None


def make_file(path: Path) -> None:
    """Make MLflow's SQLite file, unless something is at its place or its folder is missing.

    MLflow makes the tables of a new file in dozens of transactions, each of which waits for the
    disk. Here they are made in memory, and the file that appears at its place is whole.

    Raises:
        OSError: It cannot be written there.
    """
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lapflow-", dir=memory) as folder:
        made = Path(folder) / path.name
        connect(f"{_SQLITE}{made}").search_experiments(max_results=1)
        data = made.read_bytes()
    with draft(path, data) as temporary, suppress(FileExistsError):  # another launch was faster
        os.link(temporary, path)


def _check_file(uri: str) -> None:
    """Write to the SQLite file of a tracking URI; MLflow tries one that it cannot for minutes."""
    if (path := _local_file(uri)) is None:
        return
    try:
        if path.is_dir():
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


def file_number(config: TrackingConfig, home: str) -> int | None:
    """Return a number that tells the tracker's file from all others, on whatever machine.

    Its number on its disk alone would not: disks of two machines count alike. And which disk it is
    a shared one is told differently on each. So the time counts too at which MLflow made the file.

    Args:
        config: Where runs are tracked.
        home: Folder of the default SQLite file.

    Returns:
        None if there is no file, as with a server.
    """
    file = _local_file(tracking_uri(config, home))
    try:
        if file is None:
            return None
        known = f"{file.stat().st_ino} {_began_ms(file)}"
        return int.from_bytes(hashlib.sha256(known.encode()).digest()[:6])
    except OSError:
        return None


def _began_ms(file: Path) -> int | None:
    """Return when MLflow made its first experiment in a SQLite file; None if it has made none."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            ((began,),) = database.execute("SELECT min(creation_time) FROM experiments").fetchall()
    except sqlite3.Error:
        return None
    return None if began is None else int(began)


def connect(uri: str) -> Any:
    """Return a client of MLflow; nothing is sent yet."""
    return import_mlflow().MlflowClient(tracking_uri=uri)


def import_mlflow() -> Any:
    """Import MLflow, which takes a second, and keep it quiet."""
    is_enabled = gc.isenabled()
    gc.disable()  # its imports make no garbage, and would be a third longer
    try:
        import mlflow
    finally:
        if is_enabled:
            gc.enable()
    # MLflow and Alembic report every schema migration of a new SQLite file.
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return mlflow


def experiment_id(client: Any, name: str, uri: str, home: str) -> str:
    """Return the ID of the experiment of a name, which is created if there is none.

    Raises:
        ExperimentDeleted: If it was deleted.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = uri.startswith("sqlite:")
        location = (Path(home) / "mlartifacts").resolve().as_uri() if local else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another run was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise ExperimentDeleted(
            f"tracking.experiment={name} was deleted in MLflow at {uri}, which takes nothing for "
            f"it any more. Restore it with MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}, or give another tracking.experiment=NAME"
        )
    return str(experiment.experiment_id)


def page(server: str, experiment: str, *, run_id: str = "") -> str:
    """Return the address of an experiment's runs, or of one of them.

    Args:
        server: Address of the MLflow server that shows them.
        experiment: ID of the experiment.
        run_id: MLflow's ID of a run.
    """
    if run_id:
        return f"{server.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}{_TRAINING}"
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs{_TRAINING}"


def is_refusal(error: Exception) -> bool:
    """Tell whether an error says that what is asked is at fault, and not that MLflow is away.

    A database or a place of artifacts that takes nothing now is no refusal.
    """
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError):  # of artifacts
        status = 500 if error.response is None else error.response.status_code
    else:
        return isinstance(error, (ValueError, TypeError, LookupError))
    return bool(400 <= status < 500) and status not in _PASSING


def cause(error: BaseException) -> str:
    """Return the first line of what an error says, without credentials, or its type."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return hide_credentials(line)[:300]  # a cut address would not be known as one


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
