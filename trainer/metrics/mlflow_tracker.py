"""MLflow as the tracker: a background thread sends, so an outage costs training nothing.

Calls only append to a queue. The thread sends in order and retries the head of the queue until it
gets through, so points of an outage arrive when the server is back, and those of a run that was
deleted there when it is restored; what is left when the run ends is waited for up to
`flush_timeout_s` and then counted in a warning.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.console import visible
from pipelines.proxies import proxy_hint
from trainer.metrics.mlflow_backend import (
    ExperimentDeleted,
    connect,
    experiment_id,
    tracking_uri,
)
from trainer.metrics.tracker import Point, Tracker, TrackingConfig, UnsentPoints

_log = logging.getLogger(__name__)

_RUN_TAG = "lapflow.run"
_SETTING_TAG = "setting."
_MAX_PARAMETER_CHARACTERS = 500
_PARAMETERS_PER_CALL = 100
_QUEUE_CALLS = 100_000
_TRIES_OF_A_CALL_AT_FAULT = 3
_MAX_PAUSE_S = 15.0


class MlflowTracker(Tracker):
    """One MLflow run per training run, found again by name when the run is resumed.

    Args:
        config: Where to track.
        home: Folder of the default SQLite file and its artifacts.
        run: The training run's name.
        identity: Tells the training run from every other: its place and its science. A resumed run
            has the same, a run begun anew in the same place with other settings has not.
        opened: Called in the sending thread with MLflow's ID of the run, once that is known.
    """

    def __init__(
        self,
        config: TrackingConfig,
        *,
        home: str,
        run: str,
        identity: str,
        opened: Callable[[str], None] = lambda _id: None,
    ) -> None:
        self._config = config
        self._home = home
        self._run = run
        self._identity = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._uri = tracking_uri(config, home)
        self._opened = opened
        self._run_id = ""
        self._newest: dict[str, int] = {}
        self._unsent = UnsentPoints()
        self._calls: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_QUEUE_CALLS)
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def config(
        self,
        resolved: Mapping[str, Any],
        *,
        lasting: Mapping[str, Any],
        present: Mapping[str, Any],
    ) -> None:
        """Record the configuration: an artifact in full, parameters, and tags `setting.KEY`.

        MLflow never changes a parameter, so what another launch may change is a tag.
        """
        import yaml
        from mlflow.entities import Param, RunTag

        text = yaml.safe_dump(dict(resolved), sort_keys=False)
        flat = _flat(lasting)
        tags = {f"{_SETTING_TAG}{key}": value for key, value in _flat(present).items()}

        def send(client: Any) -> None:
            client.log_text(self._run_id, text, "config.yaml")
            known = client.get_run(self._run_id).data
            fresh = [
                Param(name, visible(value)[:_MAX_PARAMETER_CHARACTERS])
                for name, value in flat.items()
                if name not in known.params
            ]
            for start in range(0, len(fresh), _PARAMETERS_PER_CALL):
                part = fresh[start : start + _PARAMETERS_PER_CALL]
                client.log_batch(self._run_id, params=part)
            client.log_batch(
                self._run_id,
                tags=[RunTag(name, visible(value)) for name, value in tags.items()],
            )
            for name in known.tags:
                if name.startswith(_SETTING_TAG) and name not in tags:
                    client.delete_tag(self._run_id, name)

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
        self._put(lambda client: client.set_tag(self._run_id, name, visible(value)))

    def close(self, status: str) -> None:
        """End the run and wait for the queue, but not longer than configured."""
        self._put(lambda client: client.set_terminated(self._run_id, status))
        self._put(None)
        patience_s = self._config.flush_timeout_s
        self._thread.join(min(1.0, patience_s))
        if self._thread.is_alive():
            _log.info("waiting for MLflow to take %d calls", self._calls.qsize())
        self._thread.join(max(0.0, patience_s - 1.0))
        if self._thread.is_alive():
            _log.warning(
                "MLflow at %s did not take the last %d calls within %.0f s; the last checkpoint "
                "keeps the points of the curves, and the next launch of the run sends them",
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
            pause, at_fault, last = 0.5, 0, ""
            while at_fault < _TRIES_OF_A_CALL_AT_FAULT:
                try:
                    client = client or self._open()
                    call(client)
                    break
                except Exception as error:
                    message = (
                        f"MLflow at {self._uri}: {error}; trying again in {pause:.1f} s."
                        f"{proxy_hint(self._uri)}"
                    )
                    if deleted := self._explain_deletion(error):
                        message = f"{deleted}. Until then its points are kept"
                    else:
                        # If MLflow answers another question, it is not away: the call is at fault.
                        at_fault += self._answers()
                    if message != last:
                        _log.warning("%s", message)
                    last = message
                    time.sleep(pause)
                    pause = min(2 * pause, _MAX_PAUSE_S)
            else:
                _log.warning("MLflow at %s refuses a call, which is dropped", self._uri)

    def _explain_deletion(self, error: Exception) -> str:
        """Say what was deleted in MLflow, and how to restore it; "" if nothing was."""
        if isinstance(error, ExperimentDeleted):
            return str(error)
        try:
            client = connect(self._uri)
            experiment_id(client, self._config.experiment, self._uri, self._home)
            run = client.get_run(self._run_id).info
        except ExperimentDeleted as deleted:
            return str(deleted)
        except Exception:
            return ""
        if run.lifecycle_stage != "deleted":
            return ""
        return (
            f"The run {self._run} was deleted in MLflow at {self._uri}; restore it on the page of "
            "its experiment's runs (State: Deleted)"
        )

    def _answers(self) -> bool:
        try:
            connect(self._uri).search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def _open(self) -> Any:
        client = connect(self._uri)
        experiment = experiment_id(client, self._config.experiment, self._uri, self._home)
        found = client.search_runs(
            [experiment], f"tags.`{_RUN_TAG}` = '{self._identity}'", max_results=1
        )
        if found:
            self._run_id = found[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {_RUN_TAG: self._identity}
            self._run_id = client.create_run(experiment, run_name=self._run, tags=tags).info.run_id
        self._opened(self._run_id)
        return client

    def _newest_step(self, client: Any, name: str) -> int:
        if name not in self._newest:
            history = client.get_metric_history(self._run_id, name)
            self._newest[name] = max((point.step for point in history), default=-1)
        return self._newest[name]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
