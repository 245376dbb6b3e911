"""MLflow as the tracker: a background thread sends, so an outage costs training nothing.

Calls only append to a queue. The thread sends in order and retries the head of the queue until it
gets through, so points of an outage arrive when the server is back; what is left when the run ends
is waited for up to `flush_timeout_s` and then counted in a warning.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.metrics.tracker import TrackingConfig
from trainer.metrics.unsent import Point, UnsentPoints

# A dead server must not hold one call for minutes: our own queue retries. Users can override.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

_log = logging.getLogger(__name__)

_RUN_TAG = "lapflow.run"
# Without it MLflow's pages open on what concerns language models.
_MODEL_TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
_MAX_PARAMETER_CHARACTERS = 500
_PARAMETERS_PER_CALL = 100
_QUEUE_CALLS = 100_000
_TRIES_OF_A_CALL_AT_FAULT = 3
_LONGEST_PAUSE_S = 15.0


class TrackerUnreachable(ValueError):
    """The tracking server or file cannot be used; the message says which and what to do."""


def tracking_uri(config: TrackingConfig, home: str) -> str:
    """Return the configured URI, or that of the SQLite file in the home folder."""
    return config.uri or f"sqlite:///{Path(home) / 'mlflow.db'}"


def check_tracker(config: TrackingConfig, home: str) -> None:
    """Create the experiment if needed, which proves that the tracker can be written.

    Raises:
        TrackerUnreachable: If it cannot.
    """
    uri = tracking_uri(config, home)
    try:
        _experiment_id(_client(uri), config.experiment, uri, home)
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TrackerUnreachable(
            f"MLflow at tracking.uri={uri} cannot be used: {cause}. Start the server or correct "
            "tracking.uri; tracking.required=false trains without waiting for it"
        ) from error


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
        client = _client(uri)
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
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TrackerUnreachable(f"MLflow at {uri} cannot be read: {cause}") from error
    raise TrackerUnreachable(
        f"MLflow at {uri} has no run named {run!r} in the experiment {experiment!r}; the pages of "
        "`make ui` list the names"
    )


class MlflowTracker:
    """One MLflow run per training run, found again by name when the run is resumed.

    Args:
        config: Where to track.
        home: Folder of the default SQLite file and its artifacts.
        run: The training run's name.
        identity: Tells the training run from every other: its place and its science. A resumed run
            has the same, a run begun anew in the same place with other settings has not.
    """

    def __init__(self, config: TrackingConfig, *, home: str, run: str, identity: str) -> None:
        self._config = config
        self._home = home
        self._run = run
        self._identity = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._uri = tracking_uri(config, home)
        self._run_id = ""
        self._newest: dict[str, int] = {}
        self._unsent = UnsentPoints()
        self._calls: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_QUEUE_CALLS)
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def config(self, resolved: Mapping[str, Any]) -> None:
        """Record the configuration: an artifact in full, and flat parameters for comparisons."""
        import yaml
        from mlflow.entities import Param

        text = yaml.safe_dump(dict(resolved), sort_keys=False)
        flat = _flat(resolved)

        def send(client: Any) -> None:
            client.log_text(self._run_id, text, "config.yaml")
            known = client.get_run(self._run_id).data.params
            # MLflow refuses to change a parameter; a resumed run may differ operationally.
            fresh = [
                Param(name, value[:_MAX_PARAMETER_CHARACTERS])
                for name, value in flat.items()
                if name not in known
            ]
            for start in range(0, len(fresh), _PARAMETERS_PER_CALL):
                part = fresh[start : start + _PARAMETERS_PER_CALL]
                client.log_batch(self._run_id, params=part)

        self._put(send)

    def metrics(self, values: Mapping[str, float], *, images: int) -> None:
        """Record values with images as MLflow's step; a resumed run repeats no point."""
        from mlflow.entities import Metric

        timestamp = int(time.time() * 1000)
        number = self._unsent.add(images, values)

        def send(client: Any) -> None:
            fresh = [
                Metric(name, value, timestamp, images)
                for name, value in values.items()
                if images > self._newest_step(client, name)
            ]
            client.log_batch(self._run_id, metrics=fresh)
            self._newest.update({metric.key: images for metric in fresh})
            self._unsent.forget(number)

        self._put(send)

    def unsent(self) -> list[Point]:
        """Return the points that MLflow has not taken yet."""
        return self._unsent.points()

    def image(self, name: str, png: bytes, *, images: int) -> None:
        """Store a picture as the artifact `<name>/<images>.png`."""

        def send(client: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{images:012d}.png"
                path.write_bytes(png)
                client.log_artifact(self._run_id, str(path), artifact_path=name)

        self._put(send)

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._put(lambda client: client.set_tag(self._run_id, name, value))

    def close(self, status: str) -> None:
        """End the run and wait for the queue, but not longer than configured."""
        self._put(lambda client: client.set_terminated(self._run_id, status))
        self._put(None)
        self._thread.join(self._config.flush_timeout_s)
        if self._thread.is_alive():
            _log.warning(
                "MLflow at %s did not take the last %d calls within %.0f s; they are lost, "
                "the run itself is not",
                self._uri,
                self._calls.qsize(),
                self._config.flush_timeout_s,
            )

    def _put(self, call: Callable[[Any], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            _log.warning("MLflow has been away too long: a tracking call was dropped")

    def _send_all(self) -> None:
        client: Any = None
        while (call := self._calls.get()) is not None:
            pause, at_fault = 0.5, 0
            while at_fault < _TRIES_OF_A_CALL_AT_FAULT:
                try:
                    client = client or self._open()
                    call(client)
                    break
                except Exception as error:
                    # If MLflow answers another question, it is not away: the call is at fault.
                    at_fault += self._answers()
                    _log.warning(
                        "MLflow at %s: %s; trying again in %.1f s", self._uri, error, pause
                    )
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                _log.warning("MLflow at %s refuses a call, which is dropped", self._uri)

    def _answers(self) -> bool:
        try:
            _client(self._uri).search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def _open(self) -> Any:
        client = _client(self._uri)
        experiment = _experiment_id(client, self._config.experiment, self._uri, self._home)
        found = client.search_runs(
            [experiment], f"tags.`{_RUN_TAG}` = '{self._identity}'", max_results=1
        )
        if found:
            self._run_id = found[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {_RUN_TAG: self._identity}
            self._run_id = client.create_run(experiment, run_name=self._run, tags=tags).info.run_id
        return client

    def _newest_step(self, client: Any, name: str) -> int:
        if name not in self._newest:
            history = client.get_metric_history(self._run_id, name)
            self._newest[name] = max((point.step for point in history), default=-1)
        return self._newest[name]


def _client(uri: str) -> Any:
    import mlflow

    # MLflow and Alembic report every schema migration of a new SQLite file.
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return mlflow.MlflowClient(tracking_uri=uri)


def _experiment_id(client: Any, name: str, uri: str, home: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    local = uri.startswith("sqlite:")
    location = (Path(home) / "mlartifacts").resolve().as_uri() if local else None
    return str(
        client.create_experiment(name, artifact_location=location, tags=_MODEL_TRAINING_PAGES)
    )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
