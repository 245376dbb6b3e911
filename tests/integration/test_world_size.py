"""Ranks and placements change the order of sums and nothing else, also across a resume."""

import shutil
import sqlite3

import pytest

from tests.support.forked import ranks_by_fork
from trainer.cli.launch import main

pytestmark = pytest.mark.slow

TINY = [
    "+exp=digits",
    "cluster.backend=local",
    "model.depth=2",
    "model.width=32",
    "train.global_batch=64",
    "train.total_images=640",
    "checkpoint.interval_images=320",
    "runtime.log_interval_images=64",
    # One more than two ranks can share.
    "eval.samples=21",
    "eval.sampler.steps=2",
    "eval.classifier=false",
]


def losses(home) -> list[float]:
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute("SELECT step, value FROM metrics WHERE key = 'loss/total'")
        return [value for _, value in sorted(rows)]


def test_one_two_and_changing_numbers_of_ranks_see_the_same_losses(
    empty_tracker, tmp_path, monkeypatch
):
    def run(name: str, *overrides: str) -> list[float]:
        home = tmp_path / name
        home.mkdir()
        shutil.copy(empty_tracker, home)
        monkeypatch.setenv("LAPFLOW_HOME", str(home))
        assert main([*TINY, *overrides]) == 0
        return losses(home)

    def half(name: str) -> str:
        return f"resume={tmp_path / name / 'store/runs/digits/checkpoints/000000000320'}"

    # Several ranks start anew, each with its own order of sets; one rank can start sooner.
    with ranks_by_fork():
        one = run("one", "cluster.workers=1")
    two = run("two", "cluster.workers=2", "engine.placement={1:2}")
    with ranks_by_fork():
        fewer = run("fewer", "cluster.workers=1", half("two"))
    spread = ["cluster.workers=2", "engine.zero_stage=3", "engine.placement={0:2,1:2}"]
    more = run("more", *spread, half("one"))
    assert (len(one), len(fewer), len(more)) == (10, 5, 5)
    assert one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-5)
    assert fewer == pytest.approx(one[5:], rel=1e-5)
    assert more == pytest.approx(one[5:], rel=1e-5)
