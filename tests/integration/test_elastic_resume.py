"""A run goes on, from the same bits, on other ranks, expert groups, ZeRO stages and engines.

Each of its parts loads what the one before saved. The run that it is compared with has one rank.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest.digits import ensure_digits
from tests.support.worker_runs import BATCH, TINY, Seen, State, distance, points, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

PARTS = [
    (1, "engine.zero_stage=2", "engine.placement=replicated"),
    (2, "engine.zero_stage=2", "engine.placement={1:2}", "train.ema.device=host"),
    (4, "engine.zero_stage=3", "engine.placement={0:2,1:4}"),
    (4, "engine.zero_stage=1", "engine.placement={0:4,1:2}", "engine.regather_tokens=false"),
    (2, "engine.kind=plain", "engine.placement=replicated", "train.ema.device=host"),
    (2, "engine.zero_stage=3", "engine.placement={0:2,1:2}", "train.ema.device=host"),
    (1, "engine.kind=plain", "engine.placement=replicated"),
    (2, "engine.zero_stage=1", "engine.placement=replicated"),
    (2, "engine.kind=plain", "engine.placement={0:2}", "engine.regather_tokens=false"),
]
UPDATES = 3
"""Of each part; 27 in all, so the run is in its second epoch at the end."""

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def test_a_run_moves_between_worlds_without_the_change_of_a_bit(empty_tracker, tmp_path):
    ensure_digits(f"{tmp_path}/digits")

    def begin(name: str) -> Path:
        home = tmp_path / name
        home.mkdir()
        shutil.copy(empty_tracker, home)
        return home

    def train(home: Path, workers: int, *engine: str, updates: int) -> Seen:
        return trained(
            *TINY,
            f"home={home}",
            f"data.prefix={tmp_path}/digits",
            f"cluster.workers={workers}",
            f"runtime.log_interval_images={BATCH}",
            # What is loaded is what was saved at the stop.
            "checkpoint.interval_images=0",
            *engine,
            updates=updates,
        )

    whole, moving = begin("whole"), begin("moving")
    undisturbed = train(whole, *PARTS[0], updates=UPDATES * len(PARTS))
    left: State = {}
    for number, part in enumerate(PARTS):
        seen = train(moving, *part, updates=UPDATES)
        assert seen.resumed == number * UPDATES * BATCH, part
        assert seen.images == seen.resumed + UPDATES * BATCH, part
        assert seen.loaded.keys() == left.keys(), part
        different = [name for name in left if not np.array_equal(seen.loaded[name], left[name])]
        assert different == [], part
        assert {name.split("/")[0] for name in seen.left} == set(KINDS)
        left = seen.left

    drawn, wanted = points(moving), points(whole)
    for key in ("loss/total", "loss/scale_0", "loss/scale_1", "optim/gradient_norm"):
        for update in range(1, UPDATES * len(PARTS) + 1):
            at = key, update * BATCH
            assert drawn[at] == pytest.approx(wanted[at], rel=1e-6, abs=0), at
    for kind in KINDS:
        assert distance(left, undisturbed.left, kind) < 1e-6, kind
