"""MLflow as the tracker: a background thread sends a journal, so an outage costs training nothing.

Calls only append to the journal. The thread sends it in order and retries its head until it gets
through, so what happened in an outage arrives when the server is back, and what concerns a run that
was deleted there when it is restored. Meanwhile the store takes what is waiting, and what is left
when the run ends; see `trainer.metrics.journal`.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pipelines.addresses import hide_credentials
from pipelines.console import visible
from pipelines.proxies import proxy_hint
from trainer.metrics.entry import Entry
from trainer.metrics.journal import Journal, JournalPlace
from trainer.metrics.mlflow_backend import cause, is_refusal, tracking_uri
from trainer.metrics.mlflow_run import MlflowRun, TrackedSweep
from trainer.metrics.tracker import Point, Tracker, TrackingConfig
from trainer.storage.errors import StoreError

_log = logging.getLogger(__name__)

_TRIES_OF_A_CALL_AT_FAULT = 3
_MAX_PAUSE_S = 15.0
GATHER_S = 5.0
"""Points that come within this time go in one call: each alone takes three times the work."""
_METRICS_PER_CALL = 1000  # of which MLflow takes no more

T = TypeVar("T")


class _Refused(Exception):
    """MLflow does not take a call."""


class _GivenUp(Exception):
    """Nobody waits any longer."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Which run is tracked.

    Attributes:
        name: The training run's name.
        place: Its place, `<store>/<run>`.
        identity: Tells the training from every other at this place. A resumed run has the same, a
            run begun anew in the same place with other settings has not.
        journal: Where what it tells is written down.
        home: Folder of the default SQLite file and its artifacts.
        sweep: The sweep that it belongs to.
    """

    name: str
    place: str
    identity: str
    journal: JournalPlace
    home: str
    sweep: TrackedSweep | None = None


class MlflowTracker(Tracker):
    """Tells MLflow, after what earlier processes of the run have left to tell.

    Args:
        config: Where to track.
        tracked: Which run.
        writer: Names this process in the order of all that write: launch and attempt.
        opened: Called in the sending thread with MLflow's ID of the run, once that is known.
        gather_s: How long points are gathered for one call.

    Attributes:
        arrived: How many entries MLflow has, those of earlier processes too.
        journal: What is told.
    """

    def __init__(
        self,
        config: TrackingConfig,
        tracked: TrackedRun,
        *,
        writer: str,
        opened: Callable[[str], None] = lambda _id: None,
        gather_s: float = GATHER_S,
    ) -> None:
        self._config = config
        self._uri = tracking_uri(config, tracked.home)
        self._opened = opened
        self._gather_s = gather_s
        self._told = ""
        self._page = ""
        self.arrived = 0
        self._store_failed = False
        self._is_away = False
        address = {
            "uri": self._uri,
            "experiment": config.experiment,
            "run": tracked.name,
            "place": tracked.place,
        }
        if tracked.sweep is not None:
            address |= {"sweep": tracked.sweep.name, "sweep_identity": tracked.sweep.identity}
        self.journal = Journal(
            tracked.journal,
            writer=writer,
            address=Entry(kind="address", time_ms=_now_ms(), values=address),
        )
        self._run = MlflowRun(
            self._uri,
            experiment=config.experiment,
            home=tracked.home,
            run=tracked.name,
            place=tracked.place,
            identity=tracked.identity,
            sweep=tracked.sweep,
        )
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._has_given_up = threading.Event()
        self._thread = threading.Thread(target=self._run_thread, name="mlflow", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Tell that the run is being trained."""
        self.journal.append(Entry(kind="begin", time_ms=_now_ms()))

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

        text = yaml.safe_dump(dict(resolved), sort_keys=False)
        self.journal.append(
            Entry(
                kind="settings",
                time_ms=_now_ms(),
                text=text,
                values=_flat(lasting),
                tags=_flat(present),
            )
        )

    def metrics(self, values: Mapping[str, float], *, images: int) -> None:
        """Record values with images as MLflow's step; a resumed run repeats no point."""
        told = {name: float(value).hex() for name, value in values.items()}
        self.journal.append(Entry(kind="points", time_ms=_now_ms(), images=images, values=told))

    def totals(self, values: Mapping[str, float], *, images: int) -> None:
        """Record the newest values of curves, also where these have a point there or further."""
        told = {name: float(value).hex() for name, value in values.items()}
        self.journal.append(
            Entry(kind="points", time_ms=_now_ms(), images=images, name="total", values=told)
        )

    def unsent(self) -> list[Point]:
        """Return the newest points that neither MLflow nor the store has."""
        return self.journal.unsafe_points()

    def image(self, name: str, png: bytes, *, images: int) -> None:
        """Record a picture, which MLflow's pages show with a slider over images."""
        text = base64.b64encode(png).decode()
        self.journal.append(
            Entry(kind="picture", time_ms=_now_ms(), images=images, name=name, text=text)
        )

    def file(self, name: str, data: bytes) -> None:
        """Record a file as an artifact."""
        text = base64.b64encode(data).decode()
        self.journal.append(Entry(kind="file", time_ms=_now_ms(), name=name, text=text))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run, without credentials of addresses that they quote."""
        told = {name: hide_credentials(visible(text)) for name, text in values.items()}
        self.journal.append(Entry(kind="tags", time_ms=_now_ms(), values=told))

    def dataset(self, name: str, *, digest: str, uri: str, images: int) -> None:
        """Record what the run is trained on."""
        values = {"digest": digest, "images": str(images)}
        self.journal.append(
            Entry(kind="dataset", time_ms=_now_ms(), name=name, text=uri, values=values)
        )

    def page(self, text: str) -> None:
        """Describe the run in Markdown, in which `{run_id}` is MLflow's ID of it."""
        self._page = text
        self.journal.append(Entry(kind="page", time_ms=_now_ms(), text=text))

    def report(self, name: str, html: str) -> None:
        """Record a document about the run as an artifact, in place of an older one."""
        self.journal.append(Entry(kind="report", time_ms=_now_ms(), name=name, text=html))

    def runs(self, places: Sequence[str]) -> None:
        """Have runs shown below this one, which is that of a sweep.

        Args:
            places: Where each is, `<store>/<run>`.
        """
        told = {str(number): place for number, place in enumerate(places)}
        self.journal.append(Entry(kind="runs", time_ms=_now_ms(), values=told))

    def checkpoint(self, uri: str, *, images: int) -> None:
        """Record a checkpoint as a model of the run.

        The store takes what waits, as the run may go on from here on another machine.
        """
        self.journal.append(Entry(kind="checkpoint", time_ms=_now_ms(), images=images, text=uri))
        self.journal.rotate()
        self._wake.set()

    def measured(
        self, values: Mapping[str, float], *, images: int, lowest: str, protocol: str
    ) -> None:
        """Record figures of a checkpoint, and which one is the best now.

        Args:
            values: The figures.
            images: The checkpoint's position of the run.
            lowest: That of the figures which is the lowest for the best one; it may be missing.
            protocol: How they were measured; only figures of the same are compared, or in one
                curve.
        """
        told = {name: float(value).hex() for name, value in values.items()}
        self.journal.append(
            Entry(
                kind="measured",
                time_ms=_now_ms(),
                images=images,
                name=lowest,
                text=protocol,
                values=told,
            )
        )
        # Whoever sends it knows which curves those figures are in.
        self.journal.append(
            Entry(
                kind="page",
                time_ms=_now_ms(),
                images=images,
                name=lowest,
                text=self._page,
                values=told,
                tags={"protocol": protocol},
            )
        )

    def end(self, status: str, reason: str = "", *, if_running: bool = False) -> None:
        """Tell how the run has ended.

        Args:
            status: "FINISHED", "KILLED" or "FAILED".
            reason: Why, for people; credentials of addresses that it quotes are left out.
            if_running: Whether that is told for another process, which may have told it itself.
        """
        values = {"if": "RUNNING"} if if_running else {}
        why = hide_credentials(visible(reason))
        self.journal.append(
            Entry(kind="end", time_ms=_now_ms(), text=status, name=why, values=values)
        )

    def close(self, status: str, reason: str = "") -> None:
        """End the run and wait for what is on its way, but not longer than configured.

        Whoever comes after a process that was stopped or has failed sends what is left, so this
        does not wait for an MLflow that is away.
        """
        self.end(status, reason)
        self.flush(is_last=status == "FINISHED")

    def flush(self, *, is_last: bool = True) -> bool:
        """Wait for what is on its way, but not longer than configured; nothing may come after it.

        Args:
            is_last: Whether to wait also where MLflow is away, as nobody may come and send it.

        Returns:
            Whether all of it has arrived.
        """
        self.journal.rotate()
        self._ending.set()
        self._wake.set()
        begun = time.monotonic()
        patience_s = self._config.flush_timeout_s
        self._thread.join(min(1.0, patience_s))
        if self._thread.is_alive():
            _log.info("waiting for MLflow to take %d entries", self.journal.count())
        while self._thread.is_alive() and (is_last or not self._is_away):
            if (left_s := begun + patience_s - time.monotonic()) <= 0:
                break
            self._thread.join(min(1.0, left_s))
        if not self._thread.is_alive() and self.journal.count() == 0:
            return True
        # It is for the next process now, which must not meet this one.
        self._has_given_up.set()
        try:
            self.journal.store_closed()
            kept = "they are in the store"
        except StoreError as error:
            kept = f"they are on this machine alone, as the store fails too ({error})"
        _log.warning(
            "MLflow at %s did not take the last %d entries within %.0f s; %s, and the next launch "
            "of the run sends them, or python -m trainer.track ship URI-OF-THE-RUN",
            self._uri,
            self.journal.count(),
            time.monotonic() - begun,
            kept,
        )
        return False

    def _run_thread(self) -> None:
        with suppress(_GivenUp):
            self._send_all()

    def _send_all(self) -> None:
        self._insist(self.journal.find_earlier)
        alone = 0  # so many go one by one, as there is one among them that is refused
        while True:
            if self._has_given_up.is_set():
                return
            ending = self._ending.is_set()
            if self.journal.is_long():
                self._keep_waiting()
            most = 1 if alone else _METRICS_PER_CALL
            waiting: list[Entry] = self._insist(partial(self.journal.waiting, most))
            part = _sent_together(waiting)
            try:
                if part:
                    self._insist(partial(self._send, part))
                    self.journal.arrived(len(part))
                    self.arrived += sum(each.kind != "address" for each in part)
                    alone = max(0, alone - len(part))
                elif ending:
                    return
            except _Refused:
                if len(part) == 1:
                    _log.warning("MLflow at %s refuses a call, which is dropped", self._uri)
                    self.journal.arrived(1)
                alone = len(part) if len(part) > 1 else 0
            # What comes in quick succession goes in one call.
            if len(part) == len(waiting) and not alone:
                self._ending.wait(self._gather_s)

    def _send(self, part: Sequence[Entry]) -> None:
        self._run.open(time_ms=part[0].time_ms)
        if self._run.run_id != self._told:
            self._told = self._run.run_id
            self._opened(self._told)
        self._run.send(part, position=self.journal.position())

    def _insist(self, step: Callable[[], T]) -> T:
        """Try something until it succeeds.

        Raises:
            _Refused: MLflow takes other things of the run, and says that this one is at fault.
        """
        pause_s, at_fault, last = 0.5, 0, ""
        while True:
            try:
                done = step()
                self._is_away = False
                return done
            except StoreError as error:
                message = f"what is left to tell MLflow cannot be read: {error}"
            except Exception as error:
                self._is_away = True
                message = f"MLflow at {self._uri}: {cause(error)}"
                if deleted := self._run.explain_deletion(error):
                    message = f"{deleted}. Until then its points are kept"
                else:
                    # A disk that is full or read-only may refuse calls as well, but takes no other.
                    at_fault += is_refusal(error) and self._run.takes_writes()
                    message += f"; it is tried again.{proxy_hint(self._uri)}"
                if at_fault >= _TRIES_OF_A_CALL_AT_FAULT:
                    _log.warning("%s", message)
                    raise _Refused from error
            if message != last:
                _log.warning("%s", message)
            last = message
            if self._has_given_up.is_set():
                raise _GivenUp
            self._keep_waiting()
            self._wake.wait(pause_s)
            if not self._ending.is_set():
                self._wake.clear()
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _keep_waiting(self) -> None:
        try:
            self.journal.store_closed()
            self._store_failed = False
        except StoreError as error:
            if not self._store_failed:
                _log.warning("what waits for MLflow is on this machine alone: %s", error)
            self._store_failed = True


def _sent_together(waiting: Sequence[Entry]) -> Sequence[Entry]:
    """Return the first entries that one call takes: points, or one of another kind."""
    part: list[Entry] = []
    metrics = 0
    for entry in waiting:
        metrics += len(entry.values)
        if part and (entry.kind != "points" or metrics > _METRICS_PER_CALL):
            break
        part.append(entry)
        if entry.kind != "points":
            break
    return part


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _now_ms() -> int:
    return int(time.time() * 1000)
