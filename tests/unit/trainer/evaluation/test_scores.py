"""What was measured of a run's checkpoints is found, whoever measured it, and nonsense is not."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable

import pytest

from pipelines.documents import seal
from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.checkpoint.stores import MemoryStore, count_operations
from tests.unit.trainer.measurements import RUN, finished, measured
from trainer.checkpoint.index import CheckpointIndex
from trainer.evaluation.reports import Measurement, evaluation_key, frechet_scores, read_scores
from trainer.storage.errors import StoreUnreachable


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    for images in (10, 20, 30):
        manifest = upload(store, run=RUN, images=images, attempt="good")
        CheckpointIndex(store, run=RUN).commit(manifest)
    return store


def test_both_kinds_of_reports_are_found(store: MemoryStore) -> None:
    measured(store, 10, 3.0, features=("random_conv", "inception"))
    finished(store, 30, 1.5)
    assert read_scores(store, RUN) == {
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


def test_figures_of_different_protocols_are_never_in_one_curve(store: MemoryStore) -> None:
    measured(store, 10, 3.0, samples=100)
    measured(store, 20, 2.0, samples=100)
    measured(store, 30, 0.1, samples=50_000)
    assert frechet_scores(store, RUN, "random_conv") == {10: 3.0, 20: 2.0}
    measured(store, 20, 0.3, name="more", samples=50_000)
    assert frechet_scores(store, RUN, "random_conv") == {20: 0.3, 30: 0.1}


@pytest.mark.parametrize(
    "change",
    [
        {"compared": 30},
        {"labels": "drawn"},
        {"resize": "bicubic"},
        {"reference": "train"},
        {"extractors": {"random_conv": "other weights"}},
    ],
)
def test_what_a_figure_depends_on_is_its_protocol(change) -> None:
    asked = Measurement(
        attempt="one",
        weights="ema",
        samples=100,
        seed=1,
        sampler={"solver": "heun"},
        extractors={"random_conv": "", "inception": "a"},
        held_out_index="c0ffee",
    )
    alike = dataclasses.replace(asked, attempt="two", extractors={"random_conv": ""})
    assert alike.protocol("random_conv") == asked.protocol("random_conv")
    other = dataclasses.replace(asked, **change)
    assert other.protocol("random_conv") != asked.protocol("random_conv")
    assert other.name != asked.name


def test_what_is_no_measurement_of_what_stands_there_is_left_out(store: MemoryStore) -> None:
    measured(store, 10, 3.0, weights="master")
    measured(store, 20, 3.0, attempt="replaced")
    finished(store, 20, 3.0, attempt="replaced")
    measured(store, 40, 3.0)  # no such checkpoint
    store.put(evaluation_key(RUN, 30, "grid/of/report.json"), b"not ours")
    store.put("night-12/evaluation/000000000010/report.json", b"another run's")
    assert read_scores(store, RUN) == {}


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
        b'{"seed": ' + b"9" * 5000 + b"}",
        b" " * (1 << 21),
        json.dumps(seal({"frechet": 1.0})).encode(),
    ],
    ids=lambda data: repr(data[:20]),
)
@pytest.mark.parametrize("name", ["report.json", "a/report.json"])
def test_a_report_that_makes_no_sense_is_named_and_passed_over(
    store: MemoryStore, data: bytes, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    finished(store, 10, 2.0)
    key = evaluation_key(RUN, 20, name)
    store.put(key, data)
    with caplog.at_level(logging.WARNING):
        assert frechet_scores(store, RUN, "random_conv") == {10: 2.0}
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"memory://{key}, which cannot be believed" in line
    assert store.objects[key] == data  # who only looks leaves it where it is


@pytest.mark.parametrize("put", [finished, measured])
@pytest.mark.parametrize("words", [b"1e999", b"NaN", b"0.0001", b'"1.25"', b"12" + b"5" * 5000])
def test_a_changed_distance_steers_nothing(
    store: MemoryStore, put: Callable[..., None], words: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, 20, 1.25)
    (key,) = (key for key in store.objects if key.endswith("report.json"))
    changed = store.objects[key].replace(b'"frechet": 1.25', b'"frechet": ' + words)
    assert changed != store.objects[key]
    store.put(key, changed)
    with caplog.at_level(logging.WARNING):
        assert read_scores(store, RUN) == {}
    assert f"memory://{key}" in caplog.text


def test_no_flipped_bit_of_a_report_is_believed(store: MemoryStore) -> None:
    finished(store, 20, 1.25)
    (key,) = (key for key in store.objects if key.endswith("report.json"))
    whole = store.objects[key]
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        store.put(key, bytes(changed))
        assert frechet_scores(store, RUN, "random_conv") in ({}, {20: 1.25})


def test_a_report_of_before_has_no_checksum_and_is_not_believed(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    finished(store, 20, 1.25)
    key = evaluation_key(RUN, 20, "report.json")
    values = json.loads(store.objects[key])
    del values["sha256"]
    store.put(key, json.dumps(values).encode())
    assert frechet_scores(store, RUN, "random_conv") == {}
    assert "it has no checksum" in caplog.text


def test_a_distance_that_is_no_number_is_not_written(store: MemoryStore) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        finished(store, 10, math.nan)


def test_one_listing_and_only_reports_of_checkpoints_are_read(store: MemoryStore) -> None:
    for images in (10, 20, 40, 50):
        measured(store, images, 1.0)
    read = count_operations(store, lambda watched: read_scores(watched, RUN))
    assert read == ["list", "get_range", "get_range"]


def test_a_store_that_fails_is_not_a_run_without_measurements(store: MemoryStore) -> None:
    class Failing(MemoryStore):
        def get_range(self, key: str, start: int, size: int) -> bytes:
            raise StoreUnreachable("for a moment")

    finished(store, 10, 1.0)
    failing = Failing()
    failing.objects = store.objects
    with pytest.raises(StoreUnreachable):
        read_scores(failing, RUN)
