"""One rank computes numbers that are none: it alone is to blame, and the run goes on without it."""

from __future__ import annotations

import math
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cluster.contract import ClusterConfig, WorkerContext
from cluster.launcher import run
from tests.support.finished import FinishedRun
from tests.support.job import SMALL, final_state
from tests.support.loss_watch import watch
from trainer.config import paths
from trainer.config.composition import compose_job
from trainer.config.reading import to_dict
from trainer.storage.lease import hold_lease
from trainer.storage.open import open_store
from trainer.training.hooks import RankDiverged
from trainer.training.preflight import preflight
from trainer.training.step import TrainStep
from trainer.training.worker import train_worker

pytestmark = pytest.mark.slow

# After the second checkpoint, and with more updates to the next one than may be skipped.
SPOILED_FROM = 2560 + 3 * 64


def spoiled(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """A rank whose images are none any more, until the workers are started again."""
    bands = TrainStep._bands

    def lose(self: TrainStep, *arguments: Any, first_image: int) -> Any:
        found = bands(self, *arguments, first_image=first_image)
        if first_image < SPOILED_FROM:
            return found
        return tuple(torch.full_like(band, torch.nan) for band in found)

    is_here = context.rank == 1 and context.attempt == 0
    with mock.patch.object(TrainStep, "_bands", lose if is_here else bands):
        train_worker(context, payload)


NEVER, ALWAYS, ONCE = (1.0, 1.0), (math.nan, math.nan), (math.nan, 1.0)


def judge(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """Tells, for each case, what a rank makes of updates that were skipped."""
    for number, case in enumerate(payload["cases"]):
        watched = watch()
        for loss in case[context.rank]:
            watched.record(torch.tensor(1.0))  # of the first micro-batch
            watched.record(torch.tensor(loss))
            watched.note_update(is_applied=False)
        try:
            told = "spoiled" if watched.is_spoiled("no update was applied") else "settings"
        except RankDiverged:
            told = "own"
        context.report({"case": number, "rank": context.rank, "told": told})


@pytest.mark.usefixtures("forked_ranks")
def test_few_ranks_that_never_have_a_number_are_to_blame_and_else_the_settings() -> None:
    cases = {
        (NEVER, NEVER, NEVER): ("settings", "settings", "settings"),
        (ALWAYS, ALWAYS, ALWAYS): ("settings", "settings", "settings"),
        (ALWAYS, ALWAYS, NEVER): ("settings", "settings", "settings"),
        (NEVER, ONCE, NEVER): ("settings", "settings", "settings"),
        (ONCE, ALWAYS, NEVER): ("spoiled", "own", "spoiled"),
    }
    told: list[dict[str, Any]] = []
    run(
        ClusterConfig(backend="local", workers=3, gpus_per_worker=0),
        judge,
        {"cases": list(cases)},
        on_message=told.append,
        stop=threading.Event(),
    )
    by_rank = {(one["case"], one["rank"]): one["told"] for one in told}
    for number, expected in enumerate(cases.values()):
        assert tuple(by_rank[number, rank] for rank in range(3)) == expected, number


def test_a_rank_that_spoils_all_updates_is_named_and_costs_nothing_but_time(
    finished: FinishedRun, empty_tracker: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_tracker, tmp_path)
    job = compose_job([*SMALL, f"home={tmp_path}", "eval.classifier=false"])
    lines: list[str] = []
    told: list[dict[str, Any]] = []
    preflight(job, report=lines.append)
    store = open_store(paths.runs_uri(job), job.store)
    with hold_lease(store, job.run, report=lines.append, on_lost=print) as lease:
        outcome = run(
            job.cluster,
            spoiled,
            {"job": to_dict(job), "lease": asdict(lease), "tracker_file": None},
            on_message=told.append,
            report=lines.append,
            stop=threading.Event(),
        )
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    (loss,) = [line for line in lines if " attempt 0: worker " in line and "start again" in line]
    assert re.search(r"attempt 0: worker 1 on \S+ failed with RankDiverged: the gradient was", loss)
    assert "its data or its device is at fault, and not the settings" in loss
    assert "2,560 images are saved; the workers start again at once" in loss
    state = final_state(f"{tmp_path}/store", job.run)
    assert state.keys() == finished.state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in finished.state.items())
