"""The number of ranks changes the order of sums and nothing else, also across a resume."""

import sqlite3

import pytest

from trainer.launch import main

pytestmark = pytest.mark.slow

TINY = [
    "+exp=digits",
    "cluster.backend=local",
    "model.depth=2",
    "model.width=32",
    "train.global_batch=64",
    "checkpoint.interval_images=0",
    "runtime.log_interval_images=64",
    "eval.samples=20",
    "eval.sampler.steps=2",
    "eval.classifier=false",
]


def losses(home) -> list[float]:
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute("SELECT step, value FROM metrics WHERE key = 'loss/total'")
        return [value for _, value in sorted(rows)]


def test_one_two_and_changing_numbers_of_ranks_see_the_same_losses(tmp_path, monkeypatch):
    plans = {
        "one": ["cluster.workers=1"],
        "two": ["cluster.workers=2"],
        "two, then one": ["cluster.workers=2", "cluster.workers=1"],
    }
    curves = {}
    for name, launches in plans.items():
        home = tmp_path / name.replace(", ", "-").replace(" ", "-")
        monkeypatch.setenv("LAPFLOW_HOME", str(home))
        for number, workers in enumerate(launches, start=1):
            images = 640 * number // len(launches)
            assert main([*TINY, workers, f"train.total_images={images}"]) == 0
        curves[name] = losses(home)
    assert len(curves["one"]) == 10
    assert curves["one"][-1] < curves["one"][0]
    for curve in curves.values():
        assert curve == pytest.approx(curves["one"], rel=1e-5)
