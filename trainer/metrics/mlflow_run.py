"""A training run in MLflow: found or begun there, and told the entries of a journal.

All that is told may be told again, by a process that cannot know what the one before it has sent:
what is there already is passed over, and so is what something newer has replaced.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.console import visible
from trainer.metrics.entry import Entry
from trainer.metrics.mlflow_backend import ExperimentDeleted, connect, experiment_id
from trainer.metrics.mlflow_figures import FigureCurves, with_figures
from trainer.metrics.mlflow_models import RunModels
from trainer.metrics.tracker import UNKNOWN, by_protocol

_RUN_TAG = "lapflow.run"
_PLACE_TAG = "mlflow.lapflow.place"  # the pages show no tag that begins so
_PARENT_TAG = "mlflow.parentRunId"
_TRIED_TAG = "mlflow.lapflow.tried"
_SETTING_TAG = "setting."
_MAX_PARAMETER_CHARACTERS = 6000
_PARAMETERS_PER_CALL = 100
_REASON_TAG = "reason"
_PAGE_TAG = "mlflow.note.content"
_OWN_PAGE_TAG = "mlflow.lapflow.page"
_MEASURED_TAG = "mlflow.lapflow.measured"
_TOLD_TAG = "mlflow.lapflow.told."
_REPLACED = {
    "begin": "status",
    "end": "status",
    "settings": "settings",
    "tags": "tags",
    "page": "page",
    "report": "report",
    "checkpoint": "checkpoint",
}
"""What an entry of each kind has in place of what an earlier one has told."""
_MAX_DIGEST_CHARACTERS = 36


class TrackedSweep(NamedTuple):
    """The sweep that a run belongs to, which has a run of its own in MLflow."""

    name: str
    """Its name."""
    identity: str
    """Tells it from all other sweeps and runs."""


class MlflowRun:
    """One MLflow run per training run, found again when the training goes on.

    Args:
        uri: Tracking URI.
        experiment: Experiment that holds the runs.
        home: Folder of the artifacts of a SQLite file.
        run: The training run's name.
        place: Its place, `<store>/<run>`.
        identity: Tells the training from every other at this place, by its science.
        sweep: The sweep that it belongs to.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        home: str,
        run: str,
        place: str,
        identity: str,
        sweep: TrackedSweep | None = None,
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._home = home
        self._run = run
        self._place = place
        self._identity = identity
        self._sweep = sweep
        self._client: Any = None
        self._newest: dict[str, tuple[int, int, float]] | None = None
        self._pictures: set[str] | None = None
        self._is_new = False
        self.run_id = ""

    def open(self, *, time_ms: int) -> None:
        """Find the run, or begin it.

        Args:
            time_ms: When it began, if it does.
        """
        if self._client is not None:
            return
        client = connect(self._uri)
        experiment = experiment_id(client, self._experiment, self._uri, self._home)
        found, is_new = _find_or_begin(
            client,
            experiment,
            self._identity,
            run_name=self._run,
            tags={_PLACE_TAG: self._place_digest},
            start_time=time_ms,
        )
        self.run_id = found.info.run_id
        self._is_new = self._is_new or is_new
        if self._is_new:
            self._end_others(client, experiment)
        if self._sweep is not None:
            self._put_below(client, experiment, self._sweep)
        self._client = client
        self._models = RunModels(
            client, experiment, run=self._run, run_id=self.run_id, place=self._place_digest
        )
        self._figures = FigureCurves(client, self.run_id, self._models)

    def _put_below(self, client: Any, experiment: str, sweep: TrackedSweep) -> None:
        """Have MLflow show the run below the sweep's, which is begun if there is none yet."""
        parent, is_new = _find_or_begin(client, experiment, sweep.identity, run_name=sweep.name)
        if is_new:
            # Perhaps nobody comes who would end it; a sweep that is made says so itself.
            client.set_terminated(parent.info.run_id, "FINISHED")
        if client.get_run(self.run_id).data.tags.get(_PARENT_TAG) != parent.info.run_id:
            client.set_tag(self.run_id, _PARENT_TAG, parent.info.run_id)

    def send(self, entries: Sequence[Entry], *, position: str) -> None:
        """Tell points, or one entry of another kind.

        Args:
            entries: What to tell.
            position: Of the first one among all that the run ever tells, see `Journal.position`.
        """
        try:
            if entries[0].kind == "points":
                self._send_points(entries)
            for entry in entries:
                if entry.kind == "checkpoint":
                    self._models.add(entry.images, uri=entry.text)
                if entry.kind in _REPLACED and not entry.is_for_another:
                    self._replace(entry, position)
                elif entry.kind != "points":
                    getattr(self, f"_send_{entry.kind}")(entry)
        except Exception:
            self._newest = self._pictures = None
            raise

    def explain_deletion(self, error: Exception) -> str:
        """Say what was deleted in MLflow, and how to restore it; "" if nothing was.

        Args:
            error: What a call raised.
        """
        if isinstance(error, ExperimentDeleted):
            return str(error)
        try:
            client = connect(self._uri)
            experiment_id(client, self._experiment, self._uri, self._home)
            run = client.get_run(self.run_id).info
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

    def takes_writes(self) -> bool:
        """Tell whether MLflow takes anything of this run; reads it may answer from a full disk."""
        if self._client is None:
            return False
        try:
            self._client.set_tag(self.run_id, _TRIED_TAG, str(time.time_ns()))
        except Exception:
            return False
        return True

    @property
    def _place_digest(self) -> str:
        return _digest(self._place)

    def _end_others(self, client: Any, experiment: str) -> None:
        """End what else counts as running at this place: its process is gone, and so is its run."""
        same_place = f"tags.`{_PLACE_TAG}` = '{self._place_digest}'"
        for other in client.search_runs([experiment], f"{same_place} and status = 'RUNNING'"):
            if other.info.run_id != self.run_id:
                client.set_terminated(other.info.run_id, "KILLED")

    def _replace(self, entry: Entry, position: str) -> None:
        """Tell an entry unless something newer is there in its place; of tags, what is not there.

        Clocks of machines differ, and the numbers of launches begin anew when somebody deletes the
        run's folder: so it is an older one only if both say so.
        """
        name = f"{_TOLD_TAG}{_REPLACED[entry.kind]}"
        tags = self._client.get_run(self.run_id).data.tags
        there, _, time_ms = tags.get(name, "").partition(" ")
        if position <= there and entry.time_ms <= int(time_ms):
            lost = {key: text for key, text in entry.values.items() if key not in tags}
            if entry.kind == "tags" and lost:
                self._send_tags(replace(entry, values=lost))
            return
        getattr(self, f"_send_{entry.kind}")(entry)
        self._client.set_tag(self.run_id, name, f"{position} {entry.time_ms}")

    def _send_address(self, entry: Entry) -> None:
        """Nothing: it is for who reads the journal."""

    def _send_begin(self, _entry: Entry) -> None:
        self._client.update_run(self.run_id, status="RUNNING")
        self._forget_reason()

    def _forget_reason(self) -> None:
        if _REASON_TAG in self._client.get_run(self.run_id).data.tags:
            self._client.delete_tag(self.run_id, _REASON_TAG)

    def _send_settings(self, entry: Entry) -> None:
        from mlflow.entities import Param, RunTag

        client = self._client
        client.log_text(self.run_id, entry.text, "config.yaml")
        known = client.get_run(self.run_id).data
        fresh = [
            Param(name, visible(value)[:_MAX_PARAMETER_CHARACTERS])
            for name, value in entry.values.items()
            if name not in known.params
        ]
        for start in range(0, len(fresh), _PARAMETERS_PER_CALL):
            part = fresh[start : start + _PARAMETERS_PER_CALL]
            client.log_batch(self.run_id, params=part)
        tags = {f"{_SETTING_TAG}{name}": value for name, value in entry.tags.items()}
        shown = [RunTag(name, visible(value)) for name, value in tags.items()]
        client.log_batch(self.run_id, tags=shown)
        for name in known.tags:
            if name.startswith(_SETTING_TAG) and name not in tags:
                client.delete_tag(self.run_id, name)

    def _send_points(self, entries: Sequence[Entry], *, model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        newest, fresh = self._newest_points(), []
        for entry in entries:
            for name, value in self._curves(entry, newest).items():
                step, time_ms, there = newest.get(name, (-1, -1, 0.0))
                if entry.kind == "measured" and entry.images < step:
                    # Measured beside training, it may come late.
                    if not self._has_point(name, entry.images):
                        fresh.append(Metric(name, value, entry.time_ms, entry.images, model_id))
                    continue
                is_anew = entry.kind == "measured" and entry.images == step and value != there
                if entry.images > step:
                    step = entry.images
                elif not (entry.is_total or is_anew) or entry.time_ms <= time_ms:
                    continue
                fresh.append(Metric(name, value, entry.time_ms, step, model_id))
                newest[name] = step, entry.time_ms, value
        if fresh:
            self._client.log_batch(self.run_id, metrics=fresh)
        self._newest = newest

    def _newest_points(self) -> dict[str, tuple[int, int, float]]:
        """Return step, time and value of the newest point of each curve."""
        if self._newest is None:
            told = self._client.get_run(self.run_id).data.to_proto().metrics
            self._newest = {each.key: (each.step, each.timestamp, each.value) for each in told}
        return dict(self._newest)

    def _curves(self, entry: Entry, there: Collection[str]) -> dict[str, float]:
        """Return the values of an entry by the curves that they belong to."""
        values = entry.point().values.items()
        return {self._figures.curve(name, there): value for name, value in values}

    def _lowest(self, entry: Entry, there: Collection[str]) -> str:
        """Return the curve of the figure that an entry names."""
        (name,) = by_protocol({entry.name: 0.0}, entry.protocol)
        return self._figures.curve(name, there)

    def _has_point(self, name: str, step: int) -> bool:
        told = self._client.get_metric_history(self.run_id, name)
        return any(point.step == step for point in told)

    def _send_picture(self, entry: Entry) -> None:
        from PIL import Image

        if self._pictures is None:
            self._pictures = {
                item.path.partition("+timestamp+")[0]
                for item in self._client.list_artifacts(self.run_id, "images")
            }
        shown = f"images/{entry.name}+step+{entry.images}"
        if shown in self._pictures:
            return
        same = f"images/{entry.name}+step+"
        steps = [int(each.removeprefix(same)) for each in self._pictures if each.startswith(same)]
        with Image.open(io.BytesIO(base64.b64decode(entry.text))) as picture:
            if entry.images >= max(steps, default=0):
                self._client.log_image(self.run_id, picture, artifact_file=f"{entry.name}.png")
            self._client.log_image(
                self.run_id,
                picture,
                key=entry.name,
                step=entry.images,
                timestamp=entry.time_ms,
                synchronous=True,
            )
        self._pictures.add(shown)

    def _send_tags(self, entry: Entry) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value) for name, value in entry.values.items()]
        self._client.log_batch(self.run_id, tags=tags)

    def _send_dataset(self, entry: Entry) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=visible(entry.name),
            digest=entry.values["digest"][:_MAX_DIGEST_CHARACTERS],
            source_type="s3" if entry.text.startswith("s3://") else "local",
            source=json.dumps({"uri": entry.text}),
            profile=json.dumps({"images": int(entry.values["images"])}),
        )
        context = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, context)])

    def _send_page(self, entry: Entry) -> None:
        """Describe the run, unless somebody has written something else there.

        What was measured beside training may come late, and newer figures stay.
        """
        tags = self._client.get_run(self.run_id).data.tags
        there = tags.get(_PAGE_TAG, "")
        if there and _digest(there) != tags.get(_OWN_PAGE_TAG):
            return
        measured = tags.get(_MEASURED_TAG, "")
        if 0 < entry.images < (int(measured) if measured.isdecimal() else 0):
            return
        if entry.images > 0:
            self._client.set_tag(self.run_id, _MEASURED_TAG, str(entry.images))
        text = entry.text.replace("{run_id}", self.run_id)
        if entry.values:
            there = self._newest_points()
            figures, lowest = self._curves(entry, there), self._lowest(entry, there)
            text = with_figures(text, entry.images, figures, lowest=lowest)
        self._client.set_tag(self.run_id, _OWN_PAGE_TAG, _digest(text))
        self._client.set_tag(self.run_id, _PAGE_TAG, text)

    def _send_report(self, entry: Entry) -> None:
        self._client.log_text(self.run_id, entry.text, entry.name)

    def _send_file(self, entry: Entry) -> None:
        folder, _, name = entry.name.rpartition("/")
        with tempfile.TemporaryDirectory() as written:
            path = Path(written) / name
            path.write_bytes(base64.b64decode(entry.text))
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def _send_checkpoint(self, entry: Entry) -> None:
        self._client.set_tag(self.run_id, "checkpoint", visible(entry.text))

    def _send_measured(self, entry: Entry) -> None:
        model_id = self._models.find(entry.images)
        self._send_points([entry], model_id=model_id)
        there = self._newest_points()
        lowest = self._lowest(entry, there)
        value = self._curves(entry, there).get(lowest)
        if model_id is not None and value is not None:
            self._models.rank(model_id, figure=lowest, value=value, protocol=entry.text or UNKNOWN)

    def _send_runs(self, entry: Entry) -> None:
        """Put runs below this one, the newest of each place, if they are in its experiment."""
        experiment = self._client.get_run(self.run_id).info.experiment_id
        for place in entry.values.values():
            same_place = f"tags.`{_PLACE_TAG}` = '{_digest(place)}'"
            for run in self._client.search_runs([experiment], same_place, max_results=1):
                self._client.set_tag(run.info.run_id, _PARENT_TAG, self.run_id)

    def _send_end(self, entry: Entry) -> None:
        status = self._client.get_run(self.run_id).info.status
        if entry.is_for_another and status != entry.values["if"]:
            return
        if entry.name:
            self._client.set_tag(self.run_id, _REASON_TAG, entry.name)
        else:
            self._forget_reason()
        self._client.set_terminated(self.run_id, entry.text, end_time=entry.time_ms)


def _find_or_begin(
    client: Any,
    experiment: str,
    identity: str,
    *,
    tags: Mapping[str, str] | None = None,
    **how: Any,
) -> tuple[Any, bool]:
    """Return the run of an identity, begun if there is none, and whether it was.

    MLflow has no names that only one run can take. So of several that look at the same time, as
    runs of a sweep do for the sweep's, each looks again, and deletes its own if that is not first.
    """
    known = _find_run(client, experiment, identity)
    if known is not None:
        return known, False
    begun = client.create_run(experiment, tags={_RUN_TAG: identity, **(tags or {})}, **how)
    first = _find_run(client, experiment, identity)
    if first is None or first.info.run_id == begun.info.run_id:
        return begun, True
    client.delete_run(begun.info.run_id)
    return first, False


def _find_run(client: Any, experiment: str, identity: str) -> Any:
    """Return the run of an identity that was begun first; None if there is none."""
    found = client.search_runs(
        [experiment],
        f"tags.`{_RUN_TAG}` = '{identity}'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return found[0] if found else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
