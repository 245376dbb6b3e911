"""What was measured of a run's checkpoints is found, whoever measured it, and nonsense is not."""

from __future__ import annotations

import logging
import math

import pytest

from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.checkpoint.stores import MemoryStore, count_operations
from tests.unit.trainer.measurements import RUN, finished, measured
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.errors import StoreUnreachable
from trainer.evaluate.report import evaluation_key
from trainer.evaluate.scores import frechet_scores, measured_scores


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    for images in (10, 20, 30):
        manifest = upload(store, run=RUN, images=images, attempt="good")
        Catalogue(store, run=RUN).commit(manifest)
    return store


def test_both_kinds_of_reports_are_found(store: MemoryStore) -> None:
    measured(store, 10, 3.0, features=("random_conv", "inception"))
    finished(store, 30, 1.5)
    assert measured_scores(store, RUN) == {
        "inception": {10: 3.0},
        "random_conv": {10: 3.0, 30: 1.5},
    }
    assert frechet_scores(store, RUN, "inception") == {10: 3.0}
    assert frechet_scores(store, RUN, "learned_conv") == {}


def test_of_several_the_one_of_most_samples_counts_then_the_last_by_name(
    store: MemoryStore,
) -> None:
    measured(store, 10, 3.0, name="b", samples=1000)
    measured(store, 10, 2.0, name="a", samples=1000)
    measured(store, 10, 1.0, name="c", samples=999)
    finished(store, 10, 0.5)
    assert frechet_scores(store, RUN, "random_conv") == {10: 3.0}
    finished(store, 10, 0.5, samples=1001)
    assert frechet_scores(store, RUN, "random_conv") == {10: 0.5}


def test_what_is_no_measurement_of_what_stands_there_is_left_out(store: MemoryStore) -> None:
    measured(store, 10, 3.0, weights="master")
    measured(store, 20, 3.0, attempt="replaced")
    measured(store, 40, 3.0)  # no such checkpoint
    store.put(evaluation_key(RUN, 30, "grid/of/report.json"), b"not ours")
    store.put("night-12/evaluation/000000000010/report.json", b"another run's")
    assert measured_scores(store, RUN) == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"measurement": 1}',
        b'{"measurement": {}, "distances": 3}',
        b'{"frechet": 1.0, "samples": "many"}',
        pytest.param(None, id="huge number"),
    ],
)
def test_a_report_that_makes_no_sense_is_named_and_passed_over(
    store: MemoryStore, data: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    finished(store, 10, 2.0)
    finished(store, 20, 1.0)
    key = evaluation_key(RUN, 20, "report.json")
    if data is None:
        data = store.objects[key].replace(b'"samples": 100', b'"samples": 1e999')
    store.put(key, data)
    with caplog.at_level(logging.WARNING):
        assert frechet_scores(store, RUN, "random_conv") == {10: 2.0}
    assert f"memory://{key}" in caplog.text


def test_a_distance_that_is_no_number_stays_one(store: MemoryStore) -> None:
    finished(store, 10, math.nan)
    assert math.isnan(frechet_scores(store, RUN, "random_conv")[10])


def test_one_listing_and_only_reports_of_checkpoints_are_read(store: MemoryStore) -> None:
    for images in (10, 20, 40, 50):
        measured(store, images, 1.0)
    read = count_operations(store, lambda watched: measured_scores(watched, RUN))
    assert read == ["list", "get", "get"]


def test_a_store_that_fails_is_not_a_run_without_measurements(store: MemoryStore) -> None:
    class Failing(MemoryStore):
        def get(self, key: str) -> bytes:
            raise StoreUnreachable("for a moment")

    finished(store, 10, 1.0)
    failing = Failing()
    failing.objects = store.objects
    with pytest.raises(StoreUnreachable):
        measured_scores(failing, RUN)
