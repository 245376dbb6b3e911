"""One rank computes numbers that are none: it alone is to blame, and not the settings."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from cluster.contract import ClusterConfig, WorkerContext
from cluster.launcher import run
from tests.support.loss_watch import watch
from trainer.training.hooks import RankDiverged

pytestmark = pytest.mark.slow

NEVER, ALWAYS, ONCE = (1.0, 1.0), (math.nan, math.nan), (math.nan, 1.0)


def judge(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """Tells, for each case, what a rank makes of updates that were skipped."""
    for number, case in enumerate(payload["cases"]):
        watched = watch()
        for loss in case[context.rank]:
            watched.record(torch.tensor(1.0))  # of the first micro-batch
            watched.record(torch.tensor(loss))
            watched.note_update(torch.tensor(False))
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
