"""Runs of the worker's page on real ranks that end after an exact update: stopped, or killed."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from cluster.contract import Message, WorkerContext
from cluster.launcher import run
from trainer.config import paths
from trainer.config.composition import compose_job
from trainer.config.job import science as known_science
from trainer.config.reading import to_dict
from trainer.engine.build import build_engine
from trainer.engine.protocol import Engine
from trainer.planning.placing import resolve_placement
from trainer.storage.lease import hold_lease
from trainer.storage.local import LocalStore
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig
from trainer.training import assembly, worker
from trainer.training import run as run_page
from trainer.training.loop import StopVote
from trainer.training.validate import validate

State: TypeAlias = dict[str, NDArray[np.float32]]
"""All values of each parameter, flat, by kind and name."""

BATCH = 96
TINY = (
    "+exp=digits",
    "cluster.backend=local",
    "cluster.gpus_per_worker=0",
    "model.depth=2",
    "model.width=32",
    f"train.global_batch={BATCH}",
    "train.total_images=4800",
    # So that updates depend on the position in the run, and clip.
    "optim.warmup_images=500",
    "optim.decay=cosine",
    "optim.clip_norm=0.5",
    "optim.weight_decay=0.1",
    "eval.grid_interval_images=0",
    "loader.decode_threads=1",
    # Or ZeRO-3 would leave all weights of a tiny model whole; other stages have no such setting.
    "+engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
)
"""A run of real images through every component, which stops before it would be evaluated."""


@dataclass(kw_only=True)
class Seen:
    """What became known of a run.

    Attributes:
        resumed: Images of the checkpoint that it went on from; 0 if there was none.
        loaded: What all ranks' engines together held when that was loaded.
        left: The same at the end, unless it was killed.
        images: Images at the end, unless it was killed.
    """

    resumed: int = 0
    loaded: State = field(default_factory=dict)
    left: State = field(default_factory=dict)
    images: int = 0


@dataclass(frozen=True, kw_only=True)
class Hold:
    """What a store is slow to write.

    Attributes:
        key: A part of the keys concerned.
        rank: Whose store; None is every rank's.
        released: Whether it is written after the last update, or never.
    """

    key: str
    rank: int | None = None
    released: bool = False


class _Killed(Exception):
    """Ends all ranks with SIGKILL where it is raised."""


def trained(
    *overrides: str,
    updates: int,
    kill_when: Callable[[], bool] | None = None,
    hold: Hold | None = None,
    unknown: str = "",
) -> Seen:
    """Train for some updates and stop as after a Ctrl-C, or kill all ranks.

    Args:
        overrides: The configuration, as for `trainer.launch`.
        updates: How many updates, at least 2.
        kill_when: If given, the ranks stand still after the last update, while saves go on, and are
            killed as soon as this is true.
        hold: What is not written at once; for a run that is killed.
        unknown: A scientific setting that the version which trains does not know, `GROUP.NAME`.
    """
    job = compose_job(overrides)
    validate(job)
    seen, running = Seen(), set(range(job.cluster.workers))

    def hear(message: Message) -> None:
        if message["kind"] == "resumed":
            seen.resumed = message["images"]
        elif message["kind"] in ("loaded", "left"):
            setattr(seen, message["kind"], message["state"])
        elif message["kind"] == "end":
            seen.images = message["images"]
        elif message["kind"] == "waiting":
            running.remove(message["rank"])
            if not running:
                assert kill_when is not None
                _wait_until(kill_when)
                raise _Killed

    killed = kill_when is not None
    asked = {"updates": updates, "killed": killed, "hold": hold, "unknown": unknown}
    unit = resolve_placement(job).unit
    stop = threading.Event()
    store = open_store(paths.runs_uri(job), job.store)
    try:
        with hold_lease(store, job.run, report=print, on_lost=lambda _: None) as lease:
            told = {"job": to_dict(job), "lease": asdict(lease)}
            payload = {"job": told, **asked}
            run(job.cluster, observed, payload, on_message=hear, stop=stop, group_size=unit)
    except _Killed:
        return seen
    assert not killed
    return seen


def observed(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """Run the page on one rank, and tell the states that it loads and that it leaves."""
    asked = 0
    standing = threading.Event()
    engines: list[Engine] = []
    hold: Hold | None = payload["hold"]

    def stop_requested() -> bool:
        # The loop asks once after each update, and stops one update after the first yes.
        nonlocal asked
        asked += 1
        if payload["killed"] and asked == payload["updates"]:
            context.report({"kind": "waiting", "rank": context.rank})
            standing.set()
            threading.Event().wait()
        return not payload["killed"] and asked == payload["updates"] - 1

    def build(*arguments: Any, **options: Any) -> Engine:
        engine = build_engine(*arguments, **options)
        load = engine.load_fragments

        def load_and_tell(updates: int) -> None:
            load(updates)
            _tell_state(context, "loaded", engine)

        engine.load_fragments = load_and_tell  # type: ignore[method-assign]
        engines.append(engine)
        return engine

    def vote(_stop_requested: Callable[[], bool]) -> StopVote:
        # Not by way of the context: a save that waits for the one before asks that one too.
        return StopVote(stop_requested)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(assembly, "build_engine", build))
        stack.enter_context(mock.patch.object(worker, "StopVote", vote))
        if payload["unknown"]:
            science = partial(_science_of_before, payload["unknown"])
            stack.enter_context(mock.patch.object(run_page, "science", science))
        if hold is not None and hold.rank in (None, context.rank):
            release = standing if hold.released else threading.Event()
            store = partial(_SlowStore, hold.key, release)
            stack.enter_context(mock.patch.object(worker, "open_store", store))
        worker.train_worker(context, payload["job"])
    _tell_state(context, "left", engines[0])


def _science_of_before(unknown: str, *words: Any, **digests: Any) -> dict[str, Any]:
    chosen = known_science(*words, **digests)
    group, _, name = unknown.partition(".")
    del chosen[group][name]
    return chosen


def points(home: Path) -> dict[tuple[str, int], float]:
    """Read the points of all curves in a home, by name and images."""
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute("SELECT key, step, value FROM metrics").fetchall()
    found = {(key, step): value for key, step, value in rows}
    assert len(found) == len(rows), "a point was recorded twice"
    return found


def distance(one: State, other: State, kind: str) -> float:
    """Relative distance of one kind of values over all parameters."""
    first, second = (
        np.concatenate([state[name] for name in sorted(state) if name.startswith(f"{kind}/")])
        for state in (one, other)
    )
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


class _SlowStore(LocalStore):
    """A folder that writes keys with some text in them only after an event."""

    def __init__(
        self, held: str, release: threading.Event, root: str, _config: StoreConfig
    ) -> None:
        super().__init__(Path(root))
        self._held = held
        self._release = release

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._hold(key)
        super().put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self._hold(key)
        return super().create(key, data)

    def _hold(self, key: str) -> None:
        if self._held in key:
            self._release.wait()


def _tell_state(context: WorkerContext, kind: str, engine: Engine) -> None:
    mine = [
        (f"{key}/{each.name}", each.start, prod(each.shape), values.numpy())
        for each in engine.fragments()
        for key, values in each.tensors.items()
    ]
    everyone: list[Any] = [None] * context.world_size
    dist.all_gather_object(everyone, mine)
    state: State = {}
    for name, start, numel, values in (part for parts in everyone for part in parts):
        whole = state.setdefault(name, np.full(numel, np.nan, np.float32))
        whole[start : start + len(values)] = values
    if context.rank == 0:
        context.report({"kind": kind, "state": state})


def _wait_until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.02)
