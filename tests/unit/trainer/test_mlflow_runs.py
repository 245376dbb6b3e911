"""Runs of MLflow that several processes begin together: one stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.metrics import mlflow_run
from trainer.metrics.mlflow_run import _find_or_begin


class Client:
    """MLflow, where others look and begin between two calls."""

    def __init__(self, *others_start: int) -> None:
        self.runs: dict[str, tuple[int, dict[str, str]]] = {}
        self.others_start = others_start

    def search_runs(self, _experiments: list[str], _what: str, **_how: Any) -> list[Any]:
        first = sorted(self.runs, key=lambda run_id: self.runs[run_id][0])
        return [SimpleNamespace(info=SimpleNamespace(run_id=run_id)) for run_id in first[:1]]

    def create_run(self, _experiment: str, *, tags: dict[str, str], start_time: int) -> Any:
        for number, start in enumerate(self.others_start):
            self.runs[f"other-{number}"] = (start, tags)
        self.runs["own"] = (start_time, tags)
        return SimpleNamespace(info=SimpleNamespace(run_id="own"))

    def delete_run(self, run_id: str) -> None:
        del self.runs[run_id]


@pytest.mark.parametrize(
    ("others_start", "found", "is_new"),
    [
        ((), "own", True),
        ((4,), "other-0", False),  # it was first
        ((6,), "own", True),  # it takes its own back
        ((6, 3), "other-1", False),
        ((5,), "other-0", False),  # at the same time any, and for all the same
    ],
)
def test_of_runs_that_are_begun_together_the_first_stays(others_start, found, is_new):
    client = Client(*others_start)
    run, begun = _find_or_begin(client, "1", "identity", tags={"place": "p"}, start_time=5)
    assert (run.info.run_id, begun) == (found, is_new)
    assert ("own" in client.runs) == is_new
    told = {"place": "p", mlflow_run._RUN_TAG: "identity"}
    assert all(tags == told for _, tags in client.runs.values())


def test_a_run_that_is_there_is_found_and_none_begun():
    client = Client()
    client.runs["there"] = (1, {})
    run, begun = _find_or_begin(client, "1", "identity", start_time=5)
    assert (run.info.run_id, begun) == ("there", False)
    assert list(client.runs) == ["there"]
